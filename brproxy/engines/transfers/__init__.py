"""One module for each transfer, found by the registry."""
