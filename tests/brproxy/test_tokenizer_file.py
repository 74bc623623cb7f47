"""A tokenizer from a file, and what is said where there is none."""

import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from brproxy.tokenizer_file import load_tokenizer
from brproxy.types import InvalidInputError


@pytest.fixture
def path(tmp_path):
    """Return the file of a tokenizer that makes a token of each word, and puts one in front of a text."""
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "<s>": 1, "a": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    # As files of models that were trained on short texts say.
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=16)
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    return file


def test_texts_are_counted_each_by_itself_in_full(path):
    count = load_tokenizer(path)
    assert count(["one two", "three"], False) == 3
    assert count(["one two three four five six"], True) == 7
    assert count([""], False) == 0


def test_no_text_raises_that_a_body_can_hold(path):
    assert load_tokenizer(path)(["\x00 \U0001f600 é"], False) == 3


def test_a_missing_library_is_said_in_one_line(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InvalidInputError) as raised:
        load_tokenizer(path)
    assert "pip install 'brproxy[tokenizer]'" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [None, "", "{}", "[]", "no json"])
def test_a_file_that_is_none_is_said_in_one_line(tmp_path, content):
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(InvalidInputError) as raised:
        load_tokenizer(file)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)
