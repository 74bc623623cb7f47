"""What a text is made of, by classes of its bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.text import COUNTED_BYTES_MAX, bytes_of, counts_like, joined, text_counts
from brproxy.types import NO_TEXT

any_text = st.text(st.characters(exclude_categories=[]), max_size=200)


def class_of(character):
    size = len(character.encode("utf-8", "surrogatepass"))
    if size > 1:
        return 5 if size == 3 else 4
    if character.isalpha():
        return 0
    return 1 if character == " " else 2 if character.isdigit() else 3


@given(any_text | st.text(st.characters(max_codepoint=127), max_size=200), st.integers(0, 3))
def test_each_byte_is_of_one_class(text, messages):
    expected = [0] * 6
    for character in text:
        expected[class_of(character)] += len(character.encode("utf-8", "surrogatepass"))
    assert text_counts(text, messages) == (*expected, messages, int(messages > 0))


@given(any_text.filter(bool), st.integers(1, 50))
def test_of_a_long_text_all_bytes_are_counted_as_some(text, times):
    text = text * (times * COUNTED_BYTES_MAX // len(text.encode("utf-8", "surrogatepass")) + 1)
    counts = text_counts(text, 0)
    assert min(counts) >= 0
    assert bytes_of(counts) == len(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("characters", ["x1. ", "中文x ", "éя😀 x"])
def test_a_long_text_is_made_of_what_its_windows_are(characters):
    text = "".join(character * 40_000 for character in characters)
    counts, exact = text_counts(text, 1), text_counts(characters, 1)
    for count, part in zip(counts[:-2], exact[:-2], strict=True):
        assert abs(count / 40_000 - part) <= 0.1 * sum(exact[:-2])


@given(st.binary(max_size=5000), st.integers(0, 1 << 64))
def test_any_bytes_may_be_what_a_text_is_like(seen, text_bytes):
    counts = counts_like(seen, text_bytes, 0)
    assert min(counts) >= 0
    assert bytes_of(counts) == text_bytes


def test_the_length_of_a_text_costs_nothing(steps_of):
    short, long = "word 12, " * 300, "word 12, " * 300_000
    assert steps_of(lambda: text_counts(long, 1)) < steps_of(lambda: text_counts(short, 1)) + 10


def test_texts_of_one_prompt_add_up():
    one, other = text_counts("ab 1é", 2), text_counts("c?中", 0)
    assert joined(one, other) == (3, 1, 1, 1, 2, 3, 2, 1)
    assert joined(NO_TEXT, NO_TEXT) == NO_TEXT
