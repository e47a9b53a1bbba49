"""Prefetching: which blocks to fetch next.

prefetcher.py       the policy: which blocks to fetch, and in which order
planner.py          finds the files of a model and their order, for the policy
streams.py          positions of the readers, as far as requests show them
found_models.py     the models in a listing, for the planner
model_contents.py   indexes and headers, for the planner
skip_rules.py       predicts which tensors a loader skips
skip_learner.py     applies that to blocks, and limits speculative fetching
pages_ahead.py      estimates how much of the page cache is unread
consumed_blocks.py  finds blocks on disk that the load no longer needs

All but the planner and model_contents.py are pure: no I/O, no clock, no threads.
"""
