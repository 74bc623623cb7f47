"""What the load client notices."""

import orjson
import pytest

from loadgen.client import EVENT_BYTES_MAX, Failure
from loadgen.dataplane.check import PlainCheck, StreamCheck, Tally, WrongAnswerError
from loadgen.dataplane.tokens import LAST_CHUNK, TokenStream, chunk, number, stamp
from loadgen.emulator.wire import GenerationRequest

TOKENS = 6
HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def stream_chunks(tokens, sent_s=1.0, request_id="a"):
    """Return the head of a streamed answer and its chunks, one for each token."""
    request = GenerationRequest(True, "mock-model", True, True, False, 3, tokens, True)
    stream, time = TokenStream(request, request_id * 32, 1), stamp(sent_s)
    plain = [stream.head + number(i) + time + TokenStream.TAIL for i in range(tokens - 1)]
    return [HEAD, stream.opening(), *plain, stream.last(time)]


def as_chunk(text):
    return chunk(b"data: " + text + b"\n\n")


def check(parts, tokens=TOKENS, closed=False):
    """Feed a streamed answer; returns whether it is over, and what was counted."""
    tally = Tally()
    stream = StreamCheck(tokens, tally, 0.5)
    over = False
    for part in parts:
        over = stream.feed(part, 1.25)
    if closed:
        stream.closed(1.25)
    return over, tally


def refused(parts, failure, words, **options):
    with pytest.raises(WrongAnswerError, match=words) as caught:
        check(parts, **options)
    assert caught.value.failure is failure


def pieces(data, size):
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("size", [1, 2, 100, 251, 500, 10_000])
@pytest.mark.parametrize("tokens", [1, 2, TOKENS])
def test_a_good_stream_however_it_is_cut(size, tokens):
    over, tally = check(pieces(b"".join(stream_chunks(tokens)), size), tokens)
    assert over
    assert tally.delays_s.tolist() == [0.25] * tokens
    assert (tally.first_s.tolist(), tally.gaps_s.tolist()) == ([0.75], [0.0] * (tokens - 1))
    assert tally.whole_s.tolist() == [0.75]


def test_events_may_share_a_chunk_or_span_two():
    events = b"".join(part.partition(b"\r\n")[2][:-2] for part in stream_chunks(TOKENS)[1:-1])
    last = stream_chunks(TOKENS)[-1]
    assert check([HEAD, chunk(events), last])[0]
    assert check([HEAD, chunk(events[:700]), chunk(events[700:]), last])[0]
    assert check([HEAD, chunk(b": hello\n\n"), *stream_chunks(TOKENS)[1:]])[0]


def test_a_stream_may_end_with_the_connection():
    body = b"".join(part.partition(b"\r\n")[2][:-2] for part in stream_chunks(2)[1:-1])
    closing = stream_chunks(2)[-1].removesuffix(LAST_CHUNK).replace(b"\n\n\r\n", b"\n\n")
    last = b"".join(line + b"\n\n" for line in closing.split(b"\n\n")[:-1])
    events = [event[event.index(b"data:") :] for event in last.split(b"\n\n")[:-1]]
    text = b"HTTP/1.0 200 OK\r\n\r\n" + body + b"".join(event + b"\n\n" for event in events)
    over, tally = check([text], 2, closed=True)
    assert (over, len(tally.whole_s)) == (False, 1)


