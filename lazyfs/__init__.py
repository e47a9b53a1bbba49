"""Large models in S3 as a local read-only directory."""

__version__ = "0.1.0"
