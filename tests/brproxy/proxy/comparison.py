"""What may differ between an answer and the same one through the proxy, and nothing else may. Pure."""

import re
from typing import NamedTuple

from tests.brproxy.proxy.exchanges import CHAT
from tests.brproxy.proxy.test_sse import reference_data
from tests.brproxy.wire import Answer, WireError, read_answer

# Written down once more on purpose: what is compared must not take the proxy's word for what it drops.
HOP_BY_HOP = {
    b"connection",
    b"keep-alive",
    b"proxy-authenticate",
    b"proxy-authorization",
    b"proxy-connection",
    b"te",
    b"transfer-encoding",
    b"upgrade",
}
ADDED = {b"x-request-id"}
HOPS = (b"x-forwarded-for", b"x-forwarded-proto", b"via")
FRAMING = {b"content-length"}
NOT_FORWARDED = {b"host", b"expect", b"trailer"}
USAGE_QUESTION = b'"stream_options":{"include_usage":true},'
LINE_END = rb"(?>\r\n|\n|\r)"
# A whole event: damage may leave lines in it that are no data.
OTHER_LINE = rb"(?!data)[^\r\n]++"
USAGE_EVENT = re.compile(
    rb'(?:%b%b)*+data: ?[^\r\n]*"choices":\s*\[\s*\],\s*"usage"[^\r\n]*(?:%b%b)*+%b{2}'
    % (OTHER_LINE, LINE_END, LINE_END, OTHER_LINE, LINE_END)
)
BLANK_LINE = re.compile(LINE_END + LINE_END)
ENDS_EVENT = re.compile(rb"(?:\r\n|\n|\r){2}\Z")
ERROR_EVENT = re.compile(rb'data: \{"error":\{"message":"The worker\'s response broke off [^\n]*\}\}\n\n\Z')
ALLOWED = {
    "strict": "aiohttp reads leniently what is no valid HTTP; the proxy refuses it",
    "surplus": "bytes behind a response: whether they spoil it depends on which read they come with",
    "no [DONE]": "a stream framed by the connection's end is whole only with [DONE]; aiohttp cannot know",
    "reset": "a reset is no orderly end of a body that ends with the connection; aiohttp takes it for one",
    "1.0": "a HTTP/1.0 client is told the end of a body of unknown length by the connection's end alone",
}


class Seen(NamedTuple):
    """What aiohttp's client made of the response ``raw``; ``failure`` is "" if it is complete."""

    status: int
    reason: str
    fields: list[tuple[bytes, bytes]]
    body: bytes
    failure: str
    raw: bytes


class Reading(NamedTuple):
    """A strict reading of bytes: the heads before the response, the response (None without), is it whole."""

    interim: list[tuple[int, list[tuple[bytes, bytes]]]]
    answer: Answer | None
    whole: bool
    rest: bytes


def read_strictly(raw, method):
    interim, rest = [], raw
    while True:
        try:
            answer, rest = read_answer(rest, method, closed=True)
        except WireError as error:
            return Reading(interim, error.answer, False, b"")
        if answer is None or answer.status >= 200 or answer.status == 101:
            return Reading(interim, answer, answer is not None and answer.status != 101, rest)
        if answer.status != 100:
            interim.append((answer.status, answer.fields))


def end_to_end(fields, apart=frozenset()):
    """Return the fields that concern both ends, in order, without those that the proxy adds and ``apart``."""
    named = {
        token.strip().lower()
        for name, value in fields
        if name.lower() == b"connection"
        for token in value.split(b",")
    }
    apart = HOP_BY_HOP | ADDED | named | apart
    return [(name, value) for name, value in fields if name.lower() not in apart]


