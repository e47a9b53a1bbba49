"""Names: keys of a listing as directories and files, and what was listed so far."""
