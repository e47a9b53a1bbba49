"""The cache that the nodes of a fleet share (`lazyfs fleet-cache`): nginx, configured and kept.

Each node runs a *door* and a *shelf*. The door is what the mounts of the node ask. It has S3 say
whether the reader may have the object, by making the reader's own request for one byte of it, and
passes the request to the shelf that the range belongs to. The shelf has the range on its disk, or
gets it from S3, once for all who ask meanwhile. `docs/SCALE.md` has the whole picture.
"""
