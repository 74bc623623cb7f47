"""Routing decisions, pure: arrays and a random generator in, a worker for each request out."""
