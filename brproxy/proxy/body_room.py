"""What all requests' bodies may take of the memory together."""

from __future__ import annotations

from brproxy.proxy import errors


class BodyRoom:
    """The memory that all requests' bodies may take together: ``bytes_max``.

    Clients whose bodies find no room are told to come back after ``retry_after_s`` seconds.
    """

    def __init__(self, bytes_max: int, retry_after_s: int) -> None:
        self._bytes_max = bytes_max
        self.retry_after_s = retry_after_s
        self.taken_bytes = 0

    def take(self, more_bytes: int) -> None:
        """Take room; raises ProxyError when there is not enough."""
        if self.taken_bytes + more_bytes > self._bytes_max:
            raise errors.no_room_for_bodies(self._bytes_max, self.retry_after_s)
        self.taken_bytes += more_bytes

    def give_back(self, bytes_taken: int) -> None:
        """Return what was taken."""
        self.taken_bytes -= bytes_taken
