"""The simulated world itself: time, and connections that behave as real ones do."""

import asyncio
import random

import pytest

from tests.simulation.loop import START_S, DeadlockError, SpinningError, VirtualLoop
from tests.simulation.wire import Wire

HOST = ("worker", 1)


@pytest.fixture
def loop():
    loop = VirtualLoop()
    yield loop
    assert not loop.complaints
    loop.close()


async def connected(loop, seed=0):
    """Return both ends of a new connection."""
    loop.network.seed = seed
    accepted = []
    server = await loop.create_server(lambda: accepted.append(Wire()) or accepted[-1], *HOST)
    _, near = await loop.create_connection(Wire, *HOST)
    await asyncio.sleep(1)
    server.close()
    return near, accepted[0]


def test_hours_pass_at_once(loop):
    loop.run_until_complete(asyncio.sleep(36_000))
    assert loop.time() == START_S + 36_000
    assert loop.events < 10


def test_timers_come_in_their_order(loop):
    order = []
    for delay_s in (3, 1, 2):
        loop.call_later(delay_s, order.append, delay_s)
    loop.run_until_complete(asyncio.sleep(4))
    assert order == [1, 2, 3]


def test_a_jump_makes_everything_due(loop):
    async def main():
        loop.call_later(1, loop.jump, 100)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.sleep(90), 60)

    loop.run_until_complete(main())
    assert loop.time() == START_S + 101


def test_a_deadlock_and_a_spin_are_said(loop):
    async def forever():
        while True:
            await asyncio.sleep(0)

    loop.EVENTS_AT_ONE_TIME_MAX = 100
    with pytest.raises(SpinningError):
        loop.run_until_complete(forever())
    other = VirtualLoop()
    with pytest.raises(DeadlockError):
        other.run_until_complete(other.create_future())
    other.close()


@pytest.mark.parametrize("seed", range(20))
def test_bytes_arrive_whole_and_in_order(loop, seed):
    data = random.Random(seed).randbytes(200_000)

    async def main():
        near, far = await connected(loop, seed)
        for start in range(0, len(data), 20_000):
            await near.send(data[start : start + 20_000])
        near.transport.close()
        await far.gone()
        far.transport.close()
        await near.gone()
        assert far.received == data
        assert not far.was_reset
        assert not near.was_reset

    loop.run_until_complete(main())
    assert not loop.network.open


def test_a_reader_that_stops_stops_the_writer(loop):
    async def main():
        near, far = await connected(loop)
        far.transport.pause_reading()
        near.transport.write(bytes(1 << 20))
        sending = asyncio.create_task(near.send(b"!"))
        await asyncio.sleep(10)
        assert not sending.done()
        assert not far.received
        far.transport.resume_reading()
        await sending
        await asyncio.sleep(10)
        assert len(far.received) == (1 << 20) + 1

    loop.run_until_complete(main())


def test_half_a_connection_closes(loop):
    async def main():
        near, far = await connected(loop)
        near.transport.write(b"question")
        near.transport.write_eof()
        await far.gone()
        assert far.received == b"question"
        assert not far.lost
        await far.send(b"answer")
        far.transport.close()
        await near.gone()
        assert near.received == b"answer"

    loop.run_until_complete(main())


def test_a_reset_loses_what_is_on_its_way(loop):
    async def main():
        lost = 0
        for seed in range(30):
            near, far = await connected(loop, seed)
            near.transport.write(bytes(1000))
            near.transport.reset()
            while not far.lost:
                await far.more()
            assert far.was_reset
            lost += len(far.received) < 1000
        assert lost > 0

    loop.run_until_complete(main())


def test_an_abort_looks_like_an_end(loop):
    async def main():
        near, far = await connected(loop)
        near.transport.write(b"last words")
        near.transport.abort()
        await far.gone()
        assert far.received == b"last words"
        assert not far.was_reset

    loop.run_until_complete(main())


def test_a_close_with_unread_bytes_is_a_reset(loop):
    async def main():
        near, far = await connected(loop)
        near.transport.write(b"never read")
        far.transport.pause_reading()
        await asyncio.sleep(1)
        far.transport.close()
        await near.gone()
        await asyncio.sleep(1)
        assert near.was_reset

    loop.run_until_complete(main())


def test_writing_to_who_has_gone_is_noticed(loop):
    async def main():
        near, far = await connected(loop)
        far.transport.close()
        await near.gone()
        near.transport.write(b"anybody?")
        await asyncio.sleep(1)
        assert near.was_reset

    loop.run_until_complete(main())


@pytest.mark.parametrize(("mode", "error"), [("refuse", ConnectionRefusedError), ("silent", TimeoutError)])
def test_doors(loop, mode, error):
    async def main():
        await loop.create_server(Wire, *HOST)
        loop.network.doors[HOST].mode = mode
        with pytest.raises(error):
            await loop.create_connection(Wire, *HOST)

    loop.run_until_complete(main())


def test_a_failing_protocol_is_told_to_the_loop_and_closed(loop):
    class Failing(Wire):
        def data_received(self, data):
            raise ValueError("on purpose")

    async def main():
        await loop.create_server(Failing, *HOST)
        _, near = await loop.create_connection(Wire, *HOST)
        near.transport.write(b"x")
        await near.gone()

    loop.run_until_complete(main())
    assert "on purpose" in str(loop.complaints.pop()["exception"])


def test_the_same_seed_is_the_same_run():
    def run(seed):
        loop = VirtualLoop()

        async def main():
            near, far = await connected(loop, seed)
            await near.send(bytes(5000))
            near.transport.close()
            await far.gone()

        loop.run_until_complete(main())
        loop.close()
        return loop.network.digest

    assert run(1) == run(1)
    assert run(1) != run(2)
