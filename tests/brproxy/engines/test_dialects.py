"""What the dialects read in requests, events and replies."""

import json

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.dialect import DIALECTS, EventFacts, RequestFacts, Usage, make_dialect
from brproxy.types import SEQUENCES_MAX, TOKENS_MAX

NAMES = DIALECTS.names()
CHAT = "/v1/chat/completions"
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "choices",
                    "delta",
                    "content",
                    "usage",
                    "error",
                    "role",
                    "type",
                    "code",
                    "message",
                    "prompt_tokens",
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=15,
)


def chunk(**fields):
    return orjson.dumps({"id": "x", "object": "chat.completion.chunk", **fields})


def delta(**fields):
    return {"index": 0, "delta": fields, "finish_reason": None}


def request(path=CHAT, **document):
    return make_dialect("openai").read_request(path, "POST", "application/json", orjson.dumps(document))


@pytest.mark.parametrize("name", NAMES)
@given(value=json_values)
def test_any_json_is_read_without_an_error(name, value):
    dialect = make_dialect(name)
    data = orjson.dumps(value)
    assert isinstance(dialect.read_event(data), EventFacts)
    assert isinstance(dialect.read_request(CHAT, "POST", "application/json", data), RequestFacts)
    dialect.read_reply(data)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.binary(max_size=60))
def test_any_bytes_are_read_without_an_error(name, data):
    dialect = make_dialect(name)
    dialect.read_event(data)
    dialect.read_reply(data)
    dialect.read_request(CHAT, "POST", "application/json", data)
    dialect.read_request("/v1/audio/transcriptions", "POST", "multipart/form-data", data)


def test_a_chat_request():
    facts = request(model="m", stream=True, messages=[{"role": "user", "content": "abcd"}], max_tokens=7, n=2)
    assert facts == RequestFacts("m", True, None, (8, 0, 0, 0, 0, 0, 1, 1), 2, 7, usage_can_be_asked=True)


def test_token_ids_are_exact():
    facts = request("/v1/completions", model="m", prompt=[[1, 2, 3], [4]])
    assert (facts.prompt_tokens, facts.sequences) == (4, 2)


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({"stream": False}, CHAT),
        ({"stream": True, "stream_options": {"include_usage": False}}, CHAT),
        ({"stream": True, "stream_options": {"include_usage": True}}, CHAT),
        ({"stream": True, "stream_options": None}, CHAT),
        ({"stream": True}, "/v1/responses"),
        ({"stream": "true"}, CHAT),
    ],
)
def test_usage_is_only_asked_where_the_client_said_nothing(fields, path):
    assert not request(path, **fields).usage_can_be_asked


def test_asking_for_usage_adds_one_key_and_changes_nothing_else():
    body = b' {"big":123456789012345678901234567890,"stream":true, "a" : 1.10}'
    asked = make_dialect("vllm").ask_usage(body)
    assert asked.replace(b'"stream_options":{"include_usage":true},', b"") == body
    assert b'{"stream_options":{"include_usage":true},"big"' in asked


@pytest.mark.parametrize("limit", [-1, True, "7", 1.5, None])
def test_an_unusable_limit_is_no_limit(limit):
    assert request(max_tokens=limit).output_tokens_max is None


def test_a_huge_n_counts_as_the_most():
    assert request(n=10**9).sequences == 1024


def test_the_model_of_an_upload():
    form = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
        b"Content-Type: audio/wav\r\n\r\nRIFF....\r\n--b\r\n"
        b'Content-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n--b--\r\n'
    )
    facts = make_dialect("openai").read_request(
        "/v1/audio/transcriptions", "POST", "multipart/form-data", form
    )
    assert facts.model == "whisper-1"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"[DONE]", EventFacts(done=True)),
        (chunk(choices=[delta(content=" hello")]), EventFacts(has_tokens=True)),
        (chunk(choices=[delta(content=" hi")], usage=None), EventFacts(has_tokens=True)),
        (chunk(choices=[delta(role="assistant", content="")]), EventFacts()),
        (chunk(choices=[delta(role="assistant", content="x")]), EventFacts(has_tokens=True)),
        (chunk(choices=[delta(role="assistant", reasoning_content="x")]), EventFacts(has_tokens=True)),
        (chunk(choices=[{"index": 0, "text": " hi"}]), EventFacts(has_tokens=True)),
        (
            chunk(choices=[], usage={"prompt_tokens": 11, "completion_tokens": 3}),
            EventFacts(usage=Usage(11, 3), usage_only=True),
        ),
        (
            chunk(choices=[delta(content="x")], usage={"prompt_tokens": 11, "completion_tokens": 3}),
            EventFacts(has_tokens=True, usage=Usage(11, 3), sequence=0),
        ),
        (chunk(choices=[delta(content='"usage" "error" in text')]), EventFacts(has_tokens=True)),
        (b'{"error":{"message":"boom","code":500}}', EventFacts(error=True)),
        (b'{"error":{"message":"full","code":503}}', EventFacts(error=True, refused=True)),
        (b'{"type":"content_block_delta","delta":{"text":"x"}}', EventFacts(has_tokens=True)),
        (
            b'{"type":"message_start","message":{"usage":{"input_tokens":9}}}',
            EventFacts(usage=Usage(9, None)),
        ),
        (
            b'{"type":"response.completed","response":{"usage":{"input_tokens":9,"output_tokens":4}}}',
            EventFacts(usage=Usage(9, 4)),
        ),
        (b'{"type":"message_stop"}', EventFacts()),
        (b'{"error": broken', EventFacts()),
    ],
)
def test_events(name, data, expected):
    assert make_dialect(name).read_event(data) == expected


