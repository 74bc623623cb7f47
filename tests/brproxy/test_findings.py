"""What the file says beside what engines say: gaps are filled, contradictions told, the file holds."""

import pytest

from brproxy.config import parse_config
from brproxy.engines.identity import Identity, Model
from brproxy.findings import Finding, completed, contradictions, told

URL = "http://h:1"
SGLANG = Identity("sglang", "0.5.23", (Model("m"),), 256, 440_000, 1)
VLLM = Identity("vllm", "0.33.0", (Model("m"), Model("a", "m")), None, 921_600, 1)


def config(**keys):
    return parse_config({"worker": [{"url": URL} | keys]}, "x")


def worker_of(config, identity):
    (worker,) = completed(config, {URL: Finding(URL, identity, "" if identity else "silence")}).worker
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
