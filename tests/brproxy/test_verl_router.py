"""The router that verl is given, called as verl's client calls an actor."""

import asyncio
import importlib

import pytest

from brproxy.clock import VirtualClock
from brproxy.validation import ConfigError
from brproxy.verl_router import VerlRouter

YAML = {"router_class": "brproxy.verl_router.VerlRouter", "slots": 1, "step_s": 0.1}


class Client:
    """What verl's LLMServerClient does around a generation: asks which fields are wanted, and sends those."""

    def __init__(self, router, clock):
        self.router = router
        self.clock = clock
        self.served = []

    async def acquire(self, request_id, **extra):
        fields = {name: extra[name] for name in self.router.require_acquire_fields() if name in extra}
        return await self.router.acquire_server(request_id=request_id, **fields)

    async def release(self, server_id, request_id):
        pool = {"request_id": request_id}
        fields = {name: pool[name] for name in self.router.require_release_fields() if name in pool}
        await self.router.release_server(server_id=server_id, **fields)

    async def generate(self, request_id, prompt, length_s):
        server_id, handle = await self.acquire(
            request_id, prompt_ids=prompt, sampling_params={"max_tokens": 900}, image_data=None
        )
        assert handle == f"handle of {server_id}"
        self.served.append((request_id, server_id))
        try:
            end_s = self.clock.now_s() + length_s
            while self.clock.now_s() < end_s:
                await asyncio.sleep(0)
        finally:
            await self.release(server_id, request_id)


def a_router(servers=2, **more):
    """Return a router made as verl makes it: by the name in its file, with servers and all of the file."""
    clock = VirtualClock()
    module, name = YAML["router_class"].rsplit(".", 1)
    handles = {f"s{i}": f"handle of s{i}" for i in range(servers)}
    return Client(getattr(importlib.import_module(module), name)(handles, YAML | more, clock=clock), clock)


async def pass_time(client, *tasks):
    while not all(task.done() for task in tasks):
        for _ in range(20):
            await asyncio.sleep(0)
        client.clock.advance_to(client.clock.now_s() + 0.1)
    await asyncio.gather(*tasks)


async def test_samples_of_the_long_prompt_go_first_also_in_the_first_step():
    client = a_router()
    lengths = {(1, 2): 1.0, (3, 4): 30.0}
    for step in range(2):
        client.served.clear()
        tasks = [
            asyncio.create_task(client.generate(f"{step} {prompt} {sample}", prompt, length_s))
            for sample in range(4)
            for prompt, length_s in lengths.items()
        ]
        await pass_time(client, *tasks)
        went = ["(3, 4)" in name for name, _ in client.served]
        # Two slots are taken as they come, one by each prompt; then it is known which is the long one.
        assert went == [False, True, True, True, True, False, False, False]
    status = client.router.get_status()
    assert (status["total_inflight"], status["waiting"]) == (0, 0)
    assert not client.router._running
    assert not client.router._by_name


async def test_a_conversation_stays_where_its_cache_is():
    client = a_router(slots=4)
    prompt = list(range(200))
    for turn in range(6):
        task = asyncio.create_task(client.generate("talk", tuple(prompt), 1.0))
        await pass_time(client, task)
        prompt += range(turn * 50)
    assert len({server_id for _, server_id in client.served}) == 1


async def test_servers_come_and_go():
    client = a_router(1)
    router = client.router
    first = await client.acquire("a")
    assert first == ("s0", "handle of s0")
    waits = asyncio.create_task(client.acquire("b"))
    await asyncio.sleep(0)
    assert router.get_status()["waiting"] == 1
    router.add_servers({"s1": "handle of s1"})
    another = asyncio.create_task(client.acquire("c"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert waits.done() != another.done()
    router.remove_servers(["s0", "unknown"])
    assert router.get_all_servers() == ["s1"]
    await client.release("s0", "a")
    assert router.get_inflight_count("s0") == 0
    for task, name in ((waits, "b"), (another, "c")):
        if task.done():
            await client.release("s1", name)
    assert {(await waits)[0], (await another)[0]} == {"s1"}


async def test_without_servers_verl_tries_again():
    client = a_router(1)
    client.router.remove_servers(["s0"])
    with pytest.raises(RuntimeError, match="No available servers in load balancer"):
        await client.acquire("a")


async def test_whoever_stops_waiting_leaves_nothing():
    client = a_router(1)
    await client.acquire("a")
    waits = asyncio.create_task(client.acquire("b"))
    await asyncio.sleep(0)
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits
    assert client.router.get_status()["waiting"] == 0
    # One that was given its server in the moment in which it left gives it back.
    waits = asyncio.create_task(client.acquire("c"))
    await asyncio.sleep(0)
    await client.release("s0", "a")
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits
    assert client.router.get_status()["total_inflight"] == 0
    assert (await client.acquire("d"))[0] == "s0"


async def test_what_nobody_knows_is_no_release():
    client = a_router(1)
    await client.acquire("a")
    await client.release("s0", "b")
    await client.release("s9", "a")
    await client.router.release_server("s0")
    assert client.router.get_inflight_count("s0") == 1


def test_the_file_s_mistakes_have_a_line_each():
    with pytest.raises(ConfigError, match=r"slots: must be at least 1, got 0"):
        a_router(slots=0)
    with pytest.raises(ConfigError, match=r"slotz: unknown key"):
        a_router(slotz=3)
    assert VerlRouter({}, {}).get_all_servers() == []
