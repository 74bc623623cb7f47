"""What a request says about its load, whatever API it is of and whatever is in it."""

import gc
import json
import tracemalloc

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines import body as body_module
from brproxy.engines.body import read_json
from brproxy.engines.dialect import RequestFacts, make_dialect
from brproxy.engines.paths import UNKNOWN, Work, path_kind
from brproxy.engines.prompt import prompt_size
from brproxy.types import SEQUENCES_MAX, TOKENS_MAX

CHAT = "/v1/chat/completions"
TEXTS = "/v1/completions"
MIB = 1 << 20


def read(path, body, method="POST", content_type="application/json", **options):
    body = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8", "surrogatepass")
    return make_dialect("vllm").read_request(path, method, content_type, body, **options)


integers = st.integers(-(1 << 70), 1 << 70)
odd_numbers = (
    integers
    | st.floats()
    | st.booleans()
    | st.none()
    | st.text("0123456789", max_size=5)
    | st.lists(integers, max_size=2)
)
NUMBER_KEYS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens", "n", "best_of")


@given(
    st.sampled_from(
        [CHAT, TEXTS, "/generate", "/v1/responses", "/v1/messages", "/v1/embeddings", "/unknown"]
    ),
    st.dictionaries(st.sampled_from(NUMBER_KEYS), odd_numbers),
    st.dictionaries(st.sampled_from(NUMBER_KEYS), odd_numbers)
    | st.lists(st.just({"n": 1 << 66}), max_size=3),
    st.lists(integers, max_size=4)
    | st.lists(st.lists(integers, max_size=3), max_size=3)
    | st.text(max_size=9),
)
def test_every_number_of_a_client_is_bounded(path, numbers, sampling, prompt):
    facts = read(path, {"prompt": prompt, "input_ids": prompt, "sampling_params": sampling, **numbers})
    assert 0 <= facts.sequences <= SEQUENCES_MAX
    assert facts.output_tokens_max is None or 0 <= facts.output_tokens_max <= TOKENS_MAX
    assert facts.prompt_tokens is None or 0 <= facts.prompt_tokens <= TOKENS_MAX
    assert facts.prompt_bytes >= 0
    assert facts.prompt_tokens is not None or not facts.prompt_is_exact


@pytest.mark.parametrize("limit", [1 << 32, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 70, 1e300])
def test_a_limit_beyond_all_bounds_is_the_most(limit):
    for key in NUMBER_KEYS[:4]:
        assert read(CHAT, {key: limit}).output_tokens_max == TOKENS_MAX


def test_a_whole_float_is_an_integer_as_engines_read_it():
    assert read(CHAT, {"max_tokens": 7.0}).output_tokens_max == 7


@pytest.mark.parametrize(
    ("path", "method", "sequences"),
    [
        (CHAT, "POST", 1),
        ("/base/v1/chat/completions", "POST", 1),
        (CHAT, "OPTIONS", 0),
        (CHAT, "HEAD", 0),
        ("/v1/models", "GET", 0),
        ("/v1/responses/resp_1", "GET", 0),
        ("/v1/responses/resp_1/cancel", "POST", 0),
        ("/v1/messages/count_tokens", "POST", 0),
        ("/tokenize", "POST", 0),
        ("/v1/load_lora_adapter", "POST", 0),
        ("/v1/embeddings", "POST", 1),
        ("/v1/audio/transcriptions", "POST", 1),
        ("/generate", "PUT", 1),
        ("/inference/v1/generate", "POST", 1),
        ("/v1/messages", "POST", 1),
    ],
)
def test_only_what_the_engine_schedules_is_a_sequence(path, method, sequences):
    assert read(path, {"prompt": "x"}, method).sequences == sequences


