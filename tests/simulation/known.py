"""What the proxy is known not to hold yet: kinds of faults that are not drawn, promises that are not held to.

Whoever mends one takes its name out; in the end all of this is empty, and goes.
"""

BROKEN_FAULTS: frozenset[str] = frozenset()

BROKEN_PROMISES: frozenset[str] = frozenset()
