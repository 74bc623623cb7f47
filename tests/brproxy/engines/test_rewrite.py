"""Top-level members found without a parser, held against the parser."""

import json
import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from brproxy.engines import rewrite
from brproxy.engines.rewrite import insert_member, members

texts = st.text(st.characters(exclude_categories=[]), max_size=12) | st.sampled_from(
    ['"', "\\", '\\"', "\\\\", "{", "}]", ",", ":", '","model":"x', "\ud800", "é", "\n"]
)
numbers = (
    st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e308])
)
values = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)
spaces = st.text(" \t\r\n", max_size=3)
# Made once: to make a strategy takes longer than to draw from it.
members_drawn = st.lists(st.tuples(texts, values), max_size=6)
indents = st.sampled_from([None, 1])
marks = st.sampled_from([b"", b"\xef\xbb\xbf"])


@st.composite
def documents(draw):
    """Return an object's bytes and its members in order, as json reads them."""
    ascii_only = draw(st.booleans())
    pairs = draw(members_drawn)

    def dump(value):
        indent = draw(indents)
        return json.dumps(value, ensure_ascii=ascii_only, indent=indent)

    def around(text):
        return draw(spaces) + text + draw(spaces)

    inside = ",".join(around(dump(key)) + ":" + around(dump(value)) for key, value in pairs)
    text = draw(spaces) + "{" + (inside or draw(spaces)) + "}" + draw(spaces)
    return draw(marks) + text.encode("utf-8", "surrogatepass"), pairs


@given(document=documents())
def test_members_are_what_a_parser_finds(document):
    body, pairs = document
    assert as_read(body, members(body)) == repr(pairs)
    for block_bytes in (1, 2, 3, 7, 1 << 16):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rewrite, "BLOCK_BYTES", block_bytes)
            patch.setattr(rewrite, "TOKENS_BYTES_MAX", -1)
            found = members(body)
        assert as_read(body, found) == repr(pairs), block_bytes


def as_read(body, found):
    """Return what members are as json reads them, as text: what is no number is unequal to itself."""
    read = [
        tuple(
            json.loads(part.decode("utf-8", "surrogatepass"))
            for part in (b'"' + member.key + b'"', body[member.start : member.end])
        )
        for member in found
    ]
    return repr(read)


ANYTHING = st.text('{}[]",:\\ a\n1', max_size=40).map(str.encode) | st.binary(max_size=80)


@given(body=ANYTHING | documents().map(lambda document: document[0]))
@example(body=b'{\\":')
@example(body=b'{\\\\":"')
def test_tokens_and_blocks_show_the_same(body):
    opening = max(body.find(b"{"), 0)
    if body[opening : opening + 1] == b"{":
        assert list(rewrite._by_tokens(body, opening)) == list(rewrite._by_blocks(body, opening))


@given(body=ANYTHING | documents().map(lambda document: document[0]))
def test_ordinary_members_are_what_the_scan_finds(body):
    opening = rewrite.object_start(body)
    found = None if opening is None else rewrite._ordinary(body, opening + 1)
    if found is not None:
        assert found == rewrite._scanned(body, opening)


@given(depth=st.integers(0, 12))
def test_deep_members_are_found_too(depth):
    body = b'{"a":' + b"[" * depth + b"1" + b"]" * depth + b',"model":"m"}'
    assert [member.key for member in members(body)] == [b"a", b"model"]


@given(body=st.binary(max_size=80) | st.text('{}[]",:\\ a\n1', max_size=40).map(str.encode))
def test_whatever_comes_is_read_without_an_error(body):
    for member in members(body) or []:
        assert 0 < member.start <= member.end < len(body)


def test_what_is_no_object():
    for body in (
        b"",
        b" ",
        b"[]",
        b'"{}"',
        b"x{}",
        b'{"a":1',
        b'{"a"',
        b"{a:1}",
        b'{"a":1,}',
        b"{,}",
        b'{"a":"}',
    ):
        assert members(body) is None, body


def test_what_stands_behind_the_object_is_not_looked_at():
    assert [member.key for member in members(b'{"a":1} {"b":2}')] == [b"a"]


MIB = 1 << 20
ADVERSARIES = {
    "lists": b'{"prompt":[' + b"[]," * (MIB // 3) + b'[]],"model":"m"}',
    "objects": b'{"prompt":[' + b'{"a":1},' * (MIB // 8) + b'0],"model":"m"}',
    "depth": b'{"prompt":' + b"[" * (MIB // 2) + b"]" * (MIB // 2) + b',"model":"m"}',
    "quotes": b'{"prompt":[' + b'"",' * (MIB // 3) + b'""],"model":"m"}',
    "backslashes": b'{"prompt":"' + b"\\" * MIB + b'","model":"m"}',
    "escapes": b'{"prompt":"' + b'\\"' * (MIB // 2) + b'","model":"m"}',
    "whitespace": b'{"prompt":' + b" " * MIB + b'1,"model":"m"}',
    "data": b'{"prompt":"' + b"A" * MIB + b'","model":"m"}',
}


@pytest.mark.parametrize("body", ADVERSARIES.values(), ids=ADVERSARIES)
def test_no_document_buys_memory_or_steps(body, steps_of):
    members(body)
    tracemalloc.start()
    found = members(body)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [member.key for member in found] == [b"prompt", b"model"]
    # The arrays of one block, whatever is in it.
    assert peak_bytes < 64 * rewrite.BLOCK_BYTES
    # Lines of Python: some hundred for each block.
    assert steps_of(lambda: members(body)) < 200 * (len(body) // rewrite.BLOCK_BYTES + 2)


def test_members_are_noted_up_to_a_limit(steps_of):
    body = b"{" + b'"a":1,' * (MIB // 6) + b'"model":"m"}'
    assert len(members(body)) == rewrite.MEMBERS_MAX
    assert steps_of(lambda: members(body)) < 30 * rewrite.MEMBERS_MAX


@given(document=documents())
def test_inserting_leaves_every_other_byte(document):
    body, pairs = document
    if not pairs:
        return
    inserted = insert_member(body, b'"new":[1]')
    assert inserted.replace(b'"new":[1],', b"", 1) == body
    assert [member.key for member in members(inserted)] == [b"new"] + [member.key for member in members(body)]
