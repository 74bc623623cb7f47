"""One file for each predictor: the class, its parameters, its formula and source."""
