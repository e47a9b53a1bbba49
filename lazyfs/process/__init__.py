"""The processes of a mount, worker and supervisor, and their instructions."""
