"""How S3 is spoken: listings, ranged reads, signatures, credentials, and the probe at the start."""