def compare_requests(exchange, direct, proxied):
    """Check that the worker was asked the same, however often (a failed request is sent again)."""
    assert direct
    assert proxied, "the worker was not asked"
    wanted = direct[0]
    for method, target, fields, body in [*direct[1:], *proxied]:
        assert (method, target) == wanted[:2]
        rest, wanted_rest = (
            [pair for pair in some if pair[0].lower() not in {b"accept-encoding", *HOPS}]
            for some in (fields, wanted[2])
        )
        assert rest == wanted_rest
        # Of a stream whose report of usage is taken out again the proxy must be able to read the events.
        codings = {b"identity", b"gzip, deflate"} if exchange.usage_is_added else {b"gzip, deflate"}
        assert {value for name, value in fields if name.lower() == b"accept-encoding"} <= codings
        asked = body.replace(USAGE_QUESTION, b"", 1) if exchange.usage_is_added else body
        assert asked == wanted[3], f"{len(body)} bytes for {len(wanted[3])}"
    for _, _, fields, _ in proxied:
        check_hops(exchange, wanted[2], fields)


def check_hops(exchange, direct, proxied):
    """Check that a worker is told of the client and of the proxy behind what it was told anyway."""
    via = b"1.0 brproxy" if exchange.http10 else b"1.1 brproxy"
    assert hops(proxied, b"x-forwarded-for") == [*hops(direct, b"x-forwarded-for"), b"127.0.0.1"]
    assert hops(proxied, b"x-forwarded-proto") == (hops(direct, b"x-forwarded-proto") or [b"http"])
    assert hops(proxied, b"via") == [*hops(direct, b"via"), via]
    assert all([name.lower() for name, _ in proxied].count(name) == 1 for name in HOPS), "not one list each"


def hops(fields, name):
    """Return the members of a list, of all fields of that name."""
    listed = b",".join(value for found, value in fields if found.lower() == name).split(b",")
    return [member.strip() for member in listed if member.strip()]


def compare(exchange, direct, proxied):
    """Check the proxied response against the direct one; return the name of an allowed difference, or ""."""
    sent = read_strictly(exchange.raw, exchange.method)
    got = read_strictly(proxied.raw, exchange.method)
    assert exchange.harm or (sent.whole and not sent.rest and not direct.failure), direct.failure
    is_stream = streams(exchange, sent.answer)
    by_close = sent.answer is not None and sent.answer.framing == "close"
    is_reset = by_close and exchange.end == "reset"
    lacks_done = (
        is_stream
        and by_close
        and exchange.path == CHAT
        and b"[DONE]" not in reference_data(sent.answer.body + b"\n\n")
    )
    if proxied.failure or is_refusal_page(proxied, direct):
        check_break(exchange, sent, got, proxied, is_stream=is_stream)
        if direct.failure:
            return ""
        reasons = {
            "no [DONE]": lacks_done,
            "reset": is_reset,
            "strict": not sent.whole,
            "surplus": bool(sent.rest),
        }
        allowed = next((name for name, holds in reasons.items() if holds), "")
        assert allowed, f"only the proxied one fails: {proxied}"
        return allowed
    assert got.answer is not None, f"aiohttp understood it, but it is no valid HTTP: {proxied}"
    filled_up = got.answer.framing == "length" and ERROR_EVENT.search(proxied.raw)
    assert not filled_up, "the error event fills up the Content-Length of a stream that broke"
    same = is_same_body(exchange, direct.body, proxied, is_stream=is_stream)
    if (
        sent.rest
        and direct.failure
        and is_same_body(exchange, sent.answer.body, proxied, is_stream=is_stream)
    ):
        return "surplus"
    ends_early = direct.failure or lacks_done or is_reset or ((sent.rest or not sent.whole) and not same)
    if exchange.http10 and got.answer.framing == "close" and ends_early:
        check_break(exchange, sent, got, proxied, is_stream=is_stream)
        return "1.0"
    assert not is_reset, f"the connection was reset, but it looks complete: {proxied}"
    assert not lacks_done, f"the stream has no end, but looks complete: {proxied}"
    assert not direct.failure, f"looks complete, but directly: {direct.failure}; {proxied.raw[-200:]!r}"
    check_heads(exchange, direct, proxied)
    assert same, f"{proxied.body[-300:]!r} for {direct.body[-300:]!r}"
    check_wire(exchange, read_strictly(direct.raw, exchange.method), got)
    return ""


def streams(exchange, answer):
    if answer is None or exchange.method == "HEAD":
        return False
    media_type = [b"", *answer.all(b"content-type")][-1].partition(b";")[0].strip().lower()
    coding = [b"identity", *answer.all(b"content-encoding")][-1]
    return media_type == b"text/event-stream" and coding == b"identity"


