"""Whatever lists workers send, in whatever coding: each model of each is there once, and no label lies."""

import asyncio
import gzip
import zlib
from unittest.mock import patch

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from brproxy.proxy import models
from brproxy.proxy.errors import ProxyError
from brproxy.proxy.exchange.collect import Reply
from brproxy.proxy.models import ModelLimits, ModelList
from brproxy.relay.errors import WorkerFailedError
from brproxy.relay.fields import response_fields
from brproxy.relay.response import ResponseHead

ENCODE = {"identity": bytes, "gzip": gzip.compress, "x-gzip": gzip.compress, "deflate": zlib.compress}
BYTES_MAX = 1 << 12
ENTRIES = st.fixed_dictionaries({"id": st.sampled_from("abc")}, optional={"n": st.integers(0, 9)})
LISTS = st.lists(ENTRIES, max_size=4).map(lambda entries: orjson.dumps({"object": "list", "data": entries}))
RARELY = st.sampled_from([False] * 9 + [True])
NO_LISTS = [
    b"",
    b"[]",
    b'{"data":{}}',
    b'{"data":null}',
    b'{"data":[{"id":1}]}',
    b"\xff",
    bytes(2 * BYTES_MAX),
]
BODIES = RARELY.flatmap(lambda rarely: st.sampled_from(NO_LISTS) if rarely else LISTS)


@st.composite
def replies(draw):
    """Return a reply, and the body that its label promises; None where the label does not hold."""
    coding, truly = draw(st.sampled_from(sorted(ENCODE))), draw(st.sampled_from(sorted(ENCODE)))
    # Mostly workers do not lie.
    truly = truly if draw(RARELY) else coding
    whole = draw(BODIES)
    body = ENCODE[truly](whole)
    sent = body[:-1] if draw(RARELY) else body
    fields = [
        (b"Content-Type", b"application/json"),
        (b"Access-Control-Allow-Origin", b"w"),
        (b"X-Other", b"x"),
    ]
    if coding != "identity" or draw(st.booleans()):
        fields.append(
            (b"Content-Encoding", draw(st.sampled_from([coding, coding.upper(), f" {coding} "])).encode())
        )
    if draw(RARELY):
        fields[-1] = (b"Content-Encoding", b"br")
        coding = "br"
    status = draw(st.sampled_from([*[200] * 8, 404, 500]))
    lines, known = response_fields(fields)
    head = ResponseHead(status, b"", lines, known, None, chunked=True)
    return Reply(head, sent), decoded(coding, sent)


def decoded(coding, sent):
    """Return what a client would make of a body with that label, None where it can make nothing of it."""
    if coding == "identity":
        return sent
    for decode in (gzip.decompress, zlib.decompress) if coding in ENCODE else ():
        try:
            return decode(sent)
        except (OSError, EOFError, zlib.error):
            continue
    return None


def listed(status, body):
    """Return the entries of a list by id, None for what is no list."""
    if status != 200 or body is None or len(body) > BYTES_MAX:
        return None
    try:
        entries = orjson.loads(body)["data"]
        return (
            {entry["id"]: entry for entry in entries} if all(type(e["id"]) is str for e in entries) else None
        )
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return None


class Endpoint:
    def __init__(self, origin):
        self.origin = origin


async def answer_of(given):
    endpoints = [Endpoint(number) for number in range(len(given))]

    async def ask(endpoint, _):
        if given[endpoint.origin] is None:
            raise WorkerFailedError("it does not answer")
        return given[endpoint.origin]

    with patch.object(models, "ask", ask):
        union = ModelList(
            lambda: [(endpoint, "/") for endpoint in endpoints], ModelLimits(30.0, BYTES_MAX, 9.0, 1)
        )
        try:
            return await union.answer([])
        except ProxyError as error:
            return error


@settings(deadline=None)
@given(st.lists(RARELY.flatmap(lambda rarely: st.none() if rarely else replies()), max_size=4))
def test_the_union_has_each_model_once_and_no_label_lies(drawn):
    answer = asyncio.run(answer_of([None if one is None else one[0] for one in drawn]))
    there = [one for one in drawn if one is not None]
    lists = [found for reply, body in there if (found := listed(reply.head.status, body)) is not None]
    if not there:
        assert answer.status == 502
        return
    fields = {name.lower(): value for name, value in answer.fields}
    assert fields["access-control-allow-origin"] == "w"
    assert "x-other" not in fields
    if not lists:
        # The first is passed on as it is, and labelled as it was.
        reply = there[0][0]
        assert (answer.status, answer.body) == (reply.head.status, reply.body)
        assert fields.get("content-encoding", "").encode() == reply.head.known.get(b"content-encoding", b"")
        return
    expected = {}
    for found in lists:
        expected = found | expected
    entries = orjson.loads(answer.body)["data"]
    assert answer.status == 200
    assert "content-encoding" not in fields
    assert len(entries) == len(expected)
    assert {entry["id"]: entry for entry in entries} == expected
