"""What the proxy itself asks workers: bounded in bytes and in time, whatever they do; and who is to blame."""

import asyncio
import errno
import itertools
import logging
import os
from collections import Counter
from contextlib import AsyncExitStack

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from brproxy.build import build_service
from brproxy.clock import VirtualClock
from brproxy.config import parse_config
from brproxy.health import Health
from brproxy.proxy import asking
from brproxy.proxy.asking import Prober, ProbeResult, ProbeSettings, Question, Verdict, ask, probe
from brproxy.relay.endpoint import OUR_OWN, Endpoint, EndpointSettings
from brproxy.relay.errors import ShortageError, WorkerFailedError
from brproxy.roster import WorkerLimits
from tests.draws import draws

BOTH_LOOPS = True
KIB = 1 << 10
SETTINGS = EndpointSettings(connect_s=5.0, keepalive_s=4.0, idle_max=8, head_bytes_max=4096)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
LIMIT_S = 30.0
"""For what must end at once: long, so that no test depends on the machine."""


@pytest.fixture
async def endpoint_of(stack):
    """Return a function that makes the endpoint of a worker."""

    def make(worker):
        endpoint = Endpoint(worker.url, SETTINGS)
        stack.callback(endpoint.close)
        return endpoint

    return make


async def test_a_reply_is_collected_and_its_connection_kept(raw_worker, endpoint_of, answering, chunked):
    worker = await raw_worker(answering(*[b"".join(chunked(b"a" * 500, b"b" * 500))] * 3))
    endpoint = endpoint_of(worker)
    for _ in range(3):
        lines = b"Authorization: Bearer k\r\n"
        reply = await ask(endpoint, Question("/v1/models", LIMIT_S, 1000, lines=lines))
        assert (reply.head.status, reply.body) == (200, b"a" * 500 + b"b" * 500)
    assert len(worker.tasks) == 1
    host = worker.url.removeprefix("http://").encode()
    head = b"GET /v1/models HTTP/1.1\r\nHost: %b\r\nAuthorization: Bearer k\r\n\r\n" % host
    assert worker.requests == [head] * 3, "nothing is added"


async def test_a_redirect_is_a_reply(start_worker, endpoint_of, answer):
    worker = await start_worker(
        answer(b"HTTP/1.1 302 Found\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n")
    )
    result = await probe(endpoint_of(worker), "/health", LIMIT_S)
    assert (result.verdict, result.reason) == (Verdict.FAILED, "/health answers 302")
    assert len(worker.requests) == 1


async def test_a_kept_connection_that_the_worker_has_closed_is_replaced(endpoint_of, raw_worker):
    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(OK)
        # The next request finds the connection closed, as with an engine whose keep-alive ends just then.
        await worker.read_request(reader)
        if len(worker.tasks) > 1:
            writer.write(OK)
            await reader.read()

    worker = await raw_worker(script)
    endpoint = endpoint_of(worker)
    question = Question("/", LIMIT_S, 10)
    replies = [await ask(endpoint, question) for _ in range(3)]
    assert [reply.body for reply in replies] == [b"ok"] * 3
    assert len(worker.tasks) == 2


async def test_a_body_of_the_limit_passes_and_one_more_byte_does_not(
    start_worker, endpoint_of, answer, fixed, until
):
    for size, fails in ((1000, False), (1001, True)):
        worker = await start_worker(answer(fixed(bytes(size)), keep=True))
        endpoint = endpoint_of(worker)
        if fails:
            with pytest.raises(WorkerFailedError, match="its response is longer than 1000 bytes"):
                await ask(endpoint, Question("/", LIMIT_S, 1000))
        else:
            assert len((await ask(endpoint, Question("/", LIMIT_S, 1000))).body) == size


async def test_an_endless_health_page_is_healthy_and_closed_early(endpoint_of, raw_worker, until):
    async def script(worker, reader, writer):
        await worker.read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(KIB))
            await writer.drain()

    worker = await raw_worker(script)
    endpoint = endpoint_of(worker)
    result = await probe(endpoint, "/health", LIMIT_S)
    assert (result.verdict, result.reason) == (Verdict.OK, "/health answers 200")
    await until(lambda: worker.ended == 1)
    assert endpoint.take_idle() is None


@pytest.mark.parametrize("number", sorted({*OUR_OWN, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EACCES}))
async def test_only_a_worker_that_was_asked_can_fail(number, endpoint_of, start_worker, answer, monkeypatch):
    endpoint = endpoint_of(await start_worker(answer(OK)))

    async def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    class Loop:
        create_connection = staticmethod(fail)

    monkeypatch.setattr(endpoint, "_loop", Loop)
    result = await probe(endpoint, "/health", LIMIT_S)
    ours = number in OUR_OWN
    assert result.verdict is (Verdict.NOT_ASKED if ours else Verdict.FAILED)
    assert result.reason == f"cannot connect to {endpoint.origin}: {os.strerror(number)}"
    with pytest.raises(ShortageError if ours else WorkerFailedError):
        await ask(endpoint, Question("/v1/models", LIMIT_S, 10))


