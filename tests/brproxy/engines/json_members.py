"""Objects written in odd ways, for tests of what changes their members."""

import json

from hypothesis import strategies as st

spaces = st.sampled_from(["", " ", "\t\r\n "])
written_values = st.sampled_from(
    [
        *("null", "true", "false", "7", "-1.50e3", "123456789012345678901", "NaN"),
        *('""', '"a"', '"\u00e9é"', '"\\\\\\"},{"', '"中\\ud83d"', '"kv_transfer_params"'),
        *("[]", "{}", '[1, {"stream": true}]', '{"n":{"a":[","]}, "n":2}', '{ "max_tokens" : 5 }'),
    ]
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def top_level(body):
    """Return the members of an object as json reads them, in order and with duplicates."""
    pairs = []
    json.loads(body, object_pairs_hook=lambda found: pairs.append(found) or dict(found))
    return pairs[-1]


def escaped(name):
    """Return a name as JSON that has only escapes."""
    return '"' + "".join(f"\\u{ord(character):04x}" for character in name) + '"'


@st.composite
def objects(draw, members):
    """Return the bytes of an object, and its members as pairs of a name and how the member is written.

    ``members``: a strategy for lists of names and values as they are written.
    """
    space = draw(spaces)
    written = []
    for name, value in draw(members):
        key = draw(st.sampled_from([json.dumps(name), escaped(name)]))
        written.append((name, f"{draw(spaces)}{key}{space}:{draw(spaces)}{value}"))
    inside = ",".join(text + space for _, text in written) or draw(spaces)
    text = draw(spaces) + "{" + inside + "}" + space
    return draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.encode(), written


def others_keep_their_bytes(edited, written, names):
    """Assert that of ``written`` all but those called one of ``names`` are there, in order, byte for byte."""
    kept = [(name, text) for name, text in written if name not in names]
    pairs = [(name, json.loads("{" + text + "}")[name]) for name, text in kept]
    # As text: what is no number is unequal to itself.
    assert repr([pair for pair in top_level(edited) if pair[0] not in names]) == repr(pairs)
    at = 0
    for _, text in kept:
        at = edited.index(text.encode(), at) + len(text.encode())