# Both ways of reading have to notice: the parser until the first token has come, the comparison after it.
@pytest.mark.parametrize("at", [2, 4])
@pytest.mark.parametrize("whole", [True, False])
class TestMistakes:
    def test_a_missing_event(self, at, whole):
        parts = stream_chunks(TOKENS)
        del parts[at]
        self.refused(parts, whole, Failure.OUT_OF_ORDER, f"token {at - 1} where {at - 2} was due")

    def test_a_wrong_order(self, at, whole):
        parts = stream_chunks(TOKENS)
        parts[at], parts[at + 1] = parts[at + 1], parts[at]
        self.refused(parts, whole, Failure.OUT_OF_ORDER, f"token {at - 1} where {at - 2} was due")

    def test_an_event_twice(self, at, whole):
        parts = stream_chunks(TOKENS)
        parts.insert(at, parts[at])
        self.refused(parts, whole, Failure.OUT_OF_ORDER, f"token {at - 2} where {at - 1} was due")

    def test_another_bodys_bytes(self, at, whole):
        parts = stream_chunks(TOKENS)
        parts[at] = chunk(b"HTTP/1.1 no\n\n")
        self.refused(parts, whole, Failure.OUT_OF_ORDER, "no event is due, got b'HTTP/1.1 no'")

    def test_a_damaged_token(self, at, whole):
        parts = stream_chunks(TOKENS)
        parts[at] = parts[at].replace(b"0001000000", b"00010x0000")
        self.refused(parts, whole, Failure.OUT_OF_ORDER, f"token {at - 1} where {at - 2} was due")

    def test_an_error(self, at, whole):
        parts = stream_chunks(TOKENS)
        parts.insert(at, as_chunk(b'{"error":{"message":"no"}}'))
        self.refused(parts, whole, Failure.ERROR_EVENT, "no")

    def test_a_broken_chunk(self, at, whole):
        parts = stream_chunks(TOKENS)
        parts[at] = parts[at][:-2] + b"xx" + parts[at][-2:]
        self.refused(parts, whole, Failure.INCOMPLETE, "where a chunk ends")

    def test_the_end_of_the_connection(self, at, whole):
        parts = stream_chunks(TOKENS)[:at]
        words = "the connection ended before the message"
        self.refused(parts, whole, Failure.INCOMPLETE, words, closed=True)

    def refused(self, parts, whole, *expected, **options):
        refused([b"".join(parts)] if whole else parts, *expected, **options)


def test_too_few_and_too_many_tokens():
    refused(stream_chunks(TOKENS), Failure.INCOMPLETE, "6 of 7 tokens, with", tokens=7)
    refused(stream_chunks(TOKENS), Failure.INCOMPLETE, "6 of 5 tokens, with", tokens=5)


def test_an_unclean_end():
    parts = stream_chunks(TOKENS)
    done = as_chunk(b"[DONE]")
    refused([*parts[:-1], parts[-1].replace(done, b"")], Failure.INCOMPLETE, "6 of 6 tokens, without")
    refused([*parts[:-1], parts[-1].replace(done, done * 2)], Failure.OUT_OF_ORDER, "no event is due")
    unclean = [*parts[:-1], parts[-1].removesuffix(LAST_CHUNK)]
    refused(unclean, Failure.INCOMPLETE, "ended before the message", closed=True)


def test_an_event_without_an_end():
    refused([HEAD, chunk(b"x" * (EVENT_BYTES_MAX + 1))], Failure.INCOMPLETE, "an event of more than")


@pytest.mark.parametrize(
    ("status", "failure"),
    [(b"503 Busy", Failure.REFUSED_503), (b"404 -", Failure.HTTP_4XX), (b"", Failure.HTTP_5XX)],
)
@pytest.mark.parametrize("kind", [StreamCheck, PlainCheck])
def test_another_status(status, failure, kind):
    with pytest.raises(WrongAnswerError, match="status") as caught:
        kind(1, Tally(), 0.0).feed(b"HTTP/1.1 " + status + b"\r\nContent-Length: 4\r\n\r\nbusy", 1.0)
    assert caught.value.failure is failure
    assert caught.value.detail.endswith("busy")


def plain(body, claimed=None):
    tally = Tally()
    size = len(body) if claimed is None else claimed
    answer = PlainCheck(3, tally, 0.5)
    assert answer.feed(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + body, 0.75)
    return tally


def test_plain_answers():
    assert plain(orjson.dumps({"usage": {"completion_tokens": 3}})).whole_s.tolist() == [0.25]
    for body in (b"{}", b"[]", b"no", orjson.dumps({"usage": {"completion_tokens": 4}})):
        with pytest.raises(WrongAnswerError, match="not the answer"):
            plain(body)
    with pytest.raises(WrongAnswerError, match="a document of more than"):
        plain(b"x" * (EVENT_BYTES_MAX + 1))
