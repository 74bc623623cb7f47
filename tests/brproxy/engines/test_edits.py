"""Members set and taken out by their places, held against the parser."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.edits import elements, read_object
from brproxy.engines.rewrite import MEMBERS_MAX
from tests.brproxy.engines.json_members import objects, others_keep_their_bytes, top_level, written_values

NAMES = ("stream", "n", "a")
documents = objects(st.lists(st.tuples(st.sampled_from([*NAMES, "é", 'q"', ""]), written_values), max_size=7))


@given(
    document=documents,
    new=st.dictionaries(st.sampled_from(NAMES), st.sampled_from([b"1", b"{}", b'",}"']), max_size=3),
    without=st.sets(st.sampled_from(NAMES)),
)
def test_what_is_meant_is_changed_and_no_other_byte(document, new, without):
    body, written = document
    edited = read_object(body).edited(new, without)
    others_keep_their_bytes(edited, written, {*new, *without})
    changed = [pair for pair in top_level(edited) if pair[0] in {*new, *without}]
    assert changed == [(name, json.loads(value)) for name, value in new.items()]


@given(document=documents)
def test_nothing_changed_is_the_same_bytes(document):
    body, _ = document
    assert read_object(body).edited({}) == body


@given(document=documents, name=st.sampled_from(NAMES))
def test_of_several_of_one_name_the_last_is_read(document, name):
    body, _ = document
    read, parsed = read_object(body), json.loads(body)
    assert (name in read) == (name in parsed)
    if name in parsed:
        assert repr(json.loads(read.value(name))) == repr(parsed[name])


def test_a_body_with_more_members_than_are_known_is_not_edited():
    def body(count):
        return b"{" + b",".join(b'"a":1' for _ in range(count)) + b"}"

    assert read_object(body(MEMBERS_MAX - 1)).edited({}, ("a",)) == b"{}"
    assert read_object(body(MEMBERS_MAX)) is None


@pytest.mark.parametrize("body", [b"", b"[]", b"null", b'{"a":1', '{"a":1}'.encode("utf-16")])
def test_what_is_no_object_in_utf8(body):
    assert read_object(body) is None


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (b'["a"]', 1),
        (b'[ "a,b" , "c]" ]', 2),
        (b"[[1,2],[3]]", 2),
        (b"[1,2,3]", None),
        (b"[]", None),
        (b'"[a"', None),
        (b"null", None),
        (b'["a","b","c","d","e","f"]', 5),
    ],
)
def test_elements_of_a_list_of_prompts(value, count):
    assert elements(value, 5) == count
