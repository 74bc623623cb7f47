"""Names that stand for several workers are looked up and followed; one that fails changes nothing."""

import asyncio
import logging
import socket

import pytest

from brproxy.addresses import ADDRESSES_MAX
from brproxy.app import running_proxy
from brproxy.config import load_config, parse_config
from brproxy.lifecycle import Event
from brproxy.resolving import Resolver, look_up
from brproxy.types import PendingRequest
from tests.brproxy.conftest import HANG_S

URL = "http://pods:8000"
TABLE = f"""
[listen]
port = 0
[health]
enabled = false
[telemetry]
enabled = false
[discovery]
enabled = false
resolve_interval_s = 0.1
[[worker]]
url = "{URL}"
name = "p"
addresses = "each"
"""


class Dns:
    """What a resolver says: the addresses of any host, or that it fails."""

    def __init__(self, *addresses):
        self.addresses = list(addresses)
        self.asked = []
        self.silent = False

    async def look_up(self, host, port):
        self.asked.append((host, port))
        if self.silent:
            await asyncio.Event().wait()
        if not self.addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return self.addresses


@pytest.fixture
def start(stack, tmp_path):
    """Return a function that starts a proxy whose only worker is a name that ``dns`` knows."""

    async def start(dns, timeout_s=HANG_S):
        path = tmp_path / "brproxy.toml"
        path.write_text(TABLE)
        resolver = Resolver(timeout_s, dns.look_up)
        resolved = await resolver.resolved(load_config(path), {})
        running = running_proxy(resolved.config, path=path, resolved=resolved, resolver=resolver)
        return await stack.enter_async_context(running), path

    return start


def names(proxy):
    return sorted(member.key for member in proxy.service.fleet.groups[0].roster.members)


async def until(is_so):
    async with asyncio.timeout(HANG_S):
        while not is_so():
            await asyncio.sleep(0.01)


async def test_members_follow_the_addresses(start, caplog):
    caplog.set_level(logging.INFO, "brproxy")
    dns = Dns("10.0.0.2", "10.0.0.1", "10.0.0.1")
    proxy, _ = await start(dns)
    assert dns.asked == [("pods", 8000)]
    assert names(proxy) == ["p@10.0.0.1", "p@10.0.0.2"]
    dns.addresses = ["10.0.0.2", "10.0.0.3"]
    await until(lambda: names(proxy) == ["p@10.0.0.2", "p@10.0.0.3"])
    said = f"addresses of {URL}: added p@10.0.0.3 [default], removed p@10.0.0.1 [default]"
    assert said in caplog.messages


async def test_one_whose_address_goes_finishes_what_it_has(start):
    dns = Dns("10.0.0.1", "10.0.0.2")
    proxy, _ = await start(dns)
    service = proxy.service.groups["default"]
    roster, dispatcher = service.group.roster, service.group.dispatcher
    request_id = dispatcher.arrive(PendingRequest(10), 0.0)
    dispatcher.bind(request_id, roster.find("p@10.0.0.1").index, 0.0)
    dns.addresses = ["10.0.0.2"]
    await until(lambda: roster.find("p@10.0.0.1").leaves)
    dispatcher.end(request_id, Event.FINISH)
    assert names(proxy) == ["p@10.0.0.2"]


async def test_a_resolver_that_fails_changes_nothing_and_is_told_once(start, caplog):
    dns = Dns("10.0.0.1")
    proxy, _ = await start(dns)
    dns.addresses = []
    for _ in range(3):
        await proxy.parts.resolving.look()
    await proxy.reloading.reload()
    assert names(proxy) == ["p@10.0.0.1"]
    told = [message for message in caplog.messages if "look up" in message]
    assert told == [f"worker p: cannot look up {URL}: Name or service not known; its members stay"]
    dns.addresses = ["10.0.0.2"]
    await until(lambda: names(proxy) == ["p@10.0.0.2"])


async def test_a_name_that_is_not_known_at_start_is_when_it_is(start):
    dns = Dns()
    proxy, _ = await start(dns)
    assert names(proxy) == ["p"], "its group is there, and its requests wait"
    dns.addresses = ["10.0.0.1", "10.0.0.2"]
    await until(lambda: names(proxy) == ["p@10.0.0.1", "p@10.0.0.2"])


async def test_a_resolver_that_is_silent_is_asked_once_and_bounded_in_time():
    dns = Dns("10.0.0.1")
    dns.silent = True
    resolver = Resolver(0.01, dns.look_up)
    config = parse_config({"worker": [{"url": URL, "addresses": "each"}]}, "x")
    for _ in range(3):
        resolved = await resolver.resolved(config, {URL: ("10.0.0.9",)})
        assert [worker.label for worker in resolved.config.worker] == ["pods:8000@10.0.0.9"]
    assert len(dns.asked) == 1, "the look-up that is under way is waited for"
    resolver.close()


async def test_only_so_many_addresses_are_members(caplog):
    many = [f"10.0.{n // 200}.{n % 200}" for n in range(ADDRESSES_MAX + 9)]
    resolver = Resolver(HANG_S, Dns(*many).look_up)
    config = parse_config({"worker": [{"url": URL, "addresses": "each"}]}, "x")
    for _ in range(2):
        resolved = await resolver.resolved(config, {})
    assert len(resolved.config.worker) == ADDRESSES_MAX
    assert caplog.messages == [f"worker pods:8000: {URL} has 265 addresses; the first 256 are members"]


async def test_a_reload_follows_names_that_are_new_and_forgets_those_that_are_gone(start):
    dns = Dns("10.0.0.1")
    proxy, path = await start(dns)
    path.write_text(TABLE.replace(URL, "http://other:8000"))
    dns.addresses = ["10.0.0.5"]
    await proxy.reloading.reload()
    assert names(proxy) == ["p@10.0.0.5"]
    path.write_text(TABLE.replace('addresses = "each"', ""))
    await proxy.reloading.reload()
    assert names(proxy) == ["p"]
    dns.asked.clear()
    await proxy.parts.resolving.look()
    assert (names(proxy), dns.asked) == (["p"], [])


async def test_the_system_is_asked():
    assert await look_up("127.0.0.1", 80) == ["127.0.0.1"]


async def test_addresses_that_another_worker_has_are_not_followed_and_tried_again(start, caplog):
    dns = Dns("10.0.0.1")
    proxy, path = await start(dns)
    static = '[[worker]]\nurl = "http://10.0.0.2:8000"\nname = "static"\n'
    path.write_text(TABLE + static)
    await proxy.reloading.reload()
    dns.addresses = ["10.0.0.1", "10.0.0.2"]
    await until(lambda: "not followed: addresses of" in caplog.text)
    assert names(proxy) == ["p@10.0.0.1", "static"]
    dns.addresses = ["10.0.0.1"]
    path.write_text(TABLE)
    await proxy.reloading.reload()
    dns.addresses = ["10.0.0.1", "10.0.0.2"]
    await until(lambda: names(proxy) == ["p@10.0.0.1", "p@10.0.0.2"])
