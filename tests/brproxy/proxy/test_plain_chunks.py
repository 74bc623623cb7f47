"""Whole chunks of plain events, counted without a parser: the same as reading them one by one."""

from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.plain import PlainEvent
from brproxy.proxy.plain_chunks import plain_chunk_taker
from brproxy.relay.framing import ONE_CHUNK_BYTES_MAX
from tests.brproxy.engines.test_plain import EVENTS, chunk_event
from tests.brproxy.wire import as_chunk

PLAIN = PlainEvent.learn(chunk_event("x"))
LEARNT = st.sampled_from(["", "a", " two words", "ff\r\n", "1" * 300]).map(chunk_event)
PAYLOADS = st.one_of(
    LEARNT, LEARNT, LEARNT, EVENTS, st.just(b": ping\n\n"), st.tuples(LEARNT, LEARNT).map(b"".join)
)


def count(data):
    taken = []
    took = plain_chunk_taker(PLAIN, lambda *call: taken.append(call))(data)
    assert [of for of, _ in taken] == ([data] if took else [])
    return sum(chunks for _, chunks in taken)


def one_by_one(data):
    """Return how many chunks ``data`` is if each has the usual size line and one plain event, else 0."""
    chunks = 0
    while data:
        line, found, rest = data.partition(b"\r\n")
        try:
            size = int(line, 16)
        except ValueError:
            return 0
        payload = rest[:size]
        if not found or not PLAIN.matches(payload) or not data.startswith(as_chunk(payload)):
            return 0
        data = data[len(as_chunk(payload)) :]
        chunks += 1
    return chunks


@given(st.lists(PAYLOADS, min_size=1, max_size=4))
def test_whole_chunks_are_counted_as_one_by_one(payloads):
    data = b"".join(map(as_chunk, payloads))
    assert count(data) == one_by_one(data) == (len(payloads) if all(map(PLAIN.matches, payloads)) else 0)


@given(st.lists(LEARNT, min_size=1, max_size=3), st.data())
def test_whatever_else_a_read_holds_is_left_to_the_parser(payloads, draw):
    data = b"".join(map(as_chunk, payloads))
    at = draw.draw(st.integers(0, len(data)))
    dropped = draw.draw(st.integers(0, 3))
    inserted = draw.draw(st.sampled_from([b"", b"0", b"\n", b"\r\n", b'"', b"0\r\n\r\n", b"\0", b"x"]))
    data = data[:at] + inserted + data[at + dropped :]
    assert count(data) == one_by_one(data)


def test_only_a_large_chunk_is_left_to_the_parser():
    largest = chunk_event("x" * (ONE_CHUNK_BYTES_MAX - len(as_chunk(chunk_event("x" * 4000))) + 4000))
    assert len(as_chunk(largest)) == ONE_CHUNK_BYTES_MAX
    assert count(as_chunk(largest) * 3) == 3, "a read of several may be larger"
    assert count(as_chunk(largest.replace(b"x", b"xx", 1))) == 0
