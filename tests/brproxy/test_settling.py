"""Keys that a reload takes up: each gives what a start with it gives, and no other is taken for one."""

import asyncio
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.build import GroupBuilder, build_service
from brproxy.clock import VirtualClock
from brproxy.config import Config, parse_config
from brproxy.parts import Parts
from brproxy.plans import is_live
from brproxy.proxy.handlers import Handlers
from brproxy.proxy.legs.metaserver import PATH
from brproxy.routing.policy import POLICIES
from brproxy.validation import ConfigError
from tests.brproxy.test_plans import leaf_keys
from tests.draws import draws

WORKERS = [
    {"url": "http://h:1", "group": "whole"},
    {"url": "http://h:2", "role": "prefill", "transfer": "ascend-layerwise"},
    {"url": "http://h:3", "role": "decode", "transfer": "ascend-layerwise"},
]
NAMES = ["br-h", "/x", "waiting-weighted", "slots", "x"]
OTHERS = [True, *NAMES, 1, 2, 3, 7, 0.5, 0.25, 8192, 1.5, 70.0, 9000, False]
"""Values for keys of any kind; a key gets the first that it takes and has not."""


class Running:
    """What a proxy is made of that does not listen."""

    def __init__(self, config):
        clock = VirtualClock()
        builder = GroupBuilder(config, clock)
        self.service = build_service(config, clock, builder)
        self.handlers = Handlers(self.service)
        self.parts = Parts(config, self.service, builder, self.handlers, None, None)

    def close(self):
        self.service.watch.close()
        for group in self.service.groups.each():
            group.driver.close()

    def described(self):
        """Return all that settings have become."""
        service, pages = self.service, self.handlers.pages
        groups = [
            (
                each.group.name,
                each.group.dispatcher.limits,
                type(each.group.dispatcher.policy),
                each.group.dispatcher._foresight._policy is each.group.dispatcher.policy,
                each.group.dispatcher.policy.params,
                each.driver._rounds._tick_s,
                each.handover and each.handover.limits,
            )
            for each in service.groups.each()
        ]
        return (
            *(service.limits, service.body_limits, service.relay_limits, service.departures.gone_s),
            *(service.watch.interval_s, service.body_room.retry_after_s, groups),
            *(self.parts._prober.settings, self.parts._poller.settings, pages._model_list.limits),
            *(self.handlers._attempts, self.handlers._split.__qualname__, PATH in pages.by_path),
        )


def config_with(values):
    document = {"worker": WORKERS}
    for key, value in values.items():
        table = document
        *tables, name = key.split(".")
        for each in tables:
            table = table.setdefault(each, {})
        table[name] = value
    return parse_config(document, "test")


KEYS = [key for key, _ in leaf_keys(parse_config({"worker": WORKERS}, "test"))]
LIVE = [key for key in KEYS if is_live(key)]


def base(key):
    """Return what must be set for ``key`` to matter."""
    table = key.split(".")[1]
    return {"routing.policy": table} if key.count(".") == 2 and table in POLICIES.names() else {}


def changed(key):
    """Return a value of ``key`` that is another than by default."""
    before = config_with(base(key))
    for value in OTHERS:
        with suppress(ConfigError):
            config = config_with(base(key) | {key: value})
            if config != before:
                return value
    raise AssertionError(f"OTHERS has no other value for {key}")


@pytest.mark.parametrize("key", LIVE)
async def test_each_key_gives_what_a_start_with_it_gives(key):
    before, after = config_with(base(key)), config_with(base(key) | {key: changed(key)})
    running, fresh = Running(before), Running(after)
    try:
        was, wanted = running.described(), fresh.described()
        assert was != wanted, "else it is not shown that anything follows"
        changes = running.parts.deployment.reload(after, "test")
        assert (changes.changed, changes.restart, changes.steps) == ((key,), (), ())
        assert running.described() == wanted
        running.parts.deployment.reload(before, "test")
        assert running.described() == was
    finally:
        running.close()
        fresh.close()


def test_keys_that_what_runs_takes_up_are_there_and_are_not_all():
    assert {"routing.policy", "limits.retries_max", "prefill_decode.lease_s", "health.path"} <= set(LIVE)
    assert {"listen.port", "prediction.predictor", "timeouts.stall_s", "routing.seed"} <= set(KEYS) - set(
        LIVE
    )


@draws(30)
@given(st.lists(st.dictionaries(st.sampled_from(KEYS), st.sampled_from(OTHERS), max_size=4), max_size=4))
def test_whatever_is_read_runs_what_is_in_force(files):
    configs = []
    for values in files:
        # What cannot be is no file.
        with suppress(ConfigError):
            configs.append(config_with(values))

    async def reload_all():
        running = Running(config_with({}))
        try:
            for config in configs:
                running.parts.deployment.reload(config, "test")
                in_force: Config = running.parts.deployment.config
                fresh = Running(in_force)
                assert running.described() == fresh.described()
                fresh.close()
        finally:
            running.close()

    asyncio.run(reload_all())
