"""What becomes of a worker's response: one kind in each module."""