@pytest.mark.parametrize(
    ("name", "error", "refused"),
    [
        ("vllm", {"type": "Service Unavailable", "code": None}, True),
        ("vllm", {"type": "BadRequestError", "code": 400}, False),
        ("vllm", {"message": "The request queue is full."}, False),
        ("sglang", {"message": "The request queue is full."}, True),
        ("sglang", "The request queue is full.", True),
        ("sglang", {"message": "no"}, False),
        ("openai", {"code": "503"}, True),
    ],
)
def test_refusals_in_the_first_event(name, error, refused):
    facts = make_dialect(name).read_event(orjson.dumps({"error": error}))
    assert (facts.error, facts.refused) == (True, refused)


def test_a_503_is_a_refusal_and_nothing_else_is():
    dialect = make_dialect("vllm")
    assert [status for status in range(100, 600) if dialect.is_refusal(status)] == [503]


def test_health_paths():
    assert {name: make_dialect(name).HEALTH_PATH for name in NAMES} == {
        "openai": "/v1/models",
        "sglang": "/health",
        "vllm": "/health",
    }


def hashes(**document):
    facts = make_dialect("openai").read_request(
        CHAT, "POST", "application/json", orjson.dumps(document), hashes=True
    )
    return facts.prompt_hash, facts.prefix_hash


def user(text):
    return {"role": "user", "content": text}


def test_prompts_are_identified_by_what_the_model_reads():
    system = {"role": "system", "content": "be brief"}
    first, second = (hashes(messages=[system, user(text)], seed=i) for i, text in enumerate(("a", "b")))
    assert first == hashes(messages=[system, user("a")], seed=9, temperature=0.5)
    assert first[0] != second[0]
    assert first[1] == second[1], "all messages but the last are the same"
    assert hashes(prompt="x" * 100 + "y")[1] == hashes(prompt="x" * 100 + "z")[1]
    assert hashes(input=[1, 2, 3])[0] is not None
    assert hashes(model="m") == (None, None)
    assert hashes(messages=[]) == (None, None)


@given(value=json_values)
def test_any_prompt_can_be_identified(value):
    for key in ("messages", "prompt", "input"):
        hashes(**{key: value})


def test_a_prompt_nested_too_deeply_is_not_identified():
    body = b'{"prompt":' + b"[" * 600 + b"]" * 600 + b"}"
    facts = make_dialect("openai").read_request(
        "/v1/completions", "POST", "application/json", body, hashes=True
    )
    assert facts.prompt_hash is None


def test_hashes_are_made_only_when_somebody_reads_them():
    assert request(messages=[user("a")]).prompt_hash is None


def test_what_makes_the_length_certain():
    facts = request(messages=[user("a")], max_tokens=9, ignore_eos=True, user="u" * 1000)
    assert (facts.output_tokens_max, facts.runs_to_max, facts.user) == (9, True, "u" * 256)


