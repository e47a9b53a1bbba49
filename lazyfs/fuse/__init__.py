"""The conversation with the kernel: mount system calls, the session, requests."""
