"""What a prefill worker tells of a prompt, and how it gets into the answer of the one that decodes."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.input_logprobs import LISTS, InputLogprobs, asks_input_logprobs

ASK = {"text": "a", "return_logprob": True, "logprob_start_len": 0}
OF_PROMPT = [[None, 5, None], [-1.25, 7, None]]


def meta(**lists):
    return {"text": "x", "meta_info": {"id": "r", "prompt_tokens": 2, **lists}}


@pytest.mark.parametrize(
    ("more", "asks"),
    [
        ({}, True),
        ({"logprob_start_len": 3}, True),
        ({"logprob_start_len": [0, -1], "return_logprob": [True, False]}, True),
        ({"logprob_start_len": -1}, False),
        ({"logprob_start_len": None}, False),
        ({"return_logprob": False}, False),
        ({"return_logprob": None}, False),
    ],
)
def test_a_request_asks_about_its_prompt_or_not(more, asks):
    assert asks_input_logprobs("/generate", orjson.dumps(ASK | more)) == asks
    assert not asks_input_logprobs("/v1/completions", orjson.dumps(ASK | more))


def test_a_reply_has_what_the_prefill_worker_said():
    told = InputLogprobs(orjson.dumps(meta(input_token_logprobs=OF_PROMPT, input_top_logprobs=[None, [1]])))
    decoded = orjson.dumps(meta(input_token_logprobs=[], output_token_logprobs=[[-2.0, 9, None]]))
    merged = orjson.loads(told.into_reply(decoded))
    assert merged == meta(
        input_token_logprobs=OF_PROMPT,
        input_top_logprobs=[None, [1]],
        output_token_logprobs=[[-2.0, 9, None]],
    )
    assert orjson.loads(told.into_event(decoded)) == merged


def test_what_the_decode_worker_has_itself_comes_behind():
    told = InputLogprobs(orjson.dumps(meta(input_token_logprobs=[1, 2])))
    merged = orjson.loads(told.into_reply(orjson.dumps(meta(input_token_logprobs=[3]))))
    assert merged["meta_info"]["input_token_logprobs"] == [1, 2, 3]


def test_numbers_keep_their_digits():
    told = InputLogprobs(b'{"meta_info": {"input_token_logprobs": [[-1.2500000000000000001, 3, null]]}}')
    merged = told.into_reply(b'{"text": "x", "meta_info": {"input_token_logprobs": []}, "y": 1.10}')
    assert b"[[-1.2500000000000000001, 3, null]]" in merged
    assert b'"y": 1.10' in merged


def test_of_several_prompts_each_has_its_own():
    told = InputLogprobs(
        orjson.dumps([meta(input_token_logprobs=[n]) for n in range(3)]),
    )
    decoded = [meta(input_token_logprobs=[]) for _ in range(3)]
    merged = orjson.loads(told.into_reply(orjson.dumps(decoded)))
    assert [each["meta_info"]["input_token_logprobs"] for each in merged] == [[0], [1], [2]]
    event = orjson.dumps(meta(input_token_logprobs=[]) | {"index": 2})
    assert orjson.loads(told.into_event(event))["meta_info"]["input_token_logprobs"] == [2]
    outside = orjson.dumps(meta(input_token_logprobs=[]) | {"index": 7})
    assert told.into_event(outside) == outside


@pytest.mark.parametrize(
    "decoded",
    [
        b"",
        b"[DONE]",
        b"{",
        b"[]",
        b'{"error": {"message": "no"}}',
        b'{"meta_info": 5}',
        b'[{"meta_info": {}}]',
    ],
)
def test_what_has_no_place_for_it_stays_as_it_is(decoded):
    told = InputLogprobs(orjson.dumps(meta(input_token_logprobs=OF_PROMPT)))
    assert told.into_event(decoded) == decoded
    assert told.into_reply(decoded) == decoded


@pytest.mark.parametrize(
    "answer", [b"", b"no", b"[1]", b"{}", b'{"meta_info": {"input_token_logprobs": []}}']
)
def test_what_says_nothing_changes_nothing(answer):
    decoded = orjson.dumps(meta(input_token_logprobs=[]))
    assert InputLogprobs(answer).into_event(decoded) == decoded


values = st.lists(st.lists(st.none() | st.integers(-(2**31), 2**31) | st.text(), max_size=3), max_size=4)
lists = st.dictionaries(st.sampled_from(LISTS), values)


@given(lists, lists, st.booleans())
def test_all_lists_are_joined_and_nothing_else_is_changed(own, rest, in_a_batch):
    prefilled, decoded = meta(**own), meta(**rest)
    told = InputLogprobs(orjson.dumps([prefilled] if in_a_batch else prefilled))
    body = told.into_reply(orjson.dumps([decoded] if in_a_batch else decoded))
    merged = orjson.loads(body)[0] if in_a_batch else orjson.loads(body)
    expected = {name: own.get(name, []) + rest.get(name, []) for name in LISTS if own.get(name)}
    assert merged == meta(**rest | expected)


@given(st.binary(), st.binary())
def test_nothing_raises(answer, decoded):
    told = InputLogprobs(answer)
    told.into_event(decoded)
    told.into_reply(decoded)
    asks_input_logprobs("/generate", decoded)
