"""Requests and responses of a scenario as bytes, and what of them must arrive. Pure."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

from tests.simulation.actions import Answer, Ask

NAME = b"x-sim"
"""The field that says which request this is, and in a response also which attempt."""

RANK = b"x-data-parallel-rank"
"""The field that says which of several workers behind one port it is: no client's business."""

BATCH = b"x-batch-id"
"""The field that says which closed batch a request is of: the proxy's business, and no worker's."""

PATHS = {
    "chat": "/v1/chat/completions",
    "completion": "/v1/completions",
    "embedding": "/v1/embeddings",
    "upload": "/v1/audio/transcriptions",
    "upgrade": "/v1/realtime",
}
PAGES = ("/health", "/ready", "/metrics", "/v1/models", "/v1/models/a")
BAD = (
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40),
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 18446744073709551616\r\n\r\n{}",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n{}",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 7\r\n\r\n[1, 2}]",
    b'POST /v1/chat/completions HTTP/1.1\r\nHost: h\r\nContent-Length: 13\r\n\r\n{"model": 17}',
)
_STATUS = {"refusal": 503, "error": 500, "bad-request": 400, "error-event": 500}
OTHERS = "of another"
"""The engine and the host that clients name which say themselves where their KV is."""

_CHUNK_BYTES = 65_536


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def request_body(ask: Ask) -> bytes:
    """Return the body of a request."""
    if ask.kind == "upload":
        head = b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n' % ask.model.encode()
        head += b'--B\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
        return head + random.Random(ask.id).randbytes(ask.prompt) + b"\r\n--B--\r\n"
    if ask.kind in {"page", "upgrade"} or ask.method != "POST":
        return b""
    document: dict[str, object] = {"model": ask.model}
    text = "word " * (ask.prompt // 5)
    if ask.kind == "chat":
        document["messages"] = [{"role": "user", "content": text}]
    elif ask.kind == "embedding":
        document["input"] = text
    else:
        document["prompt"] = [1] * ask.prompt if ask.token_ids else text
    if ask.stream:
        document["stream"] = True
    if ask.own_usage:
        document["stream_options"] = {"include_usage": True}
    if ask.max_tokens is not None:
        document["max_tokens"] = ask.max_tokens
    if ask.choices is not None:
        document["n"] = ask.choices
    return json.dumps(document | _of_legs(ask)).encode()


def _of_legs(ask: Ask) -> dict[str, object]:
    """Return what a request says that is about prefill and decode apart."""
    said: dict[str, object] = {}
    if ask.own_handles:
        said["kv_transfer_params"] = {"do_remote_prefill": True, "remote_engine_id": OTHERS}
        said["bootstrap_host"] = OTHERS
    if ask.unsplit:
        said |= {ask.unsplit: 1} | ({"logprobs": 1} if ask.unsplit == "echo" else {})
    return said


def path(ask: Ask) -> str:
    return PAGES[ask.id % len(PAGES)] if ask.kind == "page" else PATHS[ask.kind]


def request(ask: Ask) -> bytes:
    """Return a request as it is sent."""
    if ask.kind == "bad":
        return BAD[ask.id % len(BAD)]
    body = request_body(ask)
    lines = [f"{ask.method} {path(ask)} HTTP/{'1.0' if ask.http10 else '1.1'}", "Host: proxy"]
    lines += _named(ask)
    if ask.kind == "upgrade":
        lines += ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
    elif ask.closes:
        lines.append("Connection: close")
    elif ask.http10:
        lines.append("Connection: keep-alive")
    if body:
        lines.append(
            "Content-Type: "
            + ("multipart/form-data; boundary=B" if ask.kind == "upload" else "application/json")
        )
    if ask.chunked:
        lines.append("Transfer-Encoding: chunked")
        pieces = [body[i : i + _CHUNK_BYTES] for i in range(0, len(body), _CHUNK_BYTES)]
        body = b"".join(map(chunk, pieces)) + b"0\r\n\r\n"
    elif ask.method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _named(ask: Ask) -> list[str]:
    """Return the fields that say which request it is, and of what."""
    lines = [f"{NAME.decode()}: {ask.id}"]
    if ask.request_id:
        lines.append(f"X-Request-Id: {ask.request_id}")
    if ask.batch:
        lines.append(f"{BATCH.decode()}: {ask.batch}")
    if ask.id % 3 == 0:
        lines.append("X-Data-Parallel-Rank: 0")
    return lines


@dataclass(frozen=True)
class Response:
    """A worker's answer: ``pieces`` to send, and what is right for a client to see of it.

    ``bodies``: the body, in one of these ways, or the beginning of one; whole only where ``is_whole``: the
    answer has an end, and a worker that has sent all of it has sent that. ``is_refusal``: another worker may
    be asked. ``is_http``: what a client may see at all.
    """

    status: int
    pieces: tuple[bytes, ...]
    bodies: tuple[bytes, ...]
    is_whole: bool = True
    is_stream: bool = False
    is_refusal: bool = False
    is_http: bool = True
    closes: bool = False


def respond(
    ask: Ask, answer: Answer, attempt: int, *, asked_usage: bool, handles: bytes | None = None
) -> Response:
    """Return what ``answer`` is for this attempt; ``asked_usage``: the request asked for a usage event.

    ``handles``: what a reply says of how its KV is fetched.
    """
    if answer.kind == "garbage":
        rng = random.Random(ask.id * 1000 + attempt)
        return Response(0, (rng.randbytes(rng.choice((1, 50, 5000))),), (b"",), is_http=False, closes=True)
    if ask.kind == "upgrade" and answer.kind == "answer":
        head = b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n%b: %d.%d\r\n\r\n"
        return Response(101, (head % (NAME, ask.id, attempt), b"hello "), (b"hello ",), closes=True)
    is_stream = ask.stream and answer.kind in {"answer", "refusal-event", "error-event", "garbage-body"}
    if is_stream:
        events = _events(ask, answer, attempt, asked_usage=asked_usage)
        status, media_type = 200, b"text/event-stream"
    else:
        events = [_reply(ask, answer, attempt, handles)]
        status = _STATUS.get(answer.kind, 200)
        media_type = b"application/json"
    bodies = [b"".join(events)]
    if is_stream and asked_usage and not ask.own_usage:
        # The event that only the proxy asked for, and that is its to take out.
        bodies.append(b"".join(event for event in events if b'"choices":[],"usage"' not in event))
    head = b"HTTP/1.1 %d Said\r\nContent-Type: %b\r\n%b: %d.%d\r\n" % (
        status,
        media_type,
        NAME,
        ask.id,
        attempt,
    )
    pieces, is_whole = _framed(ask, answer, events)
    head += pieces.pop(0)
    if answer.interim:
        head = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + head
    return Response(
        status,
        (head, *pieces),
        tuple(bodies),
        is_whole,
        is_stream,
        is_refusal=status == 503 or (is_stream and answer.kind == "refusal-event"),
        closes=answer.framing == "close" or answer.extra or not is_whole or answer.ending == "close",
    )


def _framed(ask: Ask, answer: Answer, parts: list[bytes]) -> tuple[list[bytes], bool]:
    """Return the head's last lines and the body in pieces, and whether that has a proper end."""
    closing = b"Connection: close\r\n" if answer.ending == "close" and answer.stop_at is None else b""
    total = sum(map(len, parts))
    if ask.method == "HEAD":
        return [closing + b"Content-Length: %d\r\n\r\n" % total], True
    if answer.length_said is not None:
        return [b"Content-Length: %d\r\n\r\n" % answer.length_said, *parts], False
    if answer.framing == "close":
        # Where its end is nobody can tell, but of a stream that says it.
        return [b"Connection: close\r\n\r\n", *parts], answer.done or not ask.stream
    # No response: one might come when the connection has the next request on it, and would be its answer.
    extra = [b"unasked for\r\n\r\n"] if answer.extra else []
    if answer.framing == "length" and answer.kind != "garbage-body":
        return [closing + b"Content-Length: %d\r\n\r\n" % total, *parts, *extra], True
    end = b"0\r\n\r\n"
    if answer.kind == "garbage-body":
        parts, end = parts[: len(parts) // 2], b"no chunk at all\r\n\r\n"
    framing = closing + b"Transfer-Encoding: chunked\r\n\r\n"
    return [framing, *map(chunk, parts), end, *extra], answer.kind != "garbage-body"


def _events(ask: Ask, answer: Answer, attempt: int, *, asked_usage: bool) -> list[bytes]:
    if answer.kind in {"refusal-event", "error-event"}:
        code = 503 if answer.kind == "refusal-event" else 500
        return [b'data: {"error":{"message":"full","code":%d}}\n\n' % code, b"data: [DONE]\n\n"]
    key = b'"delta":{"content":"%b"}' if ask.kind == "chat" else b'"text":"%b"'
    event = b'data: {"id":"%d.%d","choices":[{"index":0,%b}]}\n\n'
    padding = b"-" * answer.padding
    events = [
        event % (ask.id, attempt, key % (b"%d.%d.%d %b" % (ask.id, attempt, k, padding)))
        for k in range(answer.tokens)
    ]
    if answer.usage is not None and asked_usage:
        events.append(b'data: {"id":"%d","choices":[],"usage":%b}\n\n' % (ask.id, _usage(answer)))
    if answer.done:
        events.append(b"data: [DONE]\n\n")
    return events


def _reply(ask: Ask, answer: Answer, attempt: int, handles: bytes | None) -> bytes:
    usage = b',"usage":' + _usage(answer) if answer.usage is not None else b""
    text = (b"%d.%d " % (ask.id, attempt) + b"-" * answer.padding) * answer.tokens
    more = b"" if handles is None else b',"kv_transfer_params":' + handles
    return b'{"object":"answer","text":"%b"%b%b}' % (text, usage, more)


def _usage(answer: Answer) -> bytes:
    prompt, output = answer.usage or (0, 0)
    return b'{"prompt_tokens":%d,"completion_tokens":%d}' % (prompt, output)
