"""A mount in modelled time: the real planner, prefetcher, fetcher and memory; a modelled world.

    machine.py  the world: a link, a disk, a page cache, and threads that cost no time of their own
    models.py   models to load: the recorded one, and made ones of any size
    loaders.py  what loaders do: recorded, and made after what is known of them
    load.py     one load: wires a mount, lets a loader run, and measures

`bench/simulate.py` prints a table of many loads; `tests/unit/test_loads.py` holds them to bounds.
Time is trio's mock clock, so a load of minutes takes parts of a second and is the same each time.
"""
