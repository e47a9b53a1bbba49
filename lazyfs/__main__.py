"""`python -m lazyfs`."""

from lazyfs.cli import main

if __name__ == "__main__":
    main()
