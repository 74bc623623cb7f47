"""One module for each engine; importing the folder registers them all."""
