"""Who is behind a URL: from the pages of either engine, and from pages that nobody should send."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.identity import (
    LOADS,
    METRICS,
    MODELS,
    MODELS_MAX,
    OLD_SERVER_INFO,
    RANKS_MAX,
    SERVER_INFO,
    SLOTS_MAX,
    VERSION,
    Identity,
    Model,
    identify,
    questions,
)
from brproxy.types import TOKENS_MAX
from tests.brproxy.engine_pages import (
    LORA,
    MODEL,
    OPENAI,
    SGLANG,
    VLLM,
    cache_config,
    loads,
    models,
    server_info,
)

PATHS = (VERSION, MODELS, METRICS, SERVER_INFO, OLD_SERVER_INFO, LOADS)


def asked(pages):
    """Return the pages that were asked for, as a server that has ``pages`` answers."""
    answers = {}
    while paths := questions(answers):
        answers |= {path: pages.get(path) for path in paths}
    return answers


def test_vllm():
    assert identify(asked(VLLM)) == Identity(
        "vllm", "0.33.0", (Model(MODEL, "", 131_072), Model(LORA, MODEL)), None, 921_600, 1
    )


def test_the_ranks_of_vllm_are_those_of_its_metrics():
    page = cache_config(
        engine=["4", "5", "6"], kv_cache_size_tokens=["900", "800", "900"], num_gpu_blocks="9000"
    )
    identity = identify(VLLM | {METRICS: page})
    assert (identity.ranks, identity.first_rank, identity.kv_capacity_tokens) == (3, 4, 800)


@pytest.mark.parametrize(
    ("labels", "first"), [(["8", "9"], 8), (["8", "10"], 0), (["8", "x"], 0), (["70000", "70001"], 0)]
)
def test_only_a_row_of_ranks_has_a_first_one(labels, first):
    identity = identify(VLLM | {METRICS: cache_config(engine=labels)})
    assert (identity.ranks, identity.first_rank) == (2, first)


@pytest.mark.parametrize("said", ["None", "", "-5", "1e5", "9" * 30])
def test_an_older_vllm_tells_blocks_of_all_ranks_together(said):
    page = cache_config(engine=["0", "1"], kv_cache_size_tokens=said, num_gpu_blocks="1000", block_size="16")
    identity = identify(VLLM | {METRICS: page})
    assert (identity.ranks, identity.kv_capacity_tokens) == (2, 8000)


def test_a_vllm_that_wants_a_key_is_known_by_its_metrics():
    identity = identify({VERSION: VLLM[VERSION], MODELS: None, METRICS: VLLM[METRICS]})
    assert identity == Identity("vllm", "0.33.0", (), None, 921_600, 1)


def test_sglang():
    assert identify(asked(SGLANG)) == Identity(
        "sglang", "0.5.23", (Model(MODEL, "", 131_072),), 256, 440_000, 1, "both"
    )


def test_an_older_sglang_has_its_page_elsewhere_and_no_loads():
    pages = {MODELS: SGLANG[MODELS], OLD_SERVER_INFO: server_info(dp_size=2)}
    assert identify(asked(pages)) == Identity(
        "sglang", "0.5.23", (Model(MODEL, "", 131_072),), 256, 440_000, 2, "both"
    )


def test_ranks_of_sglang_say_their_own_limits_and_the_least_counts():
    pages = SGLANG | {
        SERVER_INFO: server_info(dp_size=2),
        LOADS: loads((0, 128, 300_000), (1, 120, 310_000)),
    }
    identity = identify(pages)
    assert (identity.slots, identity.kv_capacity_tokens, identity.ranks) == (120, 300_000, 2)


@pytest.mark.parametrize(("attention", "slots"), [(True, 64), (False, 256)])
def test_slots_of_the_command_line_are_shared_by_ranks_with_dp_attention(attention, slots):
    info = server_info(dp_size=4, enable_dp_attention=attention, max_running_requests=256, internal_states=[])
    identity = identify(SGLANG | {SERVER_INFO: info, LOADS: None})
    assert (identity.slots, identity.kv_capacity_tokens) == (slots, 450_000)


@pytest.mark.parametrize(
    ("mode", "role"),
    [("null", "both"), ("prefill", "prefill"), ("decode", "decode"), ("x", None), ([], None)],
)
def test_the_role_of_sglang(mode, role):
    assert identify(SGLANG | {SERVER_INFO: server_info(disaggregation_mode=mode)}).role == role


def test_any_other_server():
    assert identify(asked(OPENAI)) == Identity("openai", models=(Model(MODEL, "", 131_072),))
    assert identify(asked({})) is None
    assert identify(asked({MODELS: b"<html>", VERSION: VLLM[VERSION]})) is None


def test_nobody_is_asked_for_another_engine_s_pages_once_it_is_known():
    assert set(asked(VLLM)) == {VERSION, MODELS, METRICS}
    assert set(asked(SGLANG)) == {VERSION, MODELS, SERVER_INFO, LOADS}
    assert OLD_SERVER_INFO not in asked(OPENAI)
    assert questions({}) == (VERSION, MODELS)


def test_all_ranks_together():
    identity = Identity("sglang", slots=100, kv_capacity_tokens=1000, ranks=4)
    assert identity.limits(by_rank=True) == (100, 1000)
    assert identity.limits(by_rank=False) == (400, 4000)
    assert Identity("vllm", ranks=4).limits(by_rank=False) == (None, None)


def test_limits():
    many = models("vllm", *(f"m{number}" for number in range(MODELS_MAX + 5)))
    assert len(identify({MODELS: many}).models) == MODELS_MAX
    pages = SGLANG | {SERVER_INFO: server_info(dp_size=1e300), LOADS: loads((0, 1 << 90, 1 << 90))}
    identity = identify(pages)
    assert (identity.slots, identity.kv_capacity_tokens) == (SLOTS_MAX, TOKENS_MAX)
    assert identity.ranks == RANKS_MAX


@pytest.mark.parametrize("name", ["", "a\nb", "a\x1b[2J", "\u2028", "x" * 300, None, 7, ["a"]])
def test_what_cannot_be_shown_in_a_line_is_no_name(name):
    body = json.dumps({"data": [{"id": name, "owned_by": "vllm"}, {"id": "m", "parent": name}]}).encode()
    version = json.dumps({"version": name}).encode()
    identity = identify({MODELS: body, VERSION: version})
    assert (identity.names, identity.version, identity.models[0].parent) == (("m",), "", "")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(
    [
        *("data", "loads", "internal_states", "memory_usage", "token_capacity", "dp_size", "dp_rank", "id"),
        *("owned_by", "parent", "max_model_len", "max_running_requests", "max_total_num_tokens", "version"),
        *("disaggregation_mode", "enable_dp_attention", "effective_max_running_requests_per_dp"),
    ]
)
ROWS = st.lists(st.dictionaries(KEYS, JSON | st.sampled_from(["vllm", "sglang", "null"])), max_size=4)
DOCUMENTS = st.dictionaries(KEYS, JSON | ROWS | ROWS.map(lambda rows: {"memory_usage": rows}), max_size=8)
BODIES = (
    st.none()
    | st.binary(max_size=60)
    | DOCUMENTS.map(lambda document: json.dumps(document).encode())
    | st.builds(
        lambda ranks, size, blocks: cache_config(
            engine=ranks, kv_cache_size_tokens=size, num_gpu_blocks=blocks
        ),
        st.lists(st.text("0123x", max_size=3), max_size=3),
        st.text("019-e.N", max_size=30),
        st.text("019-e.N", max_size=30),
    )
)


@given(st.dictionaries(st.sampled_from(PATHS), BODIES))
def test_no_pages_break_it(pages):
    questions(pages)
    identity = identify(pages)
    if identity is None:
        return
    assert identity.engine in {"vllm", "sglang", "openai"}
    for number, most in (
        (identity.slots, SLOTS_MAX),
        (identity.kv_capacity_tokens, TOKENS_MAX),
        (identity.ranks, RANKS_MAX),
    ):
        assert number is None or 1 <= number <= most
    assert len(set(identity.names)) == len(identity.models)
    assert all(name and name.isprintable() for name in identity.names)


@given(
    st.dictionaries(st.sampled_from(PATHS), st.none() | st.sampled_from([*VLLM.values(), *SGLANG.values()]))
)
def test_questions_come_to_an_end(has):
    assert set(asked(has)) <= set(PATHS)
