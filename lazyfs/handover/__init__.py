"""What outlives a worker: the session, the listing, the pages, changes made at run time."""
