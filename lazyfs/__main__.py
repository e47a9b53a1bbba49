"""Entry point of `python -m lazyfs` and of the command `lazyfs`."""

import gc

# What modules make stays: garbage collection while they are imported, and of them when the process
# ends, would take a fifth of the time of a short command. `cli` enables it again.
gc.disable()

from lazyfs.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
