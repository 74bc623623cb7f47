"""The ordinary event of a stream, recognised without parsing it."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.dialect import PLAIN_TOKENS
from brproxy.engines.dialects.openai import OpenAIDialect
from brproxy.engines.plain import PlainEvent

DIALECT = OpenAIDialect()
TEXTS = st.text(max_size=12) | st.sampled_from(
    ['say "hi"', "back\\slash", "data: x", "\n\ndata: {}", "ünï", '"usage":{', '"error":1', "[DONE]", ""]
)


def chunk_event(text, *, key="content", finish=None, extra=None, ascii_only=True):
    choice = {"index": 0, "delta": {key: text}, "finish_reason": finish}
    document = {"id": "chatcmpl-1", "choices": [choice]} | (extra or {})
    encoded = json.dumps(document, ensure_ascii=ascii_only, separators=(",", ":")).encode(
        "utf-8", "surrogatepass"
    )
    return b"data: " + encoded + b"\n\n"


def exactly(raw):
    """Return what reading each of the events says."""
    return [DIALECT.read_event(event.removeprefix(b"data: ")) for event in raw[:-2].split(b"\n\n")]


EVENTS = st.builds(
    chunk_event,
    TEXTS,
    key=st.sampled_from(["content", "reasoning_content"]),
    finish=st.sampled_from([None, None, "length"]),
    extra=st.sampled_from(
        [
            None,
            None,
            {"usage": {"completion_tokens": 1}},
            {"usage": None},
            {"error": {"code": 503}},
            {"type": "x"},
        ]
    ),
    ascii_only=st.booleans(),
)


@given(EVENTS, st.lists(EVENTS, min_size=1, max_size=4))
def test_what_is_counted_as_plain_is_plain_when_read_exactly(learnt_from, events):
    pattern = PlainEvent.learn(learnt_from)
    if pattern is None or exactly(learnt_from) != [PLAIN_TOKENS]:
        return
    raw = b"".join(events)
    counted = pattern.count(raw)
    if counted:
        assert exactly(raw) == [PLAIN_TOKENS] * counted


@given(
    TEXTS,
    st.lists(st.text(st.characters(exclude_characters='"\\', exclude_categories=["Cc", "Cs"])), max_size=5),
)
def test_events_that_differ_in_their_text_are_plain(first, texts):
    pattern = PlainEvent.learn(chunk_event(first, ascii_only=False))
    if pattern is not None and texts:
        assert pattern.count(b"".join(chunk_event(text, ascii_only=False) for text in texts)) == len(texts)


@pytest.mark.parametrize(
    "raw",
    [
        chunk_event("x", finish="length"),
        chunk_event('a "quoted" word'),
        chunk_event("x", extra={"usage": {"prompt_tokens": 1}}),
        chunk_event("x")[:-1],
        chunk_event("x")[1:],
        chunk_event("x") + b"data: [DONE]\n\n",
        chunk_event("x") + chunk_event("y")[:-5],
        b"data: [DONE]\n\n",
        b"",
    ],
)
def test_anything_else_is_not(raw):
    assert PlainEvent.learn(chunk_event(" hello")).count(raw) == 0


@pytest.mark.parametrize(
    "raw", [b"data: [DONE]\n\n", b": comment\n\n", chunk_event('"'), b"", chunk_event("x")[:-1]]
)
def test_what_gives_no_pattern(raw):
    assert PlainEvent.learn(raw) is None


def test_an_event_that_is_shorter_than_its_pattern_is_no_match():
    pattern = PlainEvent.learn(b'data: {"text":"abcabc"}\n\n')
    assert not pattern.matches(b'data: {"text":"}\n\n')
    assert pattern.matches(b'data: {"text":""}\n\n')
