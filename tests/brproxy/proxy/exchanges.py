"""Random exchanges: requests, and the responses of fuzz.py with more fields, cut or damaged. Pure."""

import re

from tests.brproxy.relay.fuzz import BODY, USAGE_ASKED, Case

CHAT = "/v1/chat/completions"
MEDIA_TYPES = (
    "application/octet-stream",
    "application/json",
    "multipart/form-data; boundary=b",
    "text/plain",
)
# Around what one read of a socket, what is looked at of a body and what is read of an upload hold.
UPLOAD_BYTES = (0, 1, 300, 5000, 65_536, 65_537, 300_000, 1 << 20, (1 << 20) + 1, 2_500_000)
UPLOAD_WEIGHTS = (8, 8, 30, 30, 4, 4, 4, 1, 1, 1)
REQUEST_FIELDS = (
    ("X-A", "1"),
    ("x-a", "2, 3"),
    ("X-Units", "grün"),
    ("Authorization", "Bearer secret"),
    ("Cookie", "a=b; c=d"),
    ("X-Empty", ""),
    ("TE", "trailers"),
    ("Keep-Alive", "timeout=9"),
    ("Proxy-Authorization", "Basic Og=="),
    ("Connection", "keep-alive, X-Hop"),
    ("X-Hop", "not for others"),
    ("X-Forwarded-For", "2001:db8::1, 10.1.1.1"),
    ("x-forwarded-for", "10.2.2.2 ,"),
    ("X-FORWARDED-FOR", ""),
    ("X-Forwarded-Proto", "https"),
    ("X-Forwarded-Host", "example.org"),
    ("Via", "1.1 first, HTTP/2 second (a, comment)"),
    ("VIA", "1.0 third"),
)
RESPONSE_FIELDS = (
    b"X-A: 1",
    b"x-a:2",
    b"Set-Cookie: a=b; Path=/",
    b"Set-Cookie: c=d",
    b"X-Latin: gr\xfcn",
    b"X-Utf: gr\xc3\xbcn",
    b"X-Empty:",
    b"X-Long: " + b"l" * 3000,
    b"Server: w",
    b"Date: Mon, 01 Jan 2024 00:00:00 GMT",
    b"Content-Encoding: gzip",
    b"Trailer: X-T",
    b"Keep-Alive: timeout=5",
    b"Proxy-Authenticate: Basic",
    b"Connection: X-Hop",
    b"Connection: close",
    b"X-Hop: not for others",
)
_SIZES = re.compile(rb"(?<=\r\n)[0-9a-f]+(?=\r\n)|(?<=Content-Length: )\d+")


class Exchange(Case):
    """One request, and what the worker does about it: ``sends`` are its writes, ``end`` is what follows them.

    ``harm`` is what was done to a good response: "" for nothing, "cut" if it only ends early, else "damage".
    ``end`` is "keep", "close" or "reset".
    """

    def __init__(self, seed):
        super().__init__(seed)
        self._add_response_fields()
        self._choose_request()
        self.end = "close" if self.until_close or self.rng.random() < 0.1 else "keep"
        self.harm = self.rng.choices(["", "cut", "damage"], [11, 5, 4])[0]
        if self.harm:
            self.end = self.rng.choice(["close", "close", "reset"])
            self.response = self._cut() if self.harm == "cut" else self._damaged()
        self.sends = [read for read in self.reads() if read]
        self.raw = b"".join(self.sends)

    def _add_response_fields(self):
        first, rng = self.response[0], self.rng
        more = rng.sample(RESPONSE_FIELDS, rng.choice([0, 0, 1, 3, 6]))
        lines = b"".join(line + b"\r\n" for line in more)
        if rng.random() < 0.05 and self.method != "HEAD":
            lines += b"X-Request-Id: the-worker-s\r\n"
        self.response = [first.replace(b"X-W: w\r\n", b"X-W: w\r\n" + lines, 1), *self.response[1:]]

    def _choose_request(self):
        rng = self.rng
        self.fields = rng.sample(REQUEST_FIELDS, rng.choice([0, 0, 1, 3, 6]))
        self.upload, self.uploads_chunked, self.expects = None, False, False
        kind = rng.choices(["ask", "upload", "look"], [6, 2, 1])[0] if self.method != "HEAD" else "look"
        self.path = CHAT if kind == "ask" else f"/v1/files/{rng.randrange(9)}%20%7e"
        if kind == "look":
            self.method = self.method if self.method == "HEAD" else rng.choice(["GET", "DELETE"])
            return
        self.expects = not self.http10 and rng.random() < 0.05
        self.uploads_chunked = not self.http10 and rng.random() < 0.4
        if kind == "ask":
            body, media_type = BODY % (USAGE_ASKED if self.asks_usage else b""), "application/json"
        else:
            self.method = rng.choice(["POST", "PUT", "PATCH"])
            body = rng.randbytes(rng.choices(UPLOAD_BYTES, UPLOAD_WEIGHTS)[0])
            media_type = rng.choice(MEDIA_TYPES)
        self.fields.append(("Content-Type", media_type))
        cuts = sorted(rng.randrange(len(body) + 1) for _ in range(rng.randrange(6)))
        self.upload = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]

    @property
    def usage_is_added(self):
        """Whether the proxy asks for a report of usage that the client did not ask for."""
        return self.path == CHAT and not self.asks_usage

    def _cut(self):
        """End anywhere, or where the head, a chunk or an event does."""
        raw, rng = b"".join(self.response), self.rng
        ends = [match.end() for match in re.finditer(rb"\r\n|\n\n", raw)]
        at = rng.choice(ends) if rng.random() < 0.4 else rng.randrange(len(raw))
        kept = []
        for piece in self.response:
            kept.append(piece[:at])
            at -= len(kept[-1])
        return kept

    def _damaged(self):
        rng = self.rng
        response = list(self.response)
        how = rng.randrange(7)
        if how == 0:
            return [rng.randbytes(rng.randrange(1, 300))]
        if how == 1:
            # In the write of the last bytes: later ones would be taken for the next response, by anybody.
            surplus = rng.choice(
                [rng.randbytes(9), b"\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx"]
            )
            return [*response[:-1], response[-1] + surplus]
        place = rng.randrange(len(response))
        piece = response[place]
        sizes = list(_SIZES.finditer(piece))
        if how in {2, 3} and sizes:
            size = rng.choice(sizes)
            other = rng.choice([b"%x" % rng.randrange(300), b"", b"-1", b"zz", b"0", b"f" * 17, b" 5"])
            response[place] = piece[: size.start()] + other + piece[size.end() :]
            return response
        at = rng.randrange(len(piece) + 1)
        dropped = rng.choice([0, 1, 1, 4])
        inserted = rng.choice([b"", rng.randbytes(rng.randrange(1, 5)), b"\r\n", b"\n", b"\0", b"0\r\n\r\n"])
        response[place] = piece[:at] + inserted + piece[at + dropped :]
        return response
