"""What engines are asked about prompts, and what their answers say."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.dialect import make_dialect
from brproxy.engines.tokenize import asks_prompts_of, read_tokenized
from brproxy.types import TOKENS_MAX

TEXT, CHAT, NATIVE = "/v1/completions", "/v1/chat/completions", "/generate"
MESSAGES = [{"role": "user", "content": 'a "quoted" été'}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def asked(engine, path, document):
    """Return the document that an engine is asked about, None where it is not asked."""
    body = make_dialect(engine).tokenize_body(path, orjson.dumps(document))
    return None if body is None else orjson.loads(body)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_text_is_asked_about_as_it_is(engine):
    document = {"model": "m", "prompt": "été", "max_tokens": 5, "stream": True, "add_special_tokens": False}
    assert asked(engine, TEXT, document) == {"model": "m", "prompt": "été", "add_special_tokens": False}
    assert asked(engine, NATIVE, {"text": "été", "stream": True}) == {"prompt": "été"}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("path", "document"),
    [
        (TEXT, {"prompt": ["a", "b"]}),
        (TEXT, {"prompt": [1, 2]}),
        (TEXT, {"prompt": None}),
        (TEXT, {"prompt": "a", "suffix": "b"}),
        (TEXT, {}),
        (NATIVE, {"text": ["a"]}),
        (NATIVE, {"prompt": "a"}),
        (CHAT, {"prompt": "a"}),
        (CHAT, {"messages": None}),
        ("/v1/responses", {"input": "a"}),
        ("/v1/embeddings", {"input": "a"}),
    ],
)
def test_what_would_be_another_prompt_is_not_asked_about(engine, path, document):
    assert asked(engine, path, document) is None


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b"\xff\xfe{"])
def test_what_is_no_object_is_not_asked_about(body):
    for engine in ("vllm", "sglang", "openai"):
        assert make_dialect(engine).tokenize_body(TEXT, body) is None


def test_vllm_is_asked_about_what_it_knows_of_a_chat():
    of_template = {"chat_template": "x", "chat_template_kwargs": {"a": 1}, "tools": TOOLS}
    flags = {"add_generation_prompt": False, "continue_final_message": True, "add_special_tokens": True}
    known = {"model": "m", "messages": MESSAGES, **of_template, **flags}
    rest = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0.5, "user": "u"}
    assert asked("vllm", CHAT, known | rest) == known
    assert asked("vllm", CHAT, {"messages": MESSAGES, "tools": None}) == {"messages": MESSAGES}


@pytest.mark.parametrize(
    ("more", "is_asked"),
    [
        ({"documents": [{"text": "a"}]}, False),
        ({"reasoning_effort": "high"}, False),
        ({"reasoning_effort": None}, True),
        ({"response_format": {"type": "json_object"}}, False),
        ({"response_format": {"type": "text"}}, True),
        ({"tools": TOOLS, "tool_choice": "auto"}, True),
        ({"tools": TOOLS, "tool_choice": "none"}, False),
    ],
)
def test_vllm_is_not_asked_about_what_its_page_would_leave_out(more, is_asked):
    assert (asked("vllm", CHAT, {"messages": MESSAGES} | more) is not None) == is_asked


def test_sglang_gets_the_chat_as_it_is_but_for_what_would_change_it():
    chat = {"messages": MESSAGES, "tools": TOOLS, "tool_choice": "required", "reasoning_effort": "low"}
    changing = {"stream": True, "add_generation_prompt": True, "add_special_tokens": True}
    assert asked("sglang", CHAT, chat | changing | {"temperature": 1.0}) == chat | {"temperature": 1.0}


def test_no_other_server_is_asked():
    assert make_dialect("openai").TOKENIZE_PATH == ""
    assert asked("openai", TEXT, {"prompt": "a"}) is None
    assert make_dialect("openai").read_tokenized(b'{"count": 1}') is None


@given(
    st.text(), st.dictionaries(st.sampled_from(["user", "stop", "seed"]), st.text() | st.integers(0, 2**63))
)
def test_whatever_the_text_is_it_arrives(text, more):
    assert asked("vllm", TEXT, {**more, "prompt": text}) == {"prompt": text}
    assert asked("sglang", NATIVE, {"text": text, **more}) == {"prompt": text}


@given(st.binary(), st.sampled_from([TEXT, CHAT, NATIVE, "/x"]))
def test_nothing_raises(body, path):
    for engine in ("vllm", "sglang", "openai"):
        dialect = make_dialect(engine)
        made = dialect.tokenize_body(path, body)
        assert made is None or asks_prompts_of(path)
        dialect.read_tokenized(body)


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        ({"count": 3, "max_model_len": 9, "tokens": [1, 2, 3], "token_strs": None}, 3),
        ({"tokens": [1, 2, 3], "count": 3, "max_model_len": 9}, 3),
        ({"tokens": [[1], [2]], "count": [1, 1], "max_model_len": 9}, None),
        ({"count": 10**18, "tokens": []}, TOKENS_MAX),
        ({"count": -3}, None),
        ({"count": 3.5}, None),
        ({"count": True}, None),
        ({"error": {"message": "no"}}, None),
    ],
)
def test_an_answer_says_how_many_tokens_there_are(answer, count):
    assert read_tokenized(orjson.dumps(answer)) == count


@given(st.integers(0, TOKENS_MAX), st.lists(st.integers(0, 10**6), max_size=20), st.booleans())
def test_it_says_so_wherever_the_count_stands(count, ids, is_last):
    answer = {"tokens": ids, "count": count} if is_last else {"count": count, "tokens": ids}
    assert read_tokenized(orjson.dumps(answer)) == count
