"""The size of prompts in every API's shape."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.prompt import prompt_size

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"prompt": "héllo"}, (0, 6, 1)),
        ({"prompt": [1, 2, 3]}, (3, 0, 1)),
        ({"prompt": ["ab", "cde"]}, (0, 5, 2)),
        ({"prompt": [[1, 2], [3]]}, (3, 0, 2)),
        ({"messages": [{"role": "user", "content": "abcd"}]}, (0, 8, 1)),
        ({"input": ["ab", "c"]}, (0, 3, 1)),
        ({"input": [5, 6]}, (2, 0, 1)),
        ({"query": "q", "documents": ["d1", "d2"]}, (0, 5, 1)),
        ({"system": "be brief", "messages": []}, (0, 8, 1)),
        ({"model": "not a prompt", "user": "nor this"}, (0, 0, 1)),
    ],
)
def test_shapes(document, expected):
    size = prompt_size(document)
    assert (size.tokens, size.text_bytes, size.prompts) == expected


def test_images_are_not_text():
    parts = [
        {"type": "text", "text": "what is this"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 10_000}},
    ]
    assert (
        prompt_size({"messages": [{"role": "user", "content": parts}]}).text_bytes == len("what is this") + 4
    )


@given(st.dictionaries(st.sampled_from(["prompt", "messages", "input", "tools", "system"]), json_values))
def test_anything_can_be_measured(document):
    size = prompt_size(document)
    assert min(size.tokens, *size.text) >= 0
    assert size.prompts >= 1


def test_depth_does_not_matter():
    nested = "x"
    for _ in range(5000):
        nested = [nested]
    assert prompt_size({"prompt": nested}).text_bytes == 1
