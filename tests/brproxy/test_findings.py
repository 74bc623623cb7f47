"""What the file says beside what engines say: gaps are filled, contradictions told, the file holds."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.config import parse_config
from brproxy.engines.identity import Identity, Model
from brproxy.findings import NOT_ASKED, Finding, changes, completed, contradictions, told

URL = "http://h:1"
SGLANG = Identity("sglang", "0.5.23", (Model("m"),), 256, 440_000, 1)
VLLM = Identity("vllm", "0.33.0", (Model("m"), Model("a", "m")), None, 921_600, 1)


def config(**keys):
    return parse_config({"worker": [{"url": URL} | keys]}, "x")


def worker_of(config, identity):
    (worker,) = completed(config.worker, {URL: Finding(URL, identity, "" if identity else "silence")})
    return worker


@pytest.mark.parametrize(
    ("keys", "identity", "slots", "kv_tokens"),
    [
        ({}, SGLANG, 256, 440_000),
        ({}, VLLM, 64, 921_600),
        ({}, None, 64, None),
        ({"slots": 64}, SGLANG, 64, 440_000),
        ({"slots": 8, "kv_capacity_tokens": 5}, SGLANG, 8, 5),
        ({}, Identity("sglang", slots=256, kv_capacity_tokens=1000, ranks=2), 512, 2000),
        ({}, Identity("sglang", slots=1 << 20, ranks=1000), 1 << 20, None),
        ({"ranks": "0-1"}, Identity("sglang", slots=256, kv_capacity_tokens=1000, ranks=2), 256, 1000),
    ],
)
def test_only_what_the_file_leaves_out_is_filled_in(keys, identity, slots, kv_tokens):
    asked = config(**keys)
    worker = worker_of(asked, identity)
    assert (worker.slots, worker.kv_capacity_tokens) == (slots, kv_tokens)
    assert worker.model_fields_set == asked.worker[0].model_fields_set, "what the file gave is still known"
    assert (asked.worker[0].slots, asked.worker[0].label) == (keys.get("slots", 64), worker.label)


@pytest.mark.parametrize(
    ("keys", "identity", "lines"),
    [
        ({}, SGLANG, ['engine = "vllm" by default, but it is SGLang 0.5.23']),
        ({"engine": "sglang"}, SGLANG, []),
        ({"engine": "openai"}, SGLANG, []),
        (
            {"engine": "sglang", "slots": 64, "kv_capacity_tokens": 500},
            SGLANG,
            [
                "slots = 64 in the file, but it runs 256 at once",
                "kv_capacity_tokens = 500 in the file, but it has 440000",
            ],
        ),
        ({"engine": "sglang", "slots": 256, "kv_capacity_tokens": 440_000, "model": "m"}, SGLANG, []),
        ({"engine": "sglang"}, VLLM, ['engine = "sglang" in the file, but it is vLLM 0.33.0']),
        ({"slots": 7, "model": ["m", "a"]}, VLLM, []),
        ({"model": ["m", "b", "c"]}, VLLM, ["configured but not served: b, c"]),
        ({"model": "m"}, Identity("vllm"), []),
        (
            {},
            Identity("vllm", ranks=8),
            ["8 DP ranks are behind this URL, and the file has 1"],
        ),
        ({"ranks": "0-7"}, Identity("vllm", ranks=8), []),
        ({"ranks": "0-7"}, Identity("vllm"), []),
    ],
)
def test_contradictions(keys, identity, lines):
    assert list(contradictions(config(**keys).worker[0], identity)) == lines


@pytest.mark.parametrize(
    ("keys", "identity", "line"),
    [
        (
            {},
            SGLANG,
            "SGLang 0.5.23; slots: 256 (it says); KV capacity: 440,000 tokens (it says); models: m",
        ),
        (
            {"kv_capacity_tokens": 90_000},
            VLLM,
            "vLLM 0.33.0; slots: 64 (the default; it does not say); KV capacity: 90,000 tokens; models: m, a",
        ),
        (
            {"slots": 1024},
            Identity("openai", ranks=None),
            "an OpenAI-compatible server; slots: 1,024; KV capacity: unknown; models: none reported",
        ),
        (
            {"slots": 8},
            Identity("sglang", "0.5", (Model("m"),), 4, 10, 2, "decode"),
            "SGLang 0.5; slots: 8; KV capacity: 20 tokens (it says); DP ranks: 2; role: decode; models: m",
        ),
    ],
)
def test_a_line_for_each(keys, identity, line):
    assert told(config(**keys).worker[0], identity) == line


COUNTS = st.none() | st.integers(1, 3)
FILES = st.fixed_dictionaries(
    {}, optional={"slots": st.integers(7, 9), "kv_capacity_tokens": st.integers(7, 9)}
)
ANSWERS = st.builds(
    Identity, st.sampled_from(["vllm", "sglang"]), slots=COUNTS, kv_capacity_tokens=COUNTS
) | st.sampled_from([None, "not asked"])
KEYS = {"slots": 64, "kv_capacity_tokens": None}
"""Keys that are filled in, and their defaults."""


@given(st.lists(st.tuples(FILES, ANSWERS), min_size=1, max_size=6))
def test_what_an_engine_has_said_is_known_whatever_it_answers_later(reloads):
    running, last, engine, heard = [], {}, None, None
    for file, answer in reloads:
        asked = config(**file)
        identity = answer if isinstance(answer, Identity) else None
        findings = NOT_ASKED if answer == "not asked" else {URL: Finding(URL, identity, "silence")}
        running = completed(asked.worker, findings, running)
        if identity is not None:
            last = last if engine in {None, identity.engine} else {}
            engine, heard = identity.engine, identity
        for key, default in KEYS.items():
            said = getattr(identity, key, None)
            if key in file:
                last[key] = file[key], "file"
            elif said is not None:
                last[key] = said, "engine"
            elif answer is not None and last.get(key, (None, "engine"))[1] == "file":
                # What the file had and has no more is better than the default only while nobody answers; who
                # is not asked would say what it said last.
                del last[key]
                if answer == "not asked" and getattr(heard, key, None) is not None:
                    last[key] = getattr(heard, key), "engine"
            assert getattr(running[0], key) == last.get(key, (default, ""))[0]


def test_another_worker_by_name_or_place_is_known_nothing_of():
    (known,) = completed(config(name="a").worker, {URL: Finding(URL, SGLANG)})
    for keys in ({"name": "b"}, {"name": "a", "group": "g"}, {"name": "a", "ranks": "0"}):
        (worker,) = completed(config(**keys).worker, {URL: Finding(URL, None, "silence")}, [known])
        assert (worker.slots, worker.kv_capacity_tokens) == (64, None)


def test_what_is_known_from_before_is_told_as_that():
    (known,) = completed(config().worker, {URL: Finding(URL, SGLANG)})
    silent = Identity("sglang", "0.5.23", SGLANG.models)
    (worker,) = completed(config().worker, {URL: Finding(URL, silent)}, [known])
    assert told(worker, silent) == (
        "SGLang 0.5.23; slots: 256 (as it said before); KV capacity: 440,000 tokens (as it said before); "
        "models: m"
    )


@pytest.mark.parametrize(
    ("now", "lines"),
    [
        (VLLM, []),
        (replace(VLLM, version="0.34.0", models=(Model("m"), Model("b", "m"))), []),
        (replace(VLLM, models=(Model("z"), Model("y"))), ["it serves y, z now, and served m"]),
        (replace(VLLM, models=()), []),
        (replace(VLLM, kv_capacity_tokens=5), ["it has 5 KV tokens now, and had 921,600"]),
        (replace(VLLM, ranks=2, kv_capacity_tokens=None), ["it has 2 DP ranks now, and had 1"]),
        (
            SGLANG,
            ["it is SGLang 0.5.23 now, and was vLLM 0.33.0", "it has 440,000 KV tokens now, and had 921,600"],
        ),
    ],
)
def test_what_has_changed_is_told_with_both(now, lines):
    assert list(changes(VLLM, now)) == lines
