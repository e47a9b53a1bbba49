"""The control socket of a mount: what it answers, and how it is asked."""
