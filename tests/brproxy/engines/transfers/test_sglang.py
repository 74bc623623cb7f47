"""SGLang's rooms: both legs name the same, and it leads to the rank that was chosen."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.transfer import Handoff, TransferError, make_transfer
from brproxy.types import SEQUENCES_MAX

CHAT = "/v1/chat/completions"
HANDOFF = Handoff("xfer-7", 1001, prefill_host="p.example", bootstrap_port=8998)
SGLANG = make_transfer("sglang")


def legs(path, body, handoff):
    return [json.loads(leg(path, body, handoff)) for leg in (SGLANG.prefill_body, SGLANG.decode_body)]


def test_both_legs_byte_for_byte():
    body = (
        b'{"stream":true, "min_tokens":4,"max_tokens":9,"stream_options":{},"routed_dp_rank":1,'
        b'"bootstrap_room":5,"disagg_prefill_dp_rank":1}'
    )
    met = b'"bootstrap_host":"p.example","bootstrap_port":8998,"bootstrap_room":1001'
    assert SGLANG.prefill_body(CHAT, body, HANDOFF) == (
        b'{"stream":false,' + met + b', "min_tokens":4,"max_tokens":9}'
    )
    assert SGLANG.decode_body(CHAT, body, HANDOFF) == (
        b"{" + met + b',"stream":true, "min_tokens":4,"max_tokens":9,"stream_options":{}}'
    )


@given(
    room=st.integers(0, (1 << 62) - 1),
    ranks=st.integers(1, 256),
    rank=st.integers(0, 255),
    count=st.none() | st.integers(1, 20),
)
def test_rooms_lead_to_the_chosen_rank(room, ranks, rank, count):
    rank %= ranks
    handoff = HANDOFF._replace(room=room, prefill_rank=rank, prefill_ranks=ranks)
    prompt = "a" if count is None else ["a"] * count
    prefill, decode = legs("/v1/completions", json.dumps({"prompt": prompt}).encode(), handoff)
    rooms = prefill["bootstrap_room"]
    assert rooms == decode["bootstrap_room"]
    assert prefill["disagg_prefill_dp_rank"] == decode["disagg_prefill_dp_rank"] == rank
    if count is not None:
        for leg in (prefill, decode):
            assert leg["bootstrap_host"] == ["p.example"] * count
            assert leg["bootstrap_port"] == [8998] * count
        assert len(set(rooms)) == len(rooms) == count
    for each in [rooms] if count is None else rooms:
        assert each % ranks == rank
        assert room <= each < 1 << 63


def test_a_server_that_is_one_worker_is_told_no_rank():
    for leg in legs(CHAT, b'{"disagg_prefill_dp_rank":3}', HANDOFF._replace(prefill_ranks=8)):
        assert "disagg_prefill_dp_rank" not in leg
        assert leg["bootstrap_room"] == 1001


def test_a_port_that_is_not_known_is_null():
    for leg in legs(CHAT, b"{}", HANDOFF._replace(bootstrap_port=None)):
        assert leg["bootstrap_port"] is None


@pytest.mark.parametrize(
    ("body", "count"),
    [
        (b'{"text":"a"}', None),
        (b'{"text":["a"]}', 1),
        (b'{"input_ids":[1,2,3]}', None),
        (b'{"input_ids":[[1,2],[3]],"sampling_params":[{"n":1},{}]}', 2),
    ],
)
def test_batches_of_its_own_api(body, count):
    for leg in legs("/generate", body, HANDOFF):
        rooms = leg["bootstrap_room"]
        assert (len(rooms) if type(rooms) is list else None) == count


def test_a_batch_without_end_is_refused():
    body = json.dumps({"prompt": ["a"] * (SEQUENCES_MAX + 1)}).encode()
    with pytest.raises(TransferError, match=f"at most {SEQUENCES_MAX} prompts"):
        SGLANG.decode_body("/v1/completions", body, HANDOFF)


def test_what_it_does_not_hand_over():
    with pytest.raises(TransferError, match="/v1/messages is not handed over"):
        SGLANG.prefill_body("/v1/messages", b'{"max_tokens":1}', HANDOFF)