numbers = (
    st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.booleans()
    | st.none()
    | st.text("0123456789-.", max_size=22)
    | st.lists(st.integers(), max_size=1)
)
COUNT_KEYS = (
    *("prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "total_tokens"),
    *("cache_read_input_tokens", "cache_creation_input_tokens"),
)
reports = st.dictionaries(st.sampled_from(COUNT_KEYS), numbers)


def is_bounded(usage):
    return usage is None or all(
        count is None or (type(count) is int and 0 <= count <= TOKENS_MAX) for count in usage
    )


@pytest.mark.parametrize("name", NAMES)
@given(report=reports, index=numbers)
def test_every_number_of_a_worker_is_bounded(name, report, index):
    dialect = make_dialect(name)
    for document in (
        {"choices": [{"index": index, "delta": {"content": "x"}}], "usage": report},
        {"choices": [], "usage": report},
        {"type": "message_start", "message": {"usage": report}},
        {"type": "response.completed", "response": {"usage": report}},
        {"text": "x", "index": index, "meta_info": report},
        [{"text": "x", "meta_info": report}, {"text": "y", "meta_info": report}],
    ):
        data = json.dumps(document).encode()
        facts = dialect.read_event(data)
        assert is_bounded(facts.usage)
        assert facts.sequence is None or 0 <= facts.sequence <= SEQUENCES_MAX
        assert is_bounded(dialect.read_reply(data))


@pytest.mark.parametrize("tokens", [1 << 62, (1 << 64) - 1, 1 << 64, 1e19, 10**19])
def test_an_absurd_report_counts_as_the_most(tokens):
    report = json.dumps({"choices": [], "usage": {"completion_tokens": tokens}}).encode()
    assert make_dialect("vllm").read_event(report).usage == Usage(None, TOKENS_MAX)
    assert make_dialect("vllm").read_reply(report) == Usage(None, TOKENS_MAX)


@pytest.mark.parametrize("tokens", ["-1", "true", "1.5", '"7"', "null", "[7]", "NaN"])
def test_a_report_that_is_no_count_says_nothing(tokens):
    report = b'{"choices":[],"usage":{"completion_tokens":%b}}' % tokens.encode()
    usage = make_dialect("vllm").read_event(report).usage
    assert usage is None or usage.completion_tokens is None
    native = b'{"text":"x","meta_info":{"completion_tokens":%b}}' % tokens.encode()
    usage = make_dialect("sglang").read_reply(native)
    assert usage is None or usage.completion_tokens is None


def native_event(**fields):
    meta = {"id": "r", "finish_reason": None, "prompt_tokens": 5, "completion_tokens": 3} | fields
    return orjson.dumps({"text": "so far", "output_ids": [1, 2, 3], "meta_info": meta, "index": 1})


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (native_event(), EventFacts(has_tokens=True, usage=Usage(5, 3), sequence=1)),
        (
            native_event(finish_reason={"type": "length", "length": 3}),
            EventFacts(has_tokens=True, usage=Usage(5, 3), finishes=True, sequence=1),
        ),
        (native_event(completion_tokens=0), EventFacts(usage=Usage(5, 0), sequence=1)),
        (
            native_event(finish_reason={"type": "abort", "message": "full", "status_code": 503}),
            EventFacts(error=True, refused=True),
        ),
        (b'{"error":{"message":"bad","type":"invalid_request_error","code":400}}', EventFacts(error=True)),
    ],
)
def test_events_of_sglangs_own_api(data, expected):
    assert make_dialect("sglang").read_event(data) == expected


def test_replies_of_sglangs_own_api():
    one, dialect = native_event(), make_dialect("sglang")
    assert dialect.read_reply(one) == Usage(5, 3)
    assert dialect.read_reply(b"[" + one + b"," + one + b"]") == Usage(None, 6)
    text = orjson.dumps({"text": '"completion_tokens":9', "meta_info": {"completion_tokens": 2}})
    assert dialect.read_reply(text) == Usage(None, 2)


def test_what_anthropics_cache_held_is_part_of_the_prompt():
    usage = b'{"usage":{"input_tokens":4,"cache_read_input_tokens":90,"output_tokens":2}}'
    assert make_dialect("vllm").read_reply(usage) == Usage(94, 2, 90)


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens_details": {"cached_tokens": 8}}, 8),
        ({"prompt_tokens_details": {"cached_tokens": 0}}, 0),
        ({"prompt_tokens_details": None}, None),
        ({"prompt_tokens_details": {"audio_tokens": 8}}, None),
        ({"prompt_tokens_details": {"cached_tokens": "8"}}, None),
        ({"prompt_tokens_details": [8]}, None),
        ({"prompt_tokens_details": {"cached_tokens": 1 << 40}}, TOKENS_MAX),
        ({"input_tokens_details": {"cached_tokens": 8}}, 8),
    ],
)
@pytest.mark.parametrize("names", [("prompt_tokens", "completion_tokens"), ("input_tokens", "output_tokens")])
def test_what_was_cached_of_a_prompt(names, usage, expected):
    report = {"usage": dict(zip(names, (11, 3), strict=True)) | usage}
    for event in (chunk(choices=[], **report), orjson.dumps({"type": "x", "response": report})):
        assert make_dialect("vllm").read_event(event).usage == Usage(11, 3, expected)


def test_sglangs_own_api_says_what_was_cached():
    event = orjson.dumps(
        {"text": "x", "meta_info": {"prompt_tokens": 5, "completion_tokens": 3, "cached_tokens": 4}}
    )
    assert make_dialect("sglang").read_event(event).usage == Usage(5, 3, 4)


def test_an_event_that_names_why_it_ends_finishes():
    facts = make_dialect("vllm").read_event(chunk(choices=[delta(content="x") | {"finish_reason": "stop"}]))
    assert facts == EventFacts(has_tokens=True, finishes=True)


@pytest.mark.parametrize(
    ("data", "refused"),
    [
        (b'{"type":"error","error":{"type":"overloaded_error","code":503,"message":"full"}}', True),
        (b'{"type":"error","code":"503","message":"full","sequence_number":1}', True),
        (b'{"type":"error","code":null,"message":"no","sequence_number":1}', False),
        (b'{"type":"response.failed","response":{"error":{"code":"server_error","message":"no"}}}', False),
    ],
)
def test_errors_of_the_newer_apis(data, refused):
    facts = make_dialect("vllm").read_event(data)
    assert (facts.error, facts.refused, facts.has_tokens) == (True, refused, False)
