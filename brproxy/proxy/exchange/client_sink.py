"""All that writes an answer to one client: its head, its framing, pieces of its body, its end.

An answer may come from several workers' attempts, of which only one may say more than comments; what has been
written stays written, so this outlives the attempts.
"""

from __future__ import annotations

from brproxy.relay.client import Client
from brproxy.relay.fields import REQUEST_ID
from brproxy.relay.framing import (
    CHUNKED,
    LENGTH,
    NONE,
    UNTIL_CLOSE,
    Framing,
    chunk,
    interim_head,
    last_chunk,
    response_head,
    upgrade_head,
)
from brproxy.relay.response import ResponseHead


class ClientSink:
    """Where an answer to one request goes.

    ``has_head``: the client has been told the status, so that only more of the body can follow. ``chunked``:
    the body goes out in chunks. ``ends_by_close``: the end of the connection is that of the body; it comes
    when the outcome is settled, as else aiohttp cancels the handler as if the client had left, and that is
    how the request would end in the books. ``write`` sends bytes that are framed already. ``request_id`` is
    told to the client, unless the worker has. While it ``is_corked`` the last of the answer is put together:
    what is passed on is held back until ``finish``, and all that is left goes out in one write.
    """

    __slots__ = (
        "_framing",
        "_is_stream",
        "_unsent",
        "chunked",
        "client",
        "ends_by_close",
        "has_head",
        "is_corked",
        "request_id",
        "write",
    )

    def __init__(self, client: Client) -> None:
        self.client = client
        self.write = client.write
        self.has_head = False
        self.chunked = False
        self.ends_by_close = False
        self.request_id = b""
        self._framing = NONE
        self._is_stream = False
        self.is_corked = False
        self._unsent = b""

    def interim(self, head: ResponseHead) -> None:
        """Pass a 1xx response on. The proxy has answered ``Expect`` by itself; early hints pass."""
        if head.status != 100 and not self.client.is_http10 and not self.has_head:
            self.write(interim_head(head))

    def upgraded(self, head: ResponseHead, rest: bytes) -> None:
        """Pass a 101 response on, and the worker's first bytes behind it."""
        self.client.begin()
        self.has_head = True
        self.write(upgrade_head(head) + rest)

    def begin(self, head: ResponseHead, framing: Framing, *, is_stream: bool) -> None:
        """Put the head in front of what is sent next; does nothing if the client has one already."""
        if self.has_head:
            return
        client = self.client
        self._framing, self._is_stream = framing, is_stream
        self.chunked = framing is CHUNKED
        if framing is UNTIL_CLOSE:
            client.keep_alive = False
            self.ends_by_close = True
        more = b"" if REQUEST_ID in head.known else b"X-Request-Id: " + self.request_id + b"\r\n"
        client.begin()
        self.has_head = True
        self._unsent = response_head(
            head, framing, keep_alive=client.keep_alive, http10=client.is_http10, more=more
        )

    @property
    def can_say_more(self) -> bool:
        """Whether an event of the proxy's own can be told from what the worker's body lacks."""
        # Within a Content-Length the event could be taken for the missing rest.
        return self._is_stream and self._framing is not LENGTH

    def pass_on(self, payload: bytes) -> None:
        """Send more of the body."""
        # Without bytes there is nothing to frame: an empty chunk would be the end.
        if payload:
            payload = chunk(payload) if self.chunked else payload
            if self.is_corked:
                self._unsent += payload
            elif self._unsent:
                self.write(self._unsent + payload)
                self._unsent = b""
            else:
                self.write(payload)
        elif not self.is_corked:
            self.flush()

    def flush(self) -> None:
        """Write what has come together: a write is a system call, and those are what a relay costs."""
        if self._unsent:
            self.write(self._unsent)
            self._unsent = b""

    def finish(self, trailers: bytes) -> None:
        """Send all that is left, and the end of the body; ``trailers`` are lines."""
        if self.chunked:
            self._unsent += last_chunk(trailers)
        self.flush()

    def say(self, event: bytes) -> None:
        """Send what is held back and an event of the proxy's own, where that can be told from the rest."""
        self.is_corked = False
        self.pass_on(event if self.can_say_more else b"")

    def end_with(self, event: bytes) -> None:
        """End an answer that has begun with an event of the proxy's own, and without a clean end."""
        if not self.client.transport.is_closing():
            self.say(event)
            self.client.close()
