"""The file that is written from what engines say: valid whatever they say, and what they say is in it."""

import tomllib
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from brproxy.config import parse_config
from brproxy.engines.identity import Identity, Model
from brproxy.findings import Finding
from brproxy.first_file import entries, file_text

NAMES = st.text(max_size=20).filter(lambda name: name and name.isprintable())
MODELS = st.lists(
    st.builds(Model, NAMES, st.just("") | NAMES, st.none() | st.integers(1, 1 << 32)), max_size=4
)
COUNTS = st.none() | st.integers(1, 1 << 20)
IDENTITIES = st.builds(
    Identity,
    st.sampled_from(["vllm", "sglang", "openai"]),
    st.just("") | NAMES,
    MODELS.map(lambda models: tuple({model.name: model for model in models}.values())),
    COUNTS,
    COUNTS,
    st.none() | st.integers(1, 64),
    st.sampled_from([None, "both", "prefill", "decode"]),
    st.integers(0, 64_000),
)


@st.composite
def found(draw):
    identities = draw(st.lists(IDENTITIES | st.none() | st.text(max_size=20), min_size=1, max_size=6))
    # Groups of more than one.
    identities += draw(st.lists(st.sampled_from(identities), max_size=3))
    return [
        Finding(f"http://h:{port}", None, identity or "silence")
        if identity is None or isinstance(identity, str)
        else Finding(f"http://h:{port}", identity)
        for port, identity in enumerate(identities, 1)
    ]


@given(found())
def test_the_file_is_valid_and_says_what_was_found(findings):
    known = [finding for finding in findings if finding.identity is not None]
    document = tomllib.loads(file_text(findings))
    assert document.get("worker", []) == [entry.keys for entry in entries(findings)]
    if not known:
        return
    config = parse_config(document, "x")
    assert [worker.url for worker in config.worker] == [finding.url for finding in known]
    for worker, finding in zip(config.worker, known, strict=True):
        identity = finding.identity
        slots, kv_tokens = identity.limits(by_rank=True)
        assert len(worker.seats) == (identity.ranks or 1)
        assert worker.engine == identity.engine
        assert worker.slots == (slots or 64)
        assert worker.kv_capacity_tokens == kv_tokens
        assert worker.models <= set(identity.names)
        assert worker.models >= identity.bases
    kinds = {}
    for f in known:
        kinds.setdefault((f.identity.bases, f.identity.engine), set()).add(f.identity.role)
    split = sum("prefill" in roles and len(roles) > 1 for roles in kinds.values())
    assert len(config.groups) == len(kinds) + split


def tables(*identities):
    return [
        entry.keys for entry in entries(Finding(f"http://h:{i}", one) for i, one in enumerate(identities, 1))
    ]


def test_one_group_has_the_default_s_name():
    one = Identity("vllm", models=(Model("m"),))
    assert [keys.get("group") for keys in tables(one, one)] == [None, None]


def test_groups_are_named_by_model_and_where_that_is_not_enough_by_more():
    identities = [
        Identity("vllm", models=(Model("m"),)),
        Identity("sglang", models=(Model("m"),)),
        Identity("sglang", models=(Model("m"), Model("n"))),
        Identity("vllm", models=(Model("m"), Model("n"))),
        Identity("openai"),
        Identity("vllm", models=(Model("m"),)),
    ]
    names = [keys["group"] for keys in tables(*identities)]
    assert names == ["m", "m-sglang", "m-2", "m-vllm", "openai", "m"]


def test_an_adapter_that_only_some_have_is_left_out_of_the_group():
    with_adapter = Identity("vllm", models=(Model("m"), Model("a", "m"), Model("b", "m")))
    without = Identity("vllm", models=(Model("m"), Model("b", "m")))
    assert [keys["model"] for keys in tables(with_adapter, without)] == [["b", "m"]] * 2
    text = file_text([Finding("http://h:1", with_adapter), Finding("http://h:2", without)])
    assert text.count("# Served here, but not by the whole group, and left out: a\n") == 1


def test_what_has_to_be_typed_has_a_line_that_says_how():
    text = file_text([Finding("http://h:1", Identity("vllm", "0.33.0", (Model("m", "", 4096),)))])
    assert "# vLLM 0.33.0\n# m: up to 4,096 tokens\n[[worker]]\n" in text
    assert "it is --max-num-seqs on its command line" in text
    assert "\n# slots = 64\n" in text
    uncommented = text.replace("# slots = 64", "slots = 512").replace("# kv_cap", "kv_cap")
    (worker,) = parse_config(tomllib.loads(uncommented), "x").worker
    assert (worker.slots, worker.kv_capacity_tokens) == (512, 500_000)


def test_who_did_not_answer_is_there_to_be_uncommented():
    text = file_text([Finding("http://h:1", Identity("openai")), Finding("http://h:2", None, "no\nanswer")])
    assert "# Left out, since nobody knows who is there: no?answer\n" in text
    uncommented = text.replace("# [[worker]]\n# url", "[[worker]]\nengine = 'openai'\nurl")
    assert [worker.url for worker in parse_config(tomllib.loads(uncommented), "x").worker][1] == "http://h:2"


def test_ranks_become_workers_of_their_own():
    identity = Identity("sglang", slots=100, kv_capacity_tokens=1000, ranks=8)
    (keys,) = tables(identity)
    assert (keys["ranks"], keys["rank_mode"], keys.get("rank_base")) == ("0-7", "global", None)
    assert (keys["slots"], keys["kv_capacity_tokens"]) == (100, 1000)
    (second_node,) = tables(Identity("vllm", ranks=4, first_rank=4))
    assert (second_node["ranks"], second_node.get("rank_mode"), second_node["rank_base"]) == ("4-7", None, 4)
    assert "ranks" not in tables(Identity("vllm", ranks=1, first_rank=3))[0]


def test_a_half_of_prefill_and_decode_is_marked():
    text = file_text([Finding("http://h:1", Identity("sglang", "0.5", role="prefill"))])
    assert "# SGLang 0.5, role: prefill\n# It does one half of the work" in text


def test_halves_that_belong_together_are_one_group():
    prefill = Identity("sglang", models=(Model("m"),), role="prefill", bootstrap_port=9000)
    keys = tables(prefill, replace(prefill, role="decode"), replace(prefill, role="decode", ranks=2))
    assert [one.get("role") for one in keys] == ["prefill", "decode", "decode"]
    assert [one.get("bootstrap_port") for one in keys] == [9000, None, None]
    config = parse_config({"worker": keys}, "x")
    assert config.group_sizes == {"default/prefill": 1, "default": 3}
    # Who does all of it decodes as well.
    assert [one.get("role") for one in tables(prefill, Identity("sglang", models=(Model("m"),)))] == [
        "prefill",
        None,
    ]
