"""What makes a mount, and what makes it outlive the process that serves it."""
