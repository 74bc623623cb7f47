"""The reader of responses that other tests judge by."""

from hypothesis import given
from hypothesis import strategies as st

from tests.brproxy.wire import AnswerReader, WireError, as_chunk, read_answer

HEADS = [
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n",
    b"HTTP/1.0 200 OK\r\n\r\n",
    b"HTTP/1.1 204 None\r\n\r\n",
]
PAYLOAD = st.text("a0;\r\n", min_size=1, max_size=20).map(str.encode)
END = st.sampled_from(
    [b"0\r\n\r\n", b"0;x\r\nA: b\r\nC: d\r\n\r\nbehind it", b"0\r\nno field\r\n\r\n", b"x\r\n", b""]
)


@st.composite
def responses(draw):
    """Draw bytes that are a response, or nearly, and places to cut them at."""
    body = b"".join(map(as_chunk, draw(st.lists(PAYLOAD, max_size=4)))) + draw(END)
    raw = draw(st.sampled_from(HEADS)) + body
    raw = raw[: draw(st.integers(0, len(raw)) | st.just(len(raw)))]
    return raw, sorted(draw(st.sets(st.integers(0, len(raw)), max_size=6)))


def outcome(read, raw, **named):
    try:
        answer, rest = read(raw, **named)
    except WireError as error:
        return str(error), error.answer
    return answer, bytes(rest)


@given(responses(), st.booleans())
def test_read_as_it_comes_a_response_is_what_it_is_when_read_at_once(drawn, closed):
    raw, cuts = drawn
    reader = AnswerReader()
    for cut in cuts:
        read = outcome(reader.read, bytearray(raw[:cut]))
        assert read == outcome(read_answer, raw[:cut])
        if read[0] is not None:
            return
    assert outcome(reader.read, bytearray(raw), closed=closed) == outcome(read_answer, raw, closed=closed)


def test_what_is_read_is_all_that_a_response_says():
    body, trailers = as_chunk(b"one") + as_chunk(b"two;\r\n"), b"0\r\nA: b\r\n\r\n"
    answer, rest = read_answer(HEADS[0] + body + trailers + b"behind it")
    assert (answer.body, answer.framing, answer.chunks) == (b"onetwo;\r\n", "chunked", [3, 6])
    assert (answer.trailers, rest) == ([(b"A", b"b")], b"behind it")
