"""Completions in parts: what each engine is asked, and that the parts are one answer."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.continuing import read_completion

PATH = "/v1/completions"
MANY = 1 << 20
PROMPT_TOKENS = 3
WORDS = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), min_size=1, max_size=12)
ASK = {"model": "m", "prompt": 'a "quoted" prompt\n', "max_tokens": 20, "stream": True}


def read(document, *, text_bytes_max=MANY, path=PATH):
    body = json.dumps(document).encode()
    return read_completion(path, body, streams=document.get("stream", False), text_bytes_max=text_bytes_max)


class Engine:
    """Generates ``words`` in turn, one token each, whatever part of them a prompt has already."""

    def __init__(self, words, number=0):
        self.words = words
        self.number = number

    def usage(self, done, count):
        prompt = PROMPT_TOKENS + done
        return {
            "prompt_tokens": prompt,
            "completion_tokens": count,
            "total_tokens": prompt + count,
            "x": None,
        }

    def events(self, done, *, ids=False):
        head = {"id": f"cmpl-{done}", "created": done}
        left = self.words[done:]
        for count, word in enumerate(left, 1):
            choice = {"index": 0, "text": word, "finish_reason": None if count < len(left) else "length"}
            choice |= {"token_ids": [done + count]} if ids else {}
            yield head | {"choices": [choice], "usage": self.usage(done, count)}
        yield head | {"choices": [], "usage": self.usage(done, len(left))}


@given(words=WORDS, cuts=st.lists(st.integers(0, 5), max_size=4), form=st.sampled_from(["", "last", "all"]))
def test_parts_are_one_answer(words, cuts, form):
    options = {
        "": {},
        "last": {"include_usage": True},
        "all": {"include_usage": True, "continuous_usage_stats": True},
    }
    document = ASK | {"max_tokens": len(words), "min_tokens": 2}
    document |= {"stream_options": options[form]} if form else {}
    completion = read(document)
    received, done = [], 0
    for cut in [*cuts, None]:
        asked = json.loads(completion.body())
        assert asked["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
        assert asked["prompt"] == ASK["prompt"] + "".join(words[:done])
        assert (asked["max_tokens"], asked["min_tokens"]) == (len(words) - done, max(2 - done, 0))
        events = list(Engine(words).events(done))
        taken = [completion.take(json.dumps(event).encode()) for event in events[:cut]]
        received += map(json.loads, taken)
        if cut is None or not completion.can_go_on:
            assert completion.can_go_on is False
            break
        done += cut
        assert completion.tokens == done
        completion.go_on()
    texts = [choice["text"] for document in received for choice in document["choices"]]
    assert texts == words[: len(texts)]
    assert len({(document["id"], document["created"]) for document in received}) <= 1
    for number, document in enumerate(document for document in received if document["choices"]):
        assert ("usage" in document) == bool(form)
        if form == "all":
            assert document["usage"]["completion_tokens"] == number + 1
            assert document["usage"]["total_tokens"] == PROMPT_TOKENS + number + 1
    if cut is None:
        assert texts == words
        assert received[-1]["usage"]["x"] is None


@given(words=WORDS, cut=st.integers(0, 11))
def test_token_ids_go_on_as_token_ids(words, cut):
    completion = read(ASK | {"prompt": [7, 8, 9], "return_token_ids": True, "max_tokens": None})
    cut = min(cut, len(words) - 1)
    for event in list(Engine(words).events(0, ids=True))[:cut]:
        completion.take(json.dumps(event).encode())
    assert completion.can_go_on
    completion.go_on()
    asked = json.loads(completion.body())
    assert asked["prompt"] == [7, 8, 9, *range(1, cut + 1)]
    assert asked["max_tokens"] is None


def reply(words, done, **choice):
    usage = Engine(words).usage(done, len(words) - done)
    choice = {"index": 0, "text": "".join(words[done:]), "finish_reason": "length"} | choice
    return json.dumps({"id": f"cmpl-{done}", "choices": [choice], "usage": usage}).encode()


@given(words=WORDS, cut=st.integers(1, 11))
def test_replies_are_joined(words, cut):
    completion = read(ASK | {"stream": False})
    cut = min(cut, len(words) - 1)
    part = reply(words[:cut], 0, finish_reason="stop", stop_reason="recomputed")
    completion.take(part, given_up=True)
    assert completion.can_go_on
    completion.go_on()
    asked = json.loads(completion.body())
    assert asked == ASK | {
        "stream": False,
        "prompt": ASK["prompt"] + "".join(words[:cut]),
        "max_tokens": 20 - cut,
    }
    joined = json.loads(completion.joined(reply(words, cut)))
    assert joined["id"] == "cmpl-0"
    assert joined["choices"] == [{"index": 0, "text": "".join(words), "finish_reason": "length"}]
    assert joined["usage"] == Engine(words).usage(0, len(words))


@given(
    body=st.binary(max_size=60),
    data=st.binary(max_size=60)
    | st.recursive(
        st.none() | st.integers() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(
                    ["choices", "text", "usage", "token_ids", "completion_tokens", "finish_reason"]
                ),
                inner,
            )
        ),
        max_leaves=8,
    ).map(lambda value: json.dumps(value).encode()),
)
def test_it_never_raises(body, data):
    read_completion(PATH, body, streams=True, text_bytes_max=MANY)
    for more in ({}, {"prompt": [1], "return_token_ids": True}):
        completion = read(ASK | more)
        for given_up in (False, True):
            completion.take(data, given_up=given_up)
            completion.go_on()
        completion.joined(data)
        completion.body()


def event(text="x", count=1, **choice):
    usage = {} if count is None else {"usage": {"prompt_tokens": 3, "completion_tokens": count}}
    return json.dumps({"choices": [{"index": 0, "text": text} | choice]} | usage).encode()


@pytest.mark.parametrize(
    ("more", "events"),
    [
        ({}, [event(count=None)]),
        ({}, [event(count=1), event(count=None)]),
        ({}, [event(count=20)]),
        ({}, [event(finish_reason="stop")]),
        ({}, [event("long" * 9)]),
        ({}, [b'{"error":{"message":"no"}}']),
        ({}, [b'{"choices":[{"text":"a"},{"text":"b"}]}']),
        ({}, [event("\ud83d")]),
        ({"prompt": [1], "return_token_ids": True}, [event()]),
        ({"prompt": [1], "return_token_ids": True}, [event("", token_ids=[5])]),
        ({"prompt": [1], "return_token_ids": True}, [event("x", token_ids=["5"])]),
    ],
)
def test_what_is_not_known_exactly_does_not_go_on(more, events):
    completion = read(ASK | more, text_bytes_max=32)
    assert completion.can_go_on
    for data in events:
        completion.take(data)
    assert not completion.can_go_on


def test_tokens_without_text_are_generated_again():
    completion = read(ASK)
    completion.take(event("a", 1))
    completion.take(event("", 2))
    assert (completion.can_go_on, completion.tokens) == (True, 1)


def test_a_count_may_come_at_the_end():
    completion = read(ASK)
    completion.take(event("a", None))
    assert completion.take(event("", None, finish_reason="stop"), given_up=True) is None
    assert not completion.can_go_on
    completion.take(b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}')
    assert (completion.can_go_on, completion.tokens, completion.prompt_tokens) == (True, 2, 3)


@pytest.mark.parametrize(
    "more",
    [
        {"max_tokens": 0.5},
        {"max_tokens": -1},
        {"prompt": ["a"]},
        {"prompt": [[1]]},
        {"prompt": [1]},
        {"prompt": [1], "return_token_ids": False},
        {"return_token_ids": True},
        {"prompt": None},
        {"stream_options": []},
        {"n": 2},
        {"best_of": 2},
        {"stop": "x"},
        {"seed": 0},
        {"logprobs": 0},
        {"echo": True},
        {"suffix": "x"},
        {"presence_penalty": 1},
        {"guided_json": {}},
    ],
    ids=str,
)
def test_only_what_is_known_to_be_exact_is_read(more):
    assert read(ASK | more) is None


def test_members_that_mean_nothing_are_no_matter():
    more = {"n": 1, "stop": None, "seed": None, "echo": False, "presence_penalty": 0.0, "logprobs": None}
    assert read(ASK | more) is not None
    assert read({name: value for name, value in ASK.items() if name != "max_tokens"}) is None
    assert read(ASK, path="/v1/chat/completions") is None
