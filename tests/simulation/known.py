"""What the proxy is known not to hold yet: kinds of faults that are not drawn, promises that are not held to.

Whoever mends one takes its name out; in the end all of this is empty, and goes.
"""

BROKEN_FAULTS: frozenset[str] = frozenset(
    {
        "bad-requests",  # each is logged as an error, with a traceback
        "endless-body",  # whoever sends part of a body keeps its place for ever
        "extra",  # bytes behind a response take the response's last ones with them
        "policy-raises",  # a round that raises is the last one
        "predictor-raises",  # the same
    }
)

BROKEN_PROMISES: frozenset[str] = frozenset(
    {
        "bounded-reads",  # of an endless answer to a check all is read that comes in time
        "moves-on",  # a worker that is taken out keeps what it has not answered until a time-out
        "deliveries",  # a kept connection that breaks is a free retry, for each attempt again
    }
)
