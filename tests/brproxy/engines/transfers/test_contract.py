"""What every transfer keeps to, whatever a client or an engine says."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.edits import read_object
from brproxy.engines.rewrite import MEMBERS_MAX
from brproxy.engines.transfer import TRANSFERS, Handoff, Order, TransferError, make_transfer
from tests.brproxy.engines.json_members import objects, others_keep_their_bytes, values, written_values

NAMES = TRANSFERS.names()
PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/generate")
PARAMS = {"remote_engine_id": "e", "remote_block_ids": [1, 2]}
HANDOFF = Handoff(
    transfer_id="xfer-7",
    room=1001,
    prefill_host="10.0.0.7",
    bootstrap_port=9100,
    prefill_rank=3,
    prefill_ranks=8,
    engine_id="engine",
    params=json.dumps(PARAMS).encode(),
    metaserver="http://proxy/v1/metaserver",
)
BOOTSTRAP = {"bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key"}
RANKS = {"disagg_prefill_dp_rank", "routed_dp_rank", "data_parallel_rank"}
MINIMA = {"min_tokens", "min_completion_tokens", "min_new_tokens"}
LIMITS = {"max_tokens", "max_completion_tokens", "max_output_tokens"}
MEANT = {"kv_transfer_params"} | BOOTSTRAP | RANKS
CHANGED = MEANT | LIMITS | MINIMA | {"stream", "stream_options", "background", "sampling_params"}

members = (
    st.tuples(st.sampled_from([*sorted(CHANGED - {"sampling_params"}), "model", "é", "seed"]), written_values)
    | st.tuples(st.just("prompt"), st.sampled_from(['"a, b"', "[1, 2]", '["a"]', "[[1,2]]", "null"]))
    | st.tuples(st.just("n"), st.sampled_from(["1", "null"]))
    | st.tuples(
        st.just("sampling_params"),
        st.sampled_from(
            ["null", "{}", '{"min_tokens":5, "max_tokens":9 ,"a":[1]}', '{"n":1,"min_new_tokens":2}']
        ),
    )
)
bodies = objects(st.lists(members, max_size=8))
paths = st.sampled_from(PATHS)
every_transfer = pytest.mark.parametrize("name", NAMES)


def meant(name):
    """Return the members by which a transfer's legs are told of each other."""
    return BOOTSTRAP | RANKS if name == "sglang" else {"kv_transfer_params"}


@given(document=bodies, path=paths)
def test_the_prefill_leg_makes_one_token_in_one_piece(document, path):
    body, written = document
    asked = json.loads(body)
    for name in NAMES:
        leg = make_transfer(name).prefill_body(path, body, HANDOFF)
        said = json.loads(leg)
        others_keep_their_bytes(leg, written, CHANGED)
        assert said["stream"] is False
        assert "stream_options" not in said
        if name == "sglang":
            kept = LIMITS | MINIMA | {"sampling_params"}
            assert repr([said.get(key) for key in kept]) == repr([asked.get(key) for key in kept])
        else:
            is_one_token(name, path, said, asked)


def is_one_token(name, path, said, asked):
    """Assert that a leg for vLLM asks for one token, whatever the client did."""
    limits, before = said, asked
    if path == "/generate":
        limits, before = said["sampling_params"], asked.get("sampling_params") or {}
        others = before.keys() - LIMITS - MINIMA
        assert {key: limits[key] for key in limits.keys() - LIMITS - MINIMA} == {
            key: before[key] for key in others
        }
    assert limits["max_output_tokens" if path == "/v1/responses" else "max_tokens"] == 1
    assert ("max_completion_tokens" in limits) == ("max_completion_tokens" in before)
    assert limits.get("max_completion_tokens", 1) == 1
    minimum = {"min_tokens": 1} if name.startswith("ascend") else {}
    assert {key: limits[key] for key in MINIMA if key in limits} == minimum


@given(document=bodies, path=paths)
def test_the_decode_leg_is_the_client_s_but_for_what_is_handed_over(document, path):
    body, written = document
    for name in NAMES:
        leg = make_transfer(name).decode_body(path, body, HANDOFF)
        others_keep_their_bytes(leg, written, meant(name))
        assert read_object(leg).edited({}, meant(name)) == read_object(body).edited({}, meant(name))
        again = make_transfer(name).decode_body(path, leg, HANDOFF)
        assert again == leg, f"{name}: what a client says of a transfer makes a difference"


