"""The cache that the nodes of a fleet share: nginx, started by `lazyfs fleet-cache`.

Each node runs a *door* and a *shelf*. Mounts of the node send their requests to the door. The door
lets S3 authorise the reader: it sends the reader's own request, for one byte of the object, to S3.
Then it passes the request to the shelf that the range belongs to. The shelf has the range on its
disk, or gets it from S3, once for all requests that arrive meanwhile. `docs/SCALE.md` describes the
whole.
"""
