"""The data plane: bytes between clients and workers, and nothing that knows what an engine is."""
