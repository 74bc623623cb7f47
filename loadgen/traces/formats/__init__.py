"""One module for each trace format; importing the folder registers them all."""
