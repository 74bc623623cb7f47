"""Which session a request belongs to."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.dialect import make_dialect
from brproxy.engines.sessions import KEYS_MAX, NO_SESSION, SessionAsk, answer_key, session_facts

CHAT, RESPONSES = "/v1/chat/completions", "/v1/responses"


def read(document, path=CHAT, ask=None, method="POST"):
    ask = ask or SessionAsk()
    body = orjson.dumps(document)
    return make_dialect("openai").read_request(path, method, "application/json", body, session=ask).session


def messages(*texts):
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(texts)]


def test_the_client_s_own_name_counts_in_vllm_s_order():
    header = SessionAsk("in the header")
    arguments = {"vllm_xargs": {"session_id": "in the arguments"}}
    in_body, in_header, in_arguments = (
        read({"session_id": "in the body"} | arguments, ask=header),
        read(arguments, ask=header),
        read(arguments),
    )
    assert in_header == read({}, ask=header)
    assert in_arguments == read({"session_id": "in the arguments"})
    assert len({in_body.keys, in_header.keys, in_arguments.keys}) == 3
    assert not in_body.goes_on
    assert not in_body.is_named_by_answer


@pytest.mark.parametrize("name", [None, "", 7, ["a"], {"a": 1}, True])
def test_what_is_no_name_names_nothing(name):
    assert read({"session_id": name}) == NO_SESSION
    assert read({"vllm_xargs": {"session_id": name}}) == NO_SESSION
    assert read({"vllm_xargs": name}) == NO_SESSION
    assert read({"previous_response_id": name}, RESPONSES).keys == ()


def test_models_have_caches_of_their_own():
    assert read({"session_id": "a", "model": "m"}) != read({"session_id": "a", "model": "n"})
    assert read({"session_id": "nb", "model": "m"}) != read({"session_id": "b", "model": "mn"})


def test_a_response_is_the_session_of_the_one_that_goes_on_from_it():
    first = read({"model": "m"}, RESPONSES)
    assert first == ((), False, True)
    second = read({"model": "m", "previous_response_id": "resp_1"}, RESPONSES)
    assert second == ((answer_key("m", "resp_1"),), True, True)
    # Elsewhere nobody reads it.
    assert read({"model": "m", "previous_response_id": "resp_1"}) == NO_SESSION
    named = read({"session_id": "a", "previous_response_id": "resp_1"}, RESPONSES)
    assert named == read({"session_id": "a"})


@pytest.mark.parametrize("key", ["messages", "input"])
def test_a_conversation_is_known_by_all_that_was_said(key):
    ask = SessionAsk(messages=True)
    first = read({key: messages("a")}, ask=ask).keys
    second = read({key: messages("a", "b", "c")}, ask=ask).keys
    assert second[-1] == first[0]
    assert len(second) == 3
    # The same system prompt alone makes no session, and neither does another answer.
    other = read({key: messages("a", "x", "c")}, ask=ask).keys
    assert set(other) & set(second) == {first[0]}
    assert read({key: messages("b")}, ask=ask).keys[0] not in second
    assert read({key: messages("a")}).keys == ()


def test_few_beginnings_are_looked_for():
    long = read({"messages": messages(*map(str, range(100)))}, ask=SessionAsk(messages=True)).keys
    assert len(long) == KEYS_MAX
    assert (
        long[2] == read({"messages": messages(*map(str, range(98)))}, ask=SessionAsk(messages=True)).keys[0]
    )


@pytest.mark.parametrize("prompt", [None, "text", [], ["a", "b"], [1, 2], [[1, 2]], {"a": 1}])
def test_what_has_no_messages_is_no_conversation(prompt):
    assert read({"messages": prompt, "input": prompt}, ask=SessionAsk(messages=True)).keys == ()


def test_what_generates_nothing_has_no_session():
    assert read({"session_id": "a"}, "/v1/embeddings") == NO_SESSION
    assert read({"session_id": "a"}, "/tokenize") == NO_SESSION
    assert read({"session_id": "a"}, method="GET") == NO_SESSION


def test_nothing_is_looked_for_unasked():
    body = orjson.dumps({"session_id": "a"})
    assert make_dialect("openai").read_request(CHAT, "POST", "application/json", body).session == NO_SESSION


def test_of_long_bodies_messages_are_not_hashed():
    ask = SessionAsk(messages=True)
    long = {"messages": messages("a" * (1 << 20))}
    assert read(long, ask=ask).keys == ()
    assert len(read(long | {"session_id": "a"}, ask=ask).keys) == 1


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["session_id", "vllm_xargs", "previous_response_id", "messages", "input"])


@given(st.dictionaries(names, values, max_size=5), st.text(st.characters(), max_size=3), st.booleans())
def test_whatever_comes_it_never_raises(document, model, names_answers):
    ask = SessionAsk("", messages=True)
    facts = session_facts(document, model, ask, names_answers=names_answers, hashable=True)
    assert all(0 <= key < 1 << 64 for key in facts.keys)
    assert len(facts.keys) <= KEYS_MAX


def test_an_answer_s_id_is_read():
    dialect = make_dialect("openai")
    created = orjson.dumps({"type": "response.created", "response": {"id": "resp_1", "usage": None}})
    assert dialect.read_event(created).answer_id == "resp_1"
    assert dialect.read_event(b'{"type":"response.created","response":{"id":7}}').answer_id == ""
    assert dialect.read_event(b'{"type":"response.created","response":7}').answer_id == ""
    reply = b'{"previous_response_id":"resp_0", "id": "resp_1", "output":[{"id":"msg_2"}]}'
    assert dialect.read_answer_id(reply) == "resp_1"
    assert dialect.read_answer_id(b'{"id":"chatcmpl-1"}') == ""
