"""Groups with workers that only prefill, which come and go with a reload under requests."""

import asyncio

import pytest

from brproxy.config import parse_config
from tests.brproxy.proxy.legs.conftest import TRANSFERS


def reload(pair, workers):
    config = parse_config({"worker": workers}, "test")
    return pair.proxy.running.deployment.change(config.worker, "test")


def tables(pair):
    """Return the tables of the workers that are there."""
    return [
        {key: getattr(worker, key) for key in worker.model_fields_set}
        for worker in pair.proxy.running.deployment.config.worker
    ]


@pytest.mark.parametrize("transfer", TRANSFERS)
async def test_both_sides_go_with_their_last_request_and_come_again(start_pair, until, transfer):
    pair = await start_pair(transfer)
    workers, groups = tables(pair), pair.proxy.running.service.groups
    text = await pair.text()
    running = [asyncio.create_task(pair.text(stream=True)) for _ in range(6)]
    await until(lambda: any(g.dispatcher.ledger.bound + len(g.dispatcher.waiting) for g in pair.proxy.groups))
    before = {id(group) for group in pair.proxy.groups}
    changes = reload(pair, [worker | {"group": "other", "model": "emulated"} for worker in workers])
    assert [str(step) for step in changes.groups] == ["added group other", "removed group default"]
    assert await pair.text(stream=True) == text, "by the new ones"
    assert await asyncio.gather(*running) == [text] * 6
    await until(lambda: list(groups) == ["other", "other/prefill"])
    assert not before & {id(group) for group in pair.proxy.groups}
    assert groups["other"].handover.counts["split"] == 1
    assert len(pair.proxy.running.service.metaserver) == 0
    await pair.proxy.idle()


@pytest.mark.parametrize("transfer", ["nixl", "ascend-layerwise"])
async def test_a_group_may_be_parted_from_now_on_and_whole_again(start_pair, start_emulator, until, transfer):
    pair = await start_pair(transfer)
    parted, pages = tables(pair), pair.proxy.running.handlers.pages.by_path
    emulator = await start_emulator(1)
    whole = [{"url": emulator.urls[0]}]
    assert ("/v1/metaserver" in pages) == (transfer == "ascend-layerwise")
    for workers, names in ((whole, ["default"]), (parted, ["default", "default/prefill"])):
        changes = reload(pair, workers)
        assert [str(step) for step in changes.groups] == ["replaced group default"]
        status, _ = await pair.ask()
        assert status == 200
        await until(lambda: list(pair.proxy.running.service.groups) == names)  # noqa: B023
        assert ("/v1/metaserver" in pages) == (transfer == "ascend-layerwise" and workers is parted)
    await pair.proxy.idle()
