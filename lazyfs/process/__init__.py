"""The processes of a mount: worker, supervisor, and what they are told."""
