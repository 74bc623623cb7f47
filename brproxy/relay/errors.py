"""What can go wrong between a client and a worker."""

from __future__ import annotations

from brproxy.types import BrproxyError, InvalidInputError


class WorkerFailedError(BrproxyError):
    """A worker gave no response.

    ``unreachable``: it could not even be connected to; ``refused``: since nobody listens there.
    """

    def __init__(self, reason: str, *, unreachable: bool = False, refused: bool = False) -> None:
        super().__init__(reason)
        self.unreachable = unreachable
        self.refused = refused


class ShortageError(WorkerFailedError):
    """This machine is out of files, memory or ports: the worker could not be asked and is not to blame."""


class TooLongError(WorkerFailedError):
    """What a worker answers the proxy itself is longer than the proxy reads."""


class StaleConnectionError(WorkerFailedError):
    """A kept connection turned out to be closed: engines do that when they like, it says nothing of them."""


class BrokenResponseError(BrproxyError):
    """A worker's response is no HTTP, or ended before it was complete."""


class BadBodyError(InvalidInputError):
    """The body of a client's request is no HTTP."""


class UnknownExpectationError(InvalidInputError):
    """A client expects something that nobody here knows (RFC 9110, section 10.1.1)."""


class ClientGoneError(BrproxyError):
    """The client closed its connection, or has stopped reading for too long."""