async def test_workers_that_could_not_be_asked_stay_what_they_were(stack, caplog, monkeypatch):
    config = parse_config({"worker": [{"url": "http://127.0.0.1:1"}], "health": {"healthy_after": 1}}, "test")
    service = build_service(config)
    stack.callback(service.watch.close)
    clock = VirtualClock()
    prober = Prober(list(service.groups.values()), clock, ProbeSettings("", 0.001, LIMIT_S))
    roster = service.fleet.groups[0].roster
    asked = 0

    async def fail(*_, **__):
        nonlocal asked
        asked += 1
        raise ShortageError("cannot connect to w: Too many open files")

    monkeypatch.setattr(service.groups["default"].endpoint(0), "connect", fail)
    for state in (Health.UNKNOWN, Health.HEALTHY):
        if state is Health.HEALTHY:
            roster.record(roster.member(0), ok=True, reason="", now_s=0.0)
        asked = 0
        await prober.start()
        async with asyncio.timeout(LIMIT_S):
            while asked < 20:
                await asyncio.sleep(0.001)
        await prober.stop()
        assert roster.member(0).health.state is state
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(told) == 1, "a line every ten seconds"


PIECES = st.sampled_from(
    [
        *(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200\r\n", b"HTTP/1.1 503 Busy\r\n", b"HTTP/1.1 204 No\r\n"),
        *(b"HTTP/1.1 101 Up\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n", b"HTTP/1.1 100 Go on\r\n\r\n"),
        *(b"Content-Length: 5\r\n", b"Content-Length: 99999999999999999999\r\n", b"Content-Length: 0\r\n"),
        *(
            b"Transfer-Encoding: chunked\r\n",
            b"Transfer-Encoding: gzip\r\n",
            b"X: y\r\n",
            b"Connection: close\r\n",
        ),
        *(
            b"\r\n",
            b"hello",
            b"5\r\nhello\r\n",
            b"0\r\n\r\n",
            b"ffffffffffffffff\r\n",
            b"T: x\r\n",
            b"\x00\xff",
            OK,
        ),
    ]
)
SEND = st.tuples(st.just("send"), PIECES)
FLOOD = st.tuples(st.just("flood"), PIECES)
DRIP = st.tuples(st.just("drip"), PIECES)
LAST = st.tuples(st.sampled_from(["close", "reset", "hang"]), st.just(b""))
SCRIPTS = st.tuples(st.lists(SEND, max_size=6), st.one_of(FLOOD, DRIP, LAST, LAST)).map(
    lambda parts: [*parts[0], parts[1]]
)


async def play(script, reader, writer):
    """Do to one client what ``script`` says."""
    await reader.readuntil(b"\r\n\r\n")
    for action, piece in script:
        if action == "send":
            writer.write(piece)
        elif action == "flood":
            while True:
                writer.write(piece * (1 + KIB // len(piece)))
                await writer.drain()
        elif action == "drip":
            while True:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.001)
        elif action == "reset":
            writer.transport.abort()
        elif action == "hang":
            await reader.read()


async def ask_hostile(script, wants_body):
    """Ask a worker that plays ``script`` for each connection; return what came of it, once it has let go."""
    async with AsyncExitStack() as stack:
        playing = []
        ended = asyncio.Event()

        async def handle(reader, writer):
            playing.append(asyncio.current_task())
            try:
                await play(script, reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError):
                pass
            finally:
                writer.close()
                ended.set()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        stack.callback(server.close)
        endpoint = Endpoint(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", SETTINGS)
        question = Question("/", 0.03, KIB, wants_body)
        try:
            result = await asyncio.wait_for(ask(endpoint, question), LIMIT_S)
        except WorkerFailedError as error:
            result = error
        endpoint.close()
        # Nothing is left open: a worker that floods, drips or hangs sees the end of its connection.
        if playing:
            await asyncio.wait_for(ended.wait(), LIMIT_S)
        await asyncio.gather(*playing, return_exceptions=True)
        return result


@draws(150)
@given(SCRIPTS, st.booleans())
@example([("send", b"HTTP/1.1 200 OK\r\n\r\n"), ("flood", b"hello")], False)
@example([("flood", b"HTTP/1.1 100 Go on\r\n\r\n")], True)
@example([("send", b"HTTP/1.1 200 OK\r\n"), ("flood", b"X: y\r\n")], True)
@example([("send", b"HTTP/1.1 200 OK\r\n\r\n"), ("drip", b"hello")], True)
@example([("drip", b"X")], True)
def test_whatever_a_worker_does_a_question_ends(script, wants_body):
    # Without a loop of its own for each example hypothesis would share the fixture's.
    result = asyncio.run(ask_hostile(script, wants_body))
    if isinstance(result, WorkerFailedError):
        assert not isinstance(result, ShortageError)
        assert "\n" not in str(result)
    else:
        assert 200 <= result.head.status < 600
        assert len(result.body) <= (KIB if wants_body else 0)


FAILED = ProbeResult(Verdict.FAILED, "answers 503")


class Members:
    """A service of one group whose members come and go, and which of them were asked."""

    def __init__(self, stack, monkeypatch, *, fails=()):
        config = parse_config({"worker": [{"url": "http://127.0.0.1:1", "name": "w0"}]}, "test")
        self.service = build_service(config)
        stack.callback(self.service.watch.close)
        self.group = self.service.groups["default"]
        self.asked = Counter()
        self.questions = 0
        self.ports = itertools.count(1000)
        self.well = True
        self.gate = asyncio.Event()
        self.gate.set()

        async def answer(endpoint, *_):
            keys = {m.key for m in self.group.behind(endpoint)}
            self.asked.update(keys)
            self.questions += 1
            await self.gate.wait()
            if not keys.isdisjoint(fails):
                raise ValueError("a bug")
            return ProbeResult(Verdict.OK, "answers 200") if self.well else FAILED

        monkeypatch.setattr(asking, "probe", answer)
        self.prober = Prober([self.group], VirtualClock(), ProbeSettings("", 0.001, LIMIT_S))

    def add(self, key, port=None):
        """Add a member behind a port of its own, or one that others may be behind."""
        port = port or next(self.ports)
        return self.group.group.roster.add(key, WorkerLimits(1), f"http://127.0.0.1:{port}")

    async def asked_again(self, *keys):
        """Wait until each of ``keys`` has been asked twice more."""
        before = Counter(self.asked)
        async with asyncio.timeout(LIMIT_S):
            while any(self.asked[key] < before[key] + 2 for key in keys):
                await asyncio.sleep(0.001)


async def test_members_that_come_are_checked_and_those_that_go_are_not(stack, monkeypatch):
    members = Members(stack, monkeypatch)
    members.gate.clear()
    starting = asyncio.create_task(members.prober.start())
    while not members.asked:
        await asyncio.sleep(0)
    # One comes while the first are being checked, one comes later.
    members.add("w1")
    members.gate.set()
    await starting
    members.add("w2")
    await members.asked_again("w0", "w1", "w2")
    members.group.group.roster.remove("w1", 0)
    before = members.asked["w1"]
    await members.asked_again("w0", "w2")
    assert members.asked["w1"] <= before + 1
    await members.prober.stop()
    assert all(member.is_routable for member in members.group.group.roster.members)
    before = Counter(members.asked)
    members.add("w3")
    await asyncio.sleep(0.01)
    assert members.asked == before


async def test_a_check_that_fails_by_a_bug_is_made_again(stack, monkeypatch, caplog):
    members = Members(stack, monkeypatch, fails={"w1"})
    members.add("w1")
    await members.prober.start()
    await members.asked_again("w0", "w1")
    await members.prober.stop()
    assert members.group.group.roster.find("w0").is_routable
    assert caplog.text.count("ValueError: a bug") == 1


async def test_ranks_behind_one_url_are_asked_for_once_and_told_each(stack, monkeypatch):
    members = Members(stack, monkeypatch)
    roster = members.group.group.roster
    ranks = [members.add(f"r{i}", port=2) for i in range(8)]
    await members.prober.start()
    assert members.questions == 2, "one for each of two servers"
    assert all(member.is_routable for member in ranks)
    members.well = False
    async with asyncio.timeout(LIMIT_S):
        while any(member.is_routable for member in roster.members):
            await asyncio.sleep(0.001)
    assert len({member.health.state for member in ranks}) == 1
    members.well = True
    # One that joins the others is not kept waiting for the next interval, and is asked for with them.
    members.prober._settings = ProbeSettings("", LIMIT_S * 10, LIMIT_S)
    joined = members.add("r8", port=2)
    async with asyncio.timeout(LIMIT_S):
        while not joined.is_routable:
            await asyncio.sleep(0.001)
    assert all(member.is_routable for member in ranks)
    assert len(members.prober._tasks) == 2
    await members.prober.stop()


async def test_the_checks_of_a_server_end_with_the_last_rank_behind_it(stack, monkeypatch):
    members = Members(stack, monkeypatch)
    roster = members.group.group.roster
    for key in ("a", "b"):
        members.add(key, port=2)
    await members.prober.start()
    await members.asked_again("w0", "a", "b")
    roster.remove("a", 0)
    await members.asked_again("w0", "b")
    roster.remove("b", 0)
    assert len(members.prober._tasks) == len(members.group.endpoints) == 1
    members.add("c", port=2)
    await members.asked_again("w0", "c")
    await members.prober.stop()
