"""Which blocks to bring next.

prefetcher.py       the policy: what is wished for, in which order
streams.py          which readers read where, as far as reads show it
skips.py            which tensors a loader passes over
skip_learner.py     what follows from that, and how much may be brought that nobody may read
ahead.py            how much lies in the page cache that was not read yet
consumed_blocks.py  blocks on the disk that this load needs no more
planner.py          finds the files of a model and their order, and tells the policy

All but the planner are pure: no I/O, no clock, no threads.
"""