def is_refusal_page(proxied, direct):
    """Tell whether the proxy answered for a worker from which no response came."""
    return proxied.status == 502 != direct.status and (
        b'"type":"upstream_error"' in proxied.body or not proxied.body
    )


def check_break(exchange, sent, got, proxied, *, is_stream):
    """Check what a client has had of a response that broke: what the worker sent, and no end."""
    if got.answer is None or proxied.status == 502:
        return
    if sent.answer is None:
        assert exchange.harm == "damage"
        return
    had, came = got.answer.body, sent.answer.body
    # Within a Content-Length an error event could be taken for the rest: the missing bytes tell.
    if is_stream and not got.answer.all(b"content-length"):
        event = ERROR_EVENT.search(had)
        assert event, f"no error event: {had[-200:]!r}"
        had = had[: event.start()]
        assert not had or ENDS_EVENT.search(had), f"the error event is a part of another: {had[-200:]!r}"
    if exchange.usage_is_added and not came.startswith(had):
        came = USAGE_EVENT.sub(b"", came)
    assert came.startswith(had), f"not what the worker sent: {had[-200:]!r}"
    # Damage, or a reset, may take with it what came in the same read.
    if exchange.harm == "cut" and exchange.end == "close":
        missing = came[len(had) :]
        if is_stream:
            # A CR may be half of a line end.
            whole = BLANK_LINE.search(missing.removesuffix(b"\r"))
            assert not whole or (exchange.usage_is_added and b'"usage"' in missing), f"missing: {missing!r}"
        else:
            assert not missing, f"{len(missing)} bytes are missing"


def check_heads(exchange, direct, proxied):
    # No reason phrase may hold control characters, so the proxy takes them out.
    reason = re.sub(r"[\x00-\x08\x0a-\x1f\x7f]", "", direct.reason)
    assert (proxied.status, proxied.reason) == (direct.status, reason)
    may_lose_length = exchange.usage_is_added
    wanted = end_to_end(direct.fields, FRAMING)
    assert end_to_end(proxied.fields, FRAMING) == wanted, f"{proxied.fields} for {direct.fields}"
    length, proxied_length = (
        [v for n, v in seen.fields if n.lower() in FRAMING] for seen in (direct, proxied)
    )
    assert proxied_length == length or (may_lose_length and not proxied_length)
    ids = [v for n, v in direct.fields if n.lower() in ADDED]
    proxied_ids = [v for n, v in proxied.fields if n.lower() in ADDED]
    assert proxied_ids == ids or (not ids and len(proxied_ids) == 1)
    hops = {name.lower(): value for name, value in proxied.fields if name.lower() in HOP_BY_HOP}
    assert hops.pop(b"transfer-encoding", b"chunked") == b"chunked"
    assert hops.pop(b"connection", b"close") in {b"close", b"keep-alive"}
    assert not hops, f"fields of the worker's connection: {hops}"
    named = {name for name, _ in direct.fields} - {name for name, _ in end_to_end(direct.fields)}
    assert not {n for n, _ in proxied.fields if n.lower() not in HOP_BY_HOP | ADDED} & named


def is_same_body(exchange, body, proxied, *, is_stream):
    """Tell whether the body is ``body``, without the report of usage that only the proxy asked for."""
    hidden = USAGE_EVENT.sub(b"", body) if is_stream and exchange.usage_is_added else body
    if exchange.harm == "damage":
        # A damaged report may be none any more.
        return proxied.body in {hidden, body}
    return proxied.body == (body if exchange.reports_to_all else hidden)


def check_wire(exchange, direct, got):
    """Check what aiohttp's client does not show: early hints, trailers, framing, and that nothing follows."""
    assert got.whole, "aiohttp understood it, but it is not right"
    assert not got.rest
    if exchange.http10:
        assert got.answer.framing != "chunked"
        return
    assert got.interim == direct.interim
    # What cannot be read strictly has no framing to compare.
    if not direct.whole:
        return
    assert got.answer.trailers == direct.answer.trailers
    same = {"close": "chunked"}.get(direct.answer.framing, direct.answer.framing)
    assert got.answer.framing in {same, "chunked" if exchange.usage_is_added else same}