@pytest.mark.parametrize(
    ("path", "document", "expected"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "abcd"}], "n": 8, "max_tokens": 5}, (None, 8, 8, 5)),
        (TEXTS, {"prompt": ["ab", "cd", "e"], "n": 2, "best_of": 4}, (None, 5, 12, None)),
        (TEXTS, {"prompt": [[1, 2], [3]], "n": 2}, (3, 0, 4, None)),
        ("/generate", {"text": "abc", "sampling_params": {"n": 3, "max_new_tokens": 9}}, (None, 3, 3, 9)),
        ("/generate", {"text": ["abc", "d"], "sampling_params": {"max_new_tokens": 9}}, (None, 4, 2, 9)),
        ("/generate", {"input_ids": [5] * 5000}, (5000, 0, 1, None)),
        ("/generate", {"input_ids": [[1, 2], [3, 4, 5]]}, (5, 0, 2, None)),
        (
            "/generate",
            {"text": ["a", "b"], "sampling_params": [{"max_new_tokens": 3}, {"max_new_tokens": 8, "n": 2}]},
            (None, 2, 4, 8),
        ),
        (
            "/inference/v1/generate",
            {"token_ids": [1, 2, 3], "sampling_params": {"max_tokens": 6, "ignore_eos": True}},
            (3, 0, 1, 6),
        ),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_text", "text": "abcd"}]}],
             "instructions": "be", "text": {"format": {"type": "text"}}, "max_output_tokens": 4},
            (None, 10, 1, 4),
        ),
        ("/v1/messages", {"system": "be", "messages": [], "max_tokens": 4}, (None, 2, 1, 4)),
        ("/v1/embeddings", {"input": ["ab", "cd"]}, (None, 4, 1, None)),
        ("/v1/embeddings", {"input": [[1, 2], [3]]}, (3, 0, 1, None)),
        ("/v1/rerank", {"query": "ab", "documents": ["c", {"text": "d"}]}, (None, 4, 1, None)),
        ("/v1/score", {"text_1": "ab", "text_2": ["c"]}, (None, 3, 1, None)),
        ("/classify", {"text": "ab"}, (None, 2, 1, None)),
        ("/pooling", {"input": "ab"}, (None, 2, 1, None)),
        ("/tokenize", {"prompt": "abc"}, (None, 0, 0, None)),
        ("/completions/batch", {"messages": [[{"content": "ab"}], [{"content": "c"}]]}, (None, 3, 2, None)),
    ],
)  # fmt: skip
def test_every_way_to_generate_books_prompt_and_sequences(path, document, expected):
    facts = read(path, document)
    assert (facts.prompt_tokens, facts.prompt_bytes, facts.sequences, facts.output_tokens_max) == expected


def test_only_token_ids_of_one_prompt_say_for_certain_what_must_fit():
    assert read(TEXTS, {"prompt": [1, 2, 3]}).prompt_is_exact
    assert read(TEXTS, {"prompt": [[1, 2, 3]]}).prompt_is_exact
    assert not read(TEXTS, {"prompt": [[1, 2, 3], [4]]}).prompt_is_exact, "the engine takes one by one"
    assert not read(TEXTS, {"prompt": "a" * 10_000}).prompt_is_exact
    assert not read(TEXTS, {"prompt": [1] * 9, "truncate_prompt_tokens": 2}).prompt_is_exact
    assert not read("/generate", {"input_ids": [1] * 9, "image_data": "x"}).prompt_is_exact


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 9000}}


@pytest.mark.parametrize(
    "document",
    [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}, IMAGE]}]},
        {"messages": [{"role": "user", "content": [{"image_url": "http://x"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "A"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_embeds", "image_embeds": "AAAA"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_data": "A"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "new_kind", "data": "A"}]}]},
        {"prompt": "", "prompt_embeds": "AAAA"},
        {"prompt": "x", "multi_modal_data": {"image": "A"}},
        {"prompt": "x" * 9, "truncate_prompt_tokens": 2},
        {"input": "x", "previous_response_id": "resp_1"},
        {"input": "x" * 99, "truncation": "auto"},
        {"prompt": [1, 2, 3]},
    ],
)
def test_what_is_not_all_text_teaches_nothing_and_counts_its_text_only(document):
    facts = read(CHAT, document)
    assert not facts.teaches
    assert facts.prompt_bytes < 120


def test_text_teaches():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "42"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    facts = read(
        CHAT, {"messages": messages, "tools": tools, "truncation": "disabled", "metadata": {"a": "b"}}
    )
    assert facts.teaches
    assert facts.prompt_bytes == 5 + 9 + 1 + 7 + 6 + len(orjson.dumps(tools))


# What engines' own JSON takes: Python's.
ODD = [
    (b'{"model":"m","prompt":"\\ud800 x","stream":true}', True),
    (b'{"model":"m","prompt":"x","temperature":NaN,"stream":true}', True),
    (b'{"model":"m","prompt":"x","seed":-Infinity,"stream":true}', True),
    (b'\xef\xbb\xbf {"model":"m","prompt":"x","stream":true}', True),
    (b'{"model":"m","prompt":"\xed\xa0\x80","stream":true}', True),
    ('{"model":"m","prompt":"x","stream":true}'.encode("utf-16"), False),
    ('{"model":"m","prompt":"x","stream":true}'.encode("utf-32-le"), False),
]


