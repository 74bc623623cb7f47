"""A client's request, read: its header fields, its body, what the body says, its id."""

from __future__ import annotations

import itertools
import re
import secrets
from dataclasses import dataclass, field

from aiohttp import web

from brproxy.engines.dialect import Dialect, RequestFacts
from brproxy.engines.sessions import SessionAsk
from brproxy.journey import Runs
from brproxy.proxy.service import Service
from brproxy.proxy.upload import Upload
from brproxy.relay.client import Client
from brproxy.relay.fields import REQUEST_ID, SESSION_ID, Fields, not_to_workers, request_fields
from brproxy.relay.hops import Hop
from brproxy.relay.request import UPGRADE, origin_form, path_of
from brproxy.types import InvalidInputError

_BATCH_ID = re.compile(rb"[\x21-\x7e]+")


@dataclass(slots=True)
class Incoming:
    """One request on its way in.

    ``lines`` are the header fields that a worker gets, but for its own name, Accept-Encoding and what frames
    the body. ``batch``: the one that it says to be of, "" for none. ``runs`` is what all that is sent of it
    to workers has in common.
    """

    target: str
    path: str
    lines: bytes
    accept_encoding: bytes
    request_id: bytes
    upload: Upload
    facts: RequestFacts
    is_form: bool = False
    batch: str = ""
    runs: Runs = field(default_factory=Runs)


class Reader:
    """Makes an Incoming of what a client sends."""

    def __init__(self, service: Service, dialect: Dialect) -> None:
        self._service = service
        self._dialect = dialect
        self._ids = RequestIds()
        self._hops = service.hops
        self._batch_field = service.batches.header.lower().encode()
        own = {self._batch_field} if self._batch_field else frozenset()
        self._dropped = not_to_workers(service.hops.names | own)

    async def read(self, request: web.BaseRequest, client: Client, upload: Upload) -> Incoming:
        """Read a request; raises ProxyError or InvalidInputError for what can be no request here."""
        target = origin_form(client.target)
        path = request.path if target is client.target else path_of(target)
        fields = request_fields(request.raw_headers, self._dropped)
        media_type = fields.media_type
        batch = self._batch(fields) if self._batch_field in fields.known else ""
        if not upload.take_whole():
            await upload.read(media_type, names_group=len(self._service.groups) > 1)
        facts = self._dialect.read_request(
            path,
            client.method,
            media_type,
            upload.beginning or b"",
            hashes=self._service.hash_prompts or bool(batch),
            session=self._asked(fields) if self._service.sessions.are_read else None,
        )
        if facts.malformed and len(self._service.groups) > 1:
            # With one group the engine says it in its own words; with several nobody knows whose.
            raise InvalidInputError(facts.malformed)
        request_id = fields.known.get(REQUEST_ID) or self._ids.next()
        return Incoming(
            target,
            path,
            _lines(fields, request_id, client, client.hop(self._hops)),
            fields.known.get(b"accept-encoding", b""),
            request_id,
            upload,
            facts,
            media_type == "multipart/form-data",
            batch,
        )

    def _asked(self, fields: Fields) -> SessionAsk:
        name = fields.known.get(SESSION_ID, b"").decode("latin-1")
        return SessionAsk(name, self._service.sessions.by_messages)

    def _batch(self, fields: Fields) -> str:
        name, reading = fields.known[self._batch_field], self._service.batches
        if len(name) > reading.id_bytes_max or not _BATCH_ID.fullmatch(name):
            msg = (
                f"{reading.header} must name a batch by 1 to {reading.id_bytes_max} visible ASCII "
                f"characters, got {len(name)} bytes"
            )
            raise InvalidInputError(msg)
        return name.decode("ascii")


class RequestIds:
    """Ids for requests whose client sent none: unique to this process and the request."""

    def __init__(self) -> None:
        self._process = secrets.token_hex(8).encode()
        self._numbers = itertools.count(1)

    def next(self) -> bytes:
        """Return an id that was never returned before."""
        return b"%b%08x" % (self._process, next(self._numbers))


def _lines(fields: Fields, request_id: bytes, client: Client, hop: Hop) -> bytes:
    known = fields.known
    of_hops = hop.lines
    if client.is_http10 or not hop.names.isdisjoint(known):
        of_hops = hop.behind(known, b"1.0" if client.is_http10 else b"1.1")
    if REQUEST_ID in known:
        lines = fields.lines + of_hops
    else:
        lines = b"".join((fields.lines, b"X-Request-Id: ", request_id, b"\r\n", of_hops))
    protocol = known.get(b"upgrade")
    if protocol is not None:
        client.names_upgrade(protocol)
        if client.wants_upgrade:
            return lines + UPGRADE
    return lines
