"""One file for each routing policy: the class, its parameters, its formula and source."""
