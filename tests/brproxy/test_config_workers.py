"""Workers in the configuration's file, beside each other: those that prefill and those that decode."""

from pathlib import Path

import pytest

from brproxy.config import load_config, parse_config
from brproxy.validation import ConfigError

CONFIG_FOLDER = Path(__file__).parents[2] / "config"


def messages(document):
    with pytest.raises(ConfigError) as caught:
        parse_config(document, "x.toml")
    return str(caught.value).split("\n")


@pytest.mark.parametrize(
    ("name", "transfer", "sizes"),
    [
        ("vllm-prefill-decode", "nixl", {"default/prefill": 1, "default": 2}),
        ("sglang-prefill-decode", "sglang", {"default/prefill": 2, "default": 4}),
    ],
)
def test_workers_that_prefill_are_a_group_beside_those_that_decode(name, transfer, sizes):
    config = load_config(CONFIG_FOLDER / f"{name}.toml")
    assert config.group_sizes == sizes
    assert {worker.handover for worker in config.worker} == {transfer}


@pytest.mark.parametrize(
    ("roles", "group", "told"),
    [
        (
            ["prefill", "prefill"],
            "g",
            "x.toml: worker[0].role: group 'g' has no worker with role \"decode\" or",
        ),
        (["decode"], "g", "x.toml: worker[0].role: group 'g' has no worker with role \"prefill\""),
        (
            ["both"],
            "g/prefill",
            "x.toml: worker[0].group: must not end with '/prefill', as groups of prefill",
        ),
    ],
)
def test_half_a_request_needs_the_other_half(roles, group, told):
    workers = [{"url": f"http://h:{i + 1}", "role": role, "group": group} for i, role in enumerate(roles)]
    assert messages({"worker": workers})[0].startswith(told)


def test_both_ends_of_a_transfer_are_of_one_kind():
    workers = [
        {"url": "http://h:1", "role": "prefill", "transfer": "nixl"},
        {"url": "http://h:2", "role": "decode", "transfer": "mooncake"},
    ]
    (line,) = messages({"worker": workers})
    assert "has workers with different models, engines or transfers" in line