@pytest.mark.parametrize(("body", "is_utf8"), ODD)
def test_what_engines_take_is_read(body, is_utf8):
    assert json.loads(body)["model"] == "m"
    facts = read(TEXTS, body)
    assert (facts.model, facts.stream, facts.malformed, facts.sequences) == ("m", True, "", 1)
    assert facts.prompt_bytes >= 1
    assert facts.usage_can_be_asked == is_utf8
    if is_utf8:
        asked = make_dialect("vllm").ask_usage(body)
        assert json.loads(asked) == json.loads(asked) | {"stream_options": {"include_usage": True}}
        assert asked.replace(b'"stream_options":{"include_usage":true},', b"") == body


@given(st.text(st.characters(exclude_categories=[]), max_size=20))
def test_any_name_of_a_model_can_be_told_to_others(model):
    facts = read(CHAT, {"model": model, "user": model})
    for name in (facts.model, facts.user):
        name.encode()
        assert name == model.encode("utf-8", "replace").decode()


def test_names_are_bounded():
    facts = read(CHAT, {"model": "é" * 5000, "user": "u" * 5000})
    assert (len(facts.model), len(facts.user)) == (1024, 256)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", "The request body is empty."),
        (
            b"{",
            "The request body is not valid JSON: Expecting property name enclosed in double quotes at line 1",
        ),
        (b'{"a":1,}', "The request body is not valid JSON"),
        (b"model=m", "The request body is not valid JSON: Expecting value at line 1, column 1."),
        (b"\xff\xfe\xff", "The request body is not valid JSON: not UTF-8."),
        (b'{"n":' + b"1" * 5000 + b",x}", "The request body is not valid JSON: a number is too long."),
        (b"[1]", "The request body must be a JSON object."),
        (b"null", "The request body must be a JSON object."),
    ],
)
def test_what_is_no_json_is_said_in_a_line(body, reason):
    facts = read(CHAT, body)
    assert facts.malformed.startswith(reason)
    assert "\n" not in facts.malformed
    assert len(facts.malformed) < 200
    assert facts.sequences == 0
    assert not read("/v1/load_lora_adapter", body).malformed, "only where a path can do nothing with it"
    assert not read(CHAT, body, content_type="audio/wav").malformed


def large(prompt):
    return b'{"prompt":' + prompt + b',"model":"m","stream":true,"max_tokens":9}'


