"""Mount models stored in S3 as read-only directories."""

__version__ = "0.1.0"
