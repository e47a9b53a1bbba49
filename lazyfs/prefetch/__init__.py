"""Which block to bring next. Pure: no I/O, no clock, no threads.

places.py      one file's blocks: where each is, and the pieces that are read as one thing
streams.py     who reads where, as far as reads show it
skips.py       which tensors this loader passes over
taste.py       what follows from that, and how much may be brought that nobody may read
ahead.py       how much lies in the page cache that nobody has read yet
spent.py       what on the disk this load needs no more
prefetcher.py  the policy: what is wished for, in which order
"""

from lazyfs.prefetch.places import Place
from lazyfs.prefetch.prefetcher import Prefetcher

__all__ = ["Place", "Prefetcher"]
