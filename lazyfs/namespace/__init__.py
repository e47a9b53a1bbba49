"""The namespace: keys as directories and files, and the listings so far."""
