"""The kernel's page cache: puts pages there, finds out which are gone, looks names up."""
