"""The S3 client: listings, ranged reads, signatures, credentials, and the probe at the start."""
