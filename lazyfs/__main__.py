"""Entry point of `python -m lazyfs` and of the command `lazyfs`."""

import sys

from lazyfs.process import early_start


def main() -> None:
    """Run the command line."""
    begun = early_start.begin(sys.argv[1:])
    try:
        from lazyfs.cli import main  # after the fork: see there

        main(obj=begun)
    finally:
        if begun is not None:
            begun.end()


if __name__ == "__main__":
    main()
