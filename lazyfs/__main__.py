"""`python -m lazyfs`, and what the command `lazyfs` is."""

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
