"""Entry point of `python -m lazyfs` and of the command `lazyfs`."""

from lazyfs.cli import main

if __name__ == "__main__":
    main()
