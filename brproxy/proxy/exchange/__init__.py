"""One request on one worker's connection, and what comes of it: each kind of answer in one file."""