@given(document=bodies, path=paths)
def test_the_leg_that_frees_fetches_the_same_for_one_token(document, path):
    body, written = document
    for name in NAMES:
        transfer = make_transfer(name)
        leg = transfer.free_body(path, body, HANDOFF)
        others_keep_their_bytes(leg, written, CHANGED | {"cache_salt"})
        said, decoded = json.loads(leg), json.loads(transfer.decode_body(path, body, HANDOFF))
        assert said["stream"] is False
        assert said["cache_salt"] == f"{HANDOFF.room:x}"
        assert [said.get(key) for key in meant(name)] == [decoded.get(key) for key in meant(name)]
        limits, limit = said, "max_output_tokens" if path == "/v1/responses" else "max_tokens"
        if path == "/generate":
            limits = said["sampling_params"]
            limit = "max_new_tokens" if name == "sglang" else "max_tokens"
        assert limits[limit] == 1
        assert not limits.keys() & MINIMA


@given(document=bodies, path=paths)
def test_a_body_that_was_read_makes_the_same_legs_however_often(document, path):
    body, _ = document
    for name in NAMES:
        transfer = make_transfer(name)
        read = transfer.read(path, body)
        for leg in (transfer.prefill_body, transfer.decode_body, transfer.free_body) * 2:
            assert leg(path, read, HANDOFF) == leg(path, body, HANDOFF)
        assert read.body is body


@given(document=bodies)
def test_who_decodes_alone_gets_nothing_of_a_transfer(document):
    body, written = document
    for name in NAMES:
        alone = make_transfer(name).alone_body(body)
        others_keep_their_bytes(alone, written, {"kv_transfer_params"})
        assert "kv_transfer_params" not in json.loads(alone)


def legs(name, path, body):
    transfer = make_transfer(name)
    return (lambda: transfer.prefill_body(path, body, HANDOFF)), (
        lambda: transfer.decode_body(path, body, HANDOFF)
    )


@every_transfer
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", b""),
        ("/v1/completions", b"[1]"),
        ("/v1/completions", b'{"prompt":'),
        ("/v1/completions", '{"prompt":"a"}'.encode("utf-16")),
        ("/v1/completions", b"{" + b",".join([b'"stream":true'] * MEMBERS_MAX) + b"}"),
        ("/v1/completions", b'{"prompt":"a","n":2}'),
        ("/v1/completions", b'{"prompt":"a","use_beam_search":true}'),
        ("/generate", b'{"text":"a","sampling_params":{"n":4}}'),
        ("/v1/embeddings", b'{"input":"a"}'),
    ],
)
def test_a_body_that_cannot_be_handed_over_is_refused_by_both_legs(name, path, body):
    for leg in legs(name, path, body):
        with pytest.raises(TransferError) as error:
            leg()
        assert "\n" not in str(error.value)


@every_transfer
@given(data=st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode()))
def test_whatever_engines_say_is_read_without_an_error(name, data):
    transfer = make_transfer(name)
    assert transfer.read_post(data) is None
    assert transfer.asks_again(data) is False
    assert transfer.read_bootstrap(data, 0) is None
    assert transfer.read_reply(data) is None


@every_transfer
@given(
    value=values,
    key=st.sampled_from(["kv_transfer_params", "request_id", "choices", "stop_reason", "0", "engine_id"]),
)
def test_whatever_is_in_the_place_of_an_answer_is_read_without_an_error(name, value, key):
    transfer = make_transfer(name)
    for document in ({key: value}, {key: [{key: value}]}, {key: {key: value}}):
        data = json.dumps(document).encode()
        transfer.read_post(data)
        transfer.asks_again(data + b'"recomputed"')
        transfer.read_bootstrap(data, 0)
        transfer.read_bootstrap(data, None)
        params = transfer.read_reply(data)
        assert params is None or json.loads(params)


def test_what_each_needs_before_its_legs():
    found = {name: make_transfer(name) for name in NAMES}
    assert {name: transfer.ORDER for name, transfer in found.items()} == {
        "ascend": Order.PREFILL_FIRST,
        "ascend-layerwise": Order.DECODE_FIRST,
        "mooncake": Order.TOGETHER,
        "nixl": Order.PREFILL_FIRST,
        "sglang": Order.TOGETHER,
    }
    assert {name for name in NAMES if found[name].frees_by_decode()} == {"nixl", "ascend"}
    assert {name for name in NAMES if not found[name].DECODES_ALONE} == {"sglang"}
    assert {name: found[name].LEASE_S for name in NAMES if found[name].LEASE_S} == {
        "nixl": 25.0,
        "ascend": 450.0,
    }
    assert {name for name in NAMES if found[name].BOOTSTRAP_PATH} == {"mooncake"}
