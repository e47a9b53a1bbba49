"""The kernel's page cache: pushes pages, detects dropped ones, looks names up."""
