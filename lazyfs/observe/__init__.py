"""What a mount does: events, counters, metrics, traces, and the report of a load."""
