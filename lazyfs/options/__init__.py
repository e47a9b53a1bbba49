"""Every setting, declared once, and how its text is read."""
