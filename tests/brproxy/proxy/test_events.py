"""The events of a stream on their way to the client, without a stream."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.dialect import RequestFacts, make_dialect
from brproxy.estimate import TokenEstimator
from brproxy.proxy.accounting import Account
from brproxy.proxy.events import EventReader
from tests.brproxy.proxy.test_accounting import FakeLease

FIRST = b'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n'
CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":" x"},"finish_reason":null}]}\n\n'
FINISH = b'data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2},"system_fingerprint":"f"}\n\n'
MARKED = FINISH[:-3] + b',"system_fingerprint":"f"}\n\n'
DONE = b"data: [DONE]\n\n"


def reader(name="vllm", *, asked=True):
    estimator = TokenEstimator(4.0, 8)
    account = Account(FakeLease(), make_dialect(name), RequestFacts("m"), estimator, usage_was_added=asked)
    return EventReader(account, 1 << 16)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=9))
def test_what_only_the_proxy_asked_for_stays_with_it(sizes):
    stream = FIRST + CHUNK * 3 + FINISH + USAGE + DONE
    events, passed, start, turn = reader(), b"", 0, 0
    while start < len(stream):
        size = sizes[turn % len(sizes)]
        assert events.read(stream[start : start + size]) is None
        passed += events.take()
        start, turn = start + size, turn + 1
    assert events.end() is None
    assert passed + events.take() == FIRST + CHUNK * 3 + MARKED + DONE


@pytest.mark.parametrize("name", ["openai", "sglang"])
def test_others_lose_one_event(name):
    events = reader(name)
    events.read(CHUNK + FINISH)
    assert events.take() == CHUNK + FINISH
    events.read(USAGE + DONE)
    assert events.take() == DONE


def test_what_a_client_asked_for_passes_as_it_comes():
    events = reader(asked=False)
    events.read(CHUNK + FINISH)
    assert events.take() == CHUNK + FINISH
    events.read(USAGE + DONE)
    assert events.take() == USAGE + DONE


def test_nothing_plain_overtakes_what_is_held():
    events = reader()
    events.read(CHUNK * 2 + FINISH)
    assert events.take() == CHUNK * 2
    assert not events.is_between
    events.read(CHUNK)
    assert events.take() == FINISH + CHUNK
    assert events.is_between


def test_what_is_held_goes_out_with_the_end():
    events = reader()
    events.read(CHUNK + FINISH)
    events.end()
    assert events.take() == CHUNK + FINISH
