"""What a mount does, seen: events and counts, metrics, and the report of a load."""
