"""The usage report that a dialect finds in a reply."""

import json

from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.dialect import Usage, make_dialect


def test_the_usage_of_a_reply():
    dialect = make_dialect("vllm")
    assert dialect.read_reply(b'{"usage":{"prompt_tokens":5,"completion_tokens":2}}') == Usage(5, 2)
    assert dialect.read_reply(b'{"usage":{"prompt_tokens":-5,"completion_tokens":true}}') == Usage(None, None)
    assert dialect.read_reply(b'{"usage":null}') is None
    assert dialect.read_reply(b"not json") is None


counts = st.none() | st.integers(0, 99)


@given(
    prompt=counts,
    output=counts,
    more=st.dictionaries(
        st.sampled_from(["total_tokens", "prompt_tokens_details", "cached_tokens", "cost"]),
        counts | st.dictionaries(st.just("cached_tokens"), counts, max_size=1),
    ),
    before=st.text(max_size=5) | st.dictionaries(st.text(max_size=3), counts, max_size=2),
    behind=counts | st.dictionaries(st.text(max_size=3), counts, max_size=2),
    separators=st.sampled_from([(",", ":"), (", ", ": "), (" , ", " : ")]),
)
def test_the_usage_of_a_reply_is_found_wherever_it_is(prompt, output, more, before, behind, separators):
    usage = {"prompt_tokens": prompt, "completion_tokens": output, **more}
    document = {"choices": [{"message": before}], "usage": usage, "kv_transfer_params": behind}
    found = make_dialect("vllm").read_reply(json.dumps(document, separators=separators).encode())
    details = usage.get("prompt_tokens_details")
    cached = (details if isinstance(details, dict) and details else usage).get("cached_tokens")
    assert found == Usage(prompt, output, None if isinstance(cached, dict) else cached)
