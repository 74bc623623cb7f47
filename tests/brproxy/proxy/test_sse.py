"""Server-sent events, split at every byte, against a reader that goes line by line."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.proxy.sse import SseSplitter, event_data

LIMIT = 1 << 20
LINE = re.compile(rb"([^\r\n]*)(\r\n|\n|\r)")

# Streams from pieces that matter: line ends of all kinds, colons, fields, JSON that mentions them.
streams = st.lists(
    st.sampled_from(
        [
            *(
                b"data: x",
                b"data:",
                b"data",
                b"data: {}",
                b": ping",
                b"event: a",
                b"id:1",
                b"datax: no",
                b"\xff",
            ),
            *(b"\n", b"\n\n", b"\r\n", b"\r", b"\r\n\r\n", b"\r\r", b"\n\r\n"),
        ]
    ),
    max_size=24,
).map(b"".join)


def reference_data(stream):
    """Return the data of every event, by the standard's own words: lines, and an empty one dispatches."""
    found, values = [], []
    for match in LINE.finditer(stream):
        line = match[1]
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                values.append(value.removeprefix(b" "))
        elif values:
            found.append(b"\n".join(values))
            values = []
    return found


def split(stream, cuts, limit=LIMIT):
    splitter = SseSplitter(limit)
    events = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        events += splitter.feed(stream[start:end])
    return events, splitter.tail


def read(events):
    return [data for data in map(event_data, events) if data is not None]


@given(streams, st.data())
def test_any_split_gives_the_same_bytes_and_data(stream, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    events, tail = split(stream, cuts)
    assert b"".join(events) + tail == stream
    # A CR at the very end may be the first half of CR LF: it has not ended anything yet.
    expected = reference_data(stream.removesuffix(b"\r"))
    assert read(events) == expected


@given(streams)
def test_byte_by_byte(stream):
    whole, whole_tail = split(stream, [])
    single, single_tail = split(stream, list(range(1, len(stream))) if stream else [])
    assert read(single) == read(whole)
    assert b"".join(single) + single_tail == b"".join(whole) + whole_tail == stream


def test_every_single_cut_of_a_real_stream():
    stream = (
        b'data: {"choices":[{"delta":{"content":"data: \\n\\n"}}]}\n\n'
        b": keep-alive\n\n"
        b'data: {"choices":[],"usage":{"completion_tokens":2}}\r\n\r\n'
        b"data: [DONE]\n\n"
    )
    expected = [
        b'{"choices":[{"delta":{"content":"data: \\n\\n"}}]}',
        None,
        b'{"choices":[],"usage":{"completion_tokens":2}}',
        b"[DONE]",
    ]
    for cut in range(len(stream) + 1):
        events, tail = split(stream, [cut])
        assert [event_data(event) for event in events] == expected, cut
        assert tail == b""


def test_a_byte_order_mark_is_not_part_of_the_first_field():
    events, _ = split(b"\xef\xbb\xbfdata: x\n\ndata: y\n\n", [])
    assert [event_data(event) for event in events] == [b"x", b"y"]


@given(streams, st.integers(1, 12), st.data())
def test_a_small_limit_loses_no_byte_and_bounds_the_buffer(stream, limit, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    splitter = SseSplitter(limit)
    out = b""
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        out += b"".join(splitter.feed(stream[start:end]))
        assert len(splitter.tail) <= limit
    assert out + splitter.tail == stream


def test_an_oversized_event_passes_unread():
    events, _ = split(b"data: " + b"x" * 50 + b"\n\ndata: y\n\n", [], limit=20)
    assert [event_data(event) for event in events] == [None, b"y"]
    events, _ = split(b"data: " + b"x" * 50 + b"\n\ndata: y\n\n", [30], limit=20)
    assert [event_data(event) for event in events] == [None, None, b"y"]


@pytest.mark.parametrize(
    ("raw", "data"),
    [
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"data:a\n\n", b"a"),
        (b"data:  a\n\n", b" a"),
        (b"data\n\n", b""),
        (b"event: x\n\n", None),
        (b"event: x\ndata: a\r\n\r\n", b"a"),
        (b"", None),
    ],
)
def test_event_data(raw, data):
    assert event_data(raw) == data
