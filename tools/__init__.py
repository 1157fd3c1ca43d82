"""What keeps the repository in order; not installed."""
