"""The open-loop client: on time, and honest about every way to fail."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from aiohttp import web

from loadgen.client import ClientSettings, Failure, Lengths, Replay
from loadgen.cluster_settings import ClusterSettings
from loadgen.emulator.server import EmulatorSettings, running_emulator
from loadgen.workload import TraceRequest, Workload

SSE = {"Content-Type": "text/event-stream"}


def chunk(text):
    return b'data: {"choices":[{"delta":{"content":"%s"}}]}\n\n' % text.encode()


USAGE = b'data: {"choices":[],"usage":{"completion_tokens":7}}\n\n'
DONE = b"data: [DONE]\n\n"


@pytest.fixture
async def stack():
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def serve(stack):
    """Return a function that starts a server with one handler and returns its URL."""

    async def start(handler):
        app = web.Application()
        app.router.add_post("/{path:.*}", handler)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        stack.push_async_callback(runner.cleanup)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}"

    return start


def workload(*times, output_tokens=2):
    return Workload("w", tuple(TraceRequest(at_s, 3, output_tokens) for at_s in times or (0.0,)))


async def replay(url, requests=None, **settings):
    finished = []
    outcomes = await Replay(requests or workload(), ClientSettings(url, **settings), finished.append).run()
    assert len(finished) == len(outcomes)
    return outcomes


def streaming(*parts, broken=False):
    async def handler(request):
        await request.read()
        response = web.StreamResponse(headers=SSE)
        await response.prepare(request)
        for part in parts:
            await response.write(part)
        if broken:
            request.transport.abort()
        return response

    return handler


@pytest.mark.parametrize(
    ("handler", "failure"),
    [
        (lambda _: web.Response(status=429), Failure.REFUSED_429),
        (lambda _: web.Response(status=503), Failure.REFUSED_503),
        (lambda _: web.Response(status=400, text="why"), Failure.HTTP_4XX),
        (lambda _: web.Response(status=502), Failure.HTTP_5XX),
    ],
)
async def test_statuses(handler, failure, serve):
    async def respond(request):
        return handler(request)

    (outcome,) = await replay(await serve(respond))
    assert outcome.failure is failure


@pytest.mark.parametrize(
    ("parts", "failure"),
    [
        ((chunk(" 1"), chunk(" 2"), DONE), None),
        ((chunk(" 1 2"), DONE), None),
        ((chunk(" 1"), DONE), Failure.INCOMPLETE),
        ((chunk(" 1"), chunk(" 2")), Failure.INCOMPLETE),
        ((chunk(" 2"), chunk(" 1"), DONE), Failure.OUT_OF_ORDER),
        ((chunk(" 1"), b'data: {"error":{"message":"boom"}}\n\n', DONE), Failure.ERROR_EVENT),
    ],
)
async def test_verified_streams(parts, failure, serve):
    (outcome,) = await replay(await serve(streaming(*parts)), verify=True)
    assert outcome.failure is failure, outcome.detail


async def test_a_broken_connection_and_none_at_all(serve, unused_tcp_port):
    (outcome,) = await replay(await serve(streaming(chunk(" 1"), broken=True)))
    assert outcome.failure is Failure.RESET
    (outcome,) = await replay(f"http://127.0.0.1:{unused_tcp_port}")
    assert outcome.failure is Failure.CONNECT


async def test_a_timeout(serve):
    async def never(request):
        await asyncio.sleep(5)

    (outcome,) = await replay(await serve(never), timeout_s=0.05)
    assert outcome.failure is Failure.TIMEOUT


async def test_usage_tells_the_tokens(serve):
    url = await serve(streaming(b": ping\n\n", chunk("several tokens"), USAGE.replace(b"\n", b"\r\n"), DONE))
    (outcome,) = await replay(url)
    assert (outcome.failure, outcome.output_tokens) == (None, 7)


async def test_what_is_sent(serve):
    seen = []

    async def note(request):
        seen.append((request.path, request.headers, await request.json()))
        return web.Response(status=400)

    url = await serve(note)
    await replay(url, model="m", api_key="k")
    await replay(url, chat=False, lengths=Lengths.HIDDEN, verify=True)
    path, headers, document = seen[0]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer k"
    assert document["model"] == "m"
    assert len(document["messages"][0]["content"].split()) == 3
    assert (document["max_tokens"], document["ignore_eos"]) == (2, True)
    assert document["stream_options"] == {"include_usage": True}
    path, headers, document = seen[1]
    assert path == "/v1/completions"
    assert headers["X-Loadgen-Output-Tokens"] == "2"
    assert "max_tokens" not in document
    assert "stream_options" not in document


async def test_a_late_answer_does_not_delay_later_requests(serve):
    gate = asyncio.Event()

    async def first_waits(request):
        body = await request.json()
        if body["messages"][0]["content"].startswith("r0 "):
            await gate.wait()
        else:
            gate.set()
        return await streaming(chunk(" 1"), chunk(" 2"), DONE)(request)

    outcomes = await replay(await serve(first_waits), workload(0.0, 0.05), verify=True)
    assert [outcome.failure for outcome in outcomes] == [None, None]
    assert outcomes[0].first_token_s > outcomes[1].sent_s


async def test_the_client_limits_itself(serve):
    gate = asyncio.Event()

    async def wait(request):
        await gate.wait()
        return web.Response(status=500)

    # The first that is finished is the one that was not sent: the others wait for it.
    settings = ClientSettings(await serve(wait), in_flight_max=2)
    outcomes = await Replay(workload(0.0, 0.0, 0.0), settings, lambda _: gate.set()).run()
    assert [outcome.failure for outcome in outcomes].count(Failure.CLIENT_LIMIT) == 1


async def test_speed_scales_times(stack):
    settings = EmulatorSettings(ClusterSettings(workers=1, step_base_s=0.1), speed=20.0)
    emulator = await stack.enter_async_context(running_emulator(settings))
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    (outcome,) = await replay(
        emulator.urls[0], workload(output_tokens=11), speed=20.0, verify=True, lengths=Lengths.HIDDEN
    )
    # Eleven steps of 0.1 s at normal speed cannot be over sooner; the clock runs 20 times as fast as ours.
    assert 11 * 0.1 <= outcome.last_token_s <= outcome.finished_s <= (loop.time() - began_s) * 20
    assert sum(outcome.gaps_s) == pytest.approx(outcome.last_token_s - outcome.first_token_s, rel=1e-3)