ADVERSARIES = {
    "lists": large(b"[" + b"[]," * (MIB // 3) + b"[]]"),
    "objects": large(b"[" + b"{}," * (MIB // 3) + b"{}]"),
    "members": large(b"[" + b'{"a":1},' * (MIB // 8) + b"0]"),
    "strings": large(b"[" + b'"a",' * (MIB // 4) + b'"a"]'),
    "numbers": large(b"[" + b"1," * (MIB // 2) + b"1]"),
    "depth": large(b"[" * (MIB // 2) + b"]" * (MIB // 2)),
    "escapes": large(b'["' + b'\\"' * (MIB // 2) + b'",' + b"0," * (1 << 17) + b"0]"),
    "lone surrogates": large(b'["' + b"\\ud800" * (MIB // 6) + b'",' + b"0," * (1 << 17) + b"0]"),
    "keys": b'{"model":"m","stream":true,"max_tokens":9,' + b'"a":1,' * (MIB // 6) + b'"prompt":[]}',
    "small members": b'{"model":"m","stream":true,"max_tokens":9,'
    + b",".join(b'"%d":[%b[]]' % (number, b"[]," * 300) for number in range(1000))
    + b"}",
}


@pytest.mark.parametrize("body", ADVERSARIES.values(), ids=ADVERSARIES)
def test_no_body_buys_memory_or_steps(body, steps_of):
    facts = read(TEXTS, body)
    gc.collect()
    tracemalloc.start()
    read(TEXTS, body)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (facts.model, facts.stream, facts.output_tokens_max) == ("m", True, 9)
    assert peak_bytes < 8 * MIB, "what parsing makes of 1 MiB is up to 32"
    # Some hundred lines for each block of 64 KiB, and some for each of the members.
    assert steps_of(lambda: read(TEXTS, body)) < 60_000


def test_what_is_parsed_is_bounded_by_its_values(steps_of):
    values = body_module.VALUES_MAX // 2 - 100
    body = large(b"[" + b"[]," * values + b"[]]")
    assert not read_json(body).large
    assert steps_of(lambda: read(TEXTS, body)) < 10 * body_module.VALUES_MAX
    assert read_json(large(b"[" + b"[]," * (values + 100) + b"[]]")).large


@given(st.data())
def test_a_scanned_body_says_what_a_parsed_one_does(data):
    document = {
        "model": data.draw(st.text(max_size=5)),
        "prompt": data.draw(st.lists(st.integers(0, 1 << 40), min_size=1, max_size=9)),
        "n": data.draw(st.integers(1, 9)),
        "stream": data.draw(st.booleans()),
        "padding": data.draw(st.sampled_from(["", "}]", '\\"', "é"])) * 10,
    }
    body = json.dumps(document, indent=data.draw(st.sampled_from([None, 2]))).encode()
    parsed = read(TEXTS, body)
    member_bytes_max = data.draw(st.sampled_from([8, 4096]))
    limits = body_module.PARSED_BYTES_MAX, body_module.VALUES_MAX, body_module._MEMBER_BYTES_MAX
    body_module.PARSED_BYTES_MAX = body_module.VALUES_MAX = 0
    body_module._MEMBER_BYTES_MAX = member_bytes_max
    try:
        scanned = read(TEXTS, body)
    finally:
        body_module.PARSED_BYTES_MAX, body_module.VALUES_MAX, body_module._MEMBER_BYTES_MAX = limits
    assert scanned._replace(model=parsed.model) == parsed


def test_token_ids_of_a_large_body_are_counted_exactly():
    ids = list(range(200_000))
    facts = read(TEXTS, large(json.dumps(ids).encode()))
    assert (facts.prompt_tokens, facts.prompt_is_exact, facts.sequences) == (200_000, True, 1)
    facts = read(TEXTS, large(json.dumps([ids[:90_000], ids[90_000:]]).encode()))
    assert (facts.prompt_tokens, facts.prompt_is_exact, facts.sequences) == (200_000, False, 2)


def test_the_text_of_a_large_body_is_counted_without_its_images():
    words = "One, two, three, four, five. " * 50_000
    parts = [{"type": "text", "text": words}, IMAGE]
    body = json.dumps({"messages": [{"role": "user", "content": parts}], "model": "m"}).encode()
    assert read_json(body).large
    facts = read(CHAT, body)
    assert len(words) <= facts.prompt_bytes < len(words) + 100
    assert (facts.model, facts.teaches, facts.prompt_tokens) == ("m", False, None)


TEXTS_OF_A_SCANNED_BODY = {
    "English": 'He said: "One,\n\ttwo", and {three}. ',
    "Chinese": "今天天气很好, 我们去公园。 ",
    "Russian": "Раз, два, три, четыре, пять. ",
    "emoji": "😀😀, ok ",
    "paths": "C:\\new\\u4e00, ",
}


@pytest.mark.parametrize("words", TEXTS_OF_A_SCANNED_BODY.values(), ids=TEXTS_OF_A_SCANNED_BODY)
@pytest.mark.parametrize("escaped", [False, True])
def test_the_text_of_a_large_body_is_what_it_is_without_its_escapes(words, escaped):
    document = {"messages": [{"role": "user", "content": words * 140_000}]}
    body = json.dumps(document, ensure_ascii=escaped).encode()
    assert read_json(body).large
    scanned = read(CHAT, body)
    parsed = prompt_size(document).text
    assert scanned.prompt_text[-2:] == parsed[-2:]
    for one, other in zip(scanned.prompt_text[:-2], parsed[:-2], strict=True):
        assert abs(one - other) < 0.05 * sum(parsed)


def test_data_of_a_large_body_is_not_what_its_text_is_like():
    parts = [
        {"type": "text", "text": "中, " * 50_000},
        IMAGE,
        IMAGE,
        {"type": "text", "text": "x, " * 30_000},
    ]
    parts[1] = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 2_000_000}}
    facts = read(
        CHAT, json.dumps({"messages": [{"role": "user", "content": parts}]}, ensure_ascii=False).encode()
    )
    assert facts.prompt_text[5] > 0.3 * facts.prompt_bytes, "0.44 it is"
    assert facts.prompt_bytes == pytest.approx(340_000, rel=0.01)


def test_a_large_prompt_in_many_parts_is_as_many_sequences():
    assert read(TEXTS, ADVERSARIES["strings"]).sequences == SEQUENCES_MAX


@given(st.sampled_from(["prompt", "messages", "input", "text"]), st.binary(max_size=60), st.booleans())
def test_whatever_is_in_a_scanned_body_is_read_without_an_error(key, junk, closes):
    body = b'{"%b":[%b' % (key.encode(), junk) + b"[]," * (1 << 17) + (b"0]}" if closes else b"")
    assert isinstance(read("/generate", body), RequestFacts)


def test_the_table_of_paths():
    assert path_kind(CHAT).has_stream_options
    assert not path_kind("/generate").has_stream_options
    assert path_kind("/generate").ends_with_done
    assert path_kind("/completions/other") is UNKNOWN
    assert path_kind("/v1/embeddings").work is Work.SCHEDULED
