"""What is held for others, in made-up time; and what the two sides say to each other."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.types import InvalidInputError
from loadgen.emulator.handover import FREED_AHEAD_MAX, Holdings
from loadgen.emulator.handover_wire import (
    Place,
    TransferFailedError,
    held_place,
    mooncake_ids,
    queried_url,
    query_page,
    read_named,
    reply_params,
    room_place,
)
from loadgen.emulator.settings import EmulatorSettings, Transfer

LEASE_S = 10.0
keys = st.sampled_from("abc")
operations = st.lists(
    st.one_of(
        st.tuples(st.just("hold"), keys, st.integers(0, 2), st.integers(0, 50)),
        st.tuples(st.just("renew"), keys, st.floats(0, 30)),
        st.tuples(st.just("fetched"), keys),
        st.tuples(st.just("free"), keys, st.booleans()),
        st.tuples(st.just("wait"), st.floats(0, 15)),
    ),
    max_size=40,
)


@given(operations)
def test_all_room_that_is_taken_is_given_back_once(operations):
    room, now_s, held, most = Counter(), 0.0, 0, 0

    def reserve(worker, tokens):
        room[worker] += tokens

    holdings = Holdings(LEASE_S, reserve)
    for operation, *arguments in operations:
        if operation == "wait":
            now_s += arguments[0]
        elif operation == "hold":
            held += holdings.hold(*arguments, now_s)
        elif operation == "renew":
            holdings.renew(arguments[0], now_s, arguments[1])
        elif operation == "fetched":
            was_there = holdings.get(*arguments, now_s) is not None
            assert holdings.fetched(*arguments, now_s) == was_there
        else:
            holdings.free(arguments[0], now_s, ahead=arguments[1])
        most = max(most, sum(room.values()))
        stats = holdings.stats(now_s)
        assert sum(room.values()) == stats["held_tokens"]
        assert stats["held_tokens_max"] == most
        assert min(room.values(), default=0) >= 0
        assert holdings.next_expiry_s is None or holdings.next_expiry_s > now_s
    holdings.expire(now_s + 1000)
    counts = holdings.counts
    assert not any(room.values())
    # What was freed ahead is counted as freed and was never held.
    gone = counts.fetched_requests + counts.freed_requests + counts.expired_requests
    assert held <= gone <= held + sum(operation == "hold" for operation, *_ in operations)


def test_a_lease():
    holdings = Holdings(LEASE_S, lambda worker, tokens: None)
    holdings.hold("a", 0, 5, 0.0)
    assert holdings.get("a", 9.9).kv_tokens == 5
    assert holdings.renew("a", 9.0, 5.0)
    assert holdings.get("a", 13.9)
    assert holdings.renew("a", 13.9, 0.0), "a renewal shortens none"
    assert holdings.expire(14.0) == ["a"]
    assert not holdings.renew("a", 14.0, 5.0)
    assert not holdings.fetched("a", 14.0)
    assert holdings.counts.expired_requests == 1


def test_what_is_freed_ahead_is_not_held_for_the_length_of_a_lease():
    holdings = Holdings(LEASE_S, lambda worker, tokens: None)
    holdings.free("a", 0.0, ahead=True)
    assert not holdings.hold("a", 0, 5, 9.9)
    assert holdings.hold("a", 0, 5, 9.9), "once"
    holdings.free("b", 0.0, ahead=True)
    assert holdings.hold("b", 0, 5, 10.0)
    holdings.free("c", 10.0)
    assert holdings.hold("c", 0, 5, 10.0)
    for number in range(FREED_AHEAD_MAX + 1):
        holdings.free(str(number), 10.0, ahead=True)
    assert holdings.hold("0", 0, 5, 10.0), "the oldest is forgotten"
    assert not holdings.hold("1", 0, 5, 10.0)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "prefill-0.example"])
@pytest.mark.parametrize("transfer", [Transfer.NIXL, Transfer.ASCEND])
def test_a_reply_says_where_its_kv_is(transfer, host):
    params = reply_params(transfer, (host, 8001), "engine", "id", 33)
    url = "http://[::1]:8001" if host == "::1" else f"http://{host}:8001"
    assert held_place(params) == Place(url, "engine", "id")
    assert len(params["remote_block_ids"][0]) == 3


def test_a_bootstrap_server_says_where_each_rank_is():
    page = query_page({0: "x_dp0", 1: "x_dp1"}, "http://here:1")
    assert page["1"]["engine_id"] == "x_dp1"
    assert queried_url(page, "x_dp1") == "http://here:1"
    with pytest.raises(TransferFailedError, match="knows no engine 'y'"):
        queried_url(page, "y")
    for wrong in ([], {"0": {}}, {"0": {"engine_id": "x", "worker_addr": []}}):
        with pytest.raises(TransferFailedError):
            queried_url(wrong, "x")
    ids = {"remote_bootstrap_addr": "http://here:8998", "remote_engine_id": "x", "transfer_id": "t"}
    assert mooncake_ids(ids) == ("http://here:8998", Place("", "x", "t"))
    with pytest.raises(TransferFailedError, match="transfer_id must be a text"):
        mooncake_ids(ids | {"transfer_id": 5})


def test_a_room():
    body = {"bootstrap_host": "[::1]", "bootstrap_port": None, "bootstrap_room": 7}
    assert room_place(body, 0) == Place("http://[::1]:8998", "", "7")
    assert room_place(body, 9000).url == "http://[::1]:9000"
    assert room_place(body | {"bootstrap_port": 1, "disagg_prefill_dp_rank": 3}, 9000) == Place(
        "http://[::1]:1", "3", "7"
    )
    for wrong in (
        {"bootstrap_room": None},
        {"bootstrap_room": 1 << 63},
        {"bootstrap_room": True},
        {"bootstrap_port": 0},
        {"bootstrap_host": "x" * 2000},
        {"disagg_prefill_dp_rank": -1},
    ):
        with pytest.raises(InvalidInputError):
            room_place(body | wrong, 0)


@pytest.mark.parametrize("document", [None, [], {"engine": "x"}, {"engine": 1, "request_id": "x"}])
def test_what_names_nothing(document):
    with pytest.raises(InvalidInputError):
        read_named(document)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"role": "prefil"}, "a role is one of both, prefill, decode"),
        ({"transfer": "rdma"}, "a transfer one of nixl, mooncake"),
        ({"role": "prefill"}, "with the role prefill need a transfer"),
        ({"role": "decode", "transfer": "sglang"}, "the transfer sglang is SGLang's"),
        ({"role": "decode", "transfer": "nixl", "sglang": True}, "the transfer sglang is SGLang's"),
        ({"transfer": "sglang", "sglang": True}, "is for prefill or for decode"),
        ({"lease_s": 0.0}, "lease_s must be more than 0"),
        ({"transfer_ms_per_ktoken": -1.0}, "at least 0 ms"),
        ({"recomputed_share": 1.1}, "a share is in 0 to 1"),
    ],
)
def test_impossible_settings(settings, words):
    with pytest.raises(InvalidInputError, match=words):
        EmulatorSettings(**settings)


def test_leases_are_the_engines():
    waits = {t: EmulatorSettings(role="decode", transfer=t, sglang=t == "sglang").wait_s for t in Transfer}
    assert waits == {
        "nixl": 30.0,
        "mooncake": 480.0,
        "ascend": 480.0,
        "ascend-layerwise": 480.0,
        "sglang": 300.0,
    }
    assert EmulatorSettings(role="decode", transfer="nixl", lease_s=5.0).wait_s == 5.0
