"""The load client, straight to a mock worker and to servers that misbehave."""

import asyncio

import pytest

from loadgen.dataplane import client
from loadgen.dataplane.client import Load, request_bytes
from loadgen.dataplane.loads import LoadSpec, Phase
from loadgen.dataplane.worker import Connection


@pytest.fixture(autouse=True)
def short_retries(monkeypatch):
    monkeypatch.setattr(client, "RETRY_S", 0.01)


def phase(**more):
    settings = {"connections": 3, "tokens": 4, "warm_s": 0.05, "seconds": 0.1}
    return Phase(**{"name": "tiny", "text": "", "unit": "event", **settings, **more})


async def run(port, **more):
    spec = LoadSpec(phase=phase(**more), model="mock-model", ports=(port,), proxy_pids=(), worker_pids=())
    return await Load(spec).run()


async def run_until(enough, port, **more):
    """Run a load for longer and longer until it has measured enough, as slow machines need."""
    for seconds in (0.1, 0.4, 1.6, 6.4, 25.6):
        result = await run(port, seconds=seconds, **more)
        if enough(result):
            return result, seconds
    pytest.fail(f"this was not enough: {result}")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_closed_loop(worker, stream):
    _, port = worker
    result, seconds = await run_until(lambda result: result.requests > 3, port, stream=stream)
    assert (result.lost, result.first_failure) == (0, "")
    assert result.checked > result.requests
    assert result.window_s >= seconds
    assert result.client_cpu_s > 0
    assert result.whole_ms.p50 > 0
    # Where the window begins and ends inside a stream is chance.
    assert abs(result.events - 4 * result.requests * stream) <= 24
    assert (result.first_ms is not None) == stream


async def test_paced_streams_outlast_the_measured_part(worker):
    engine, port = worker
    engine.set_interval(0.01)
    for seconds in (0.1, 0.4, 1.6):
        # A stream takes ten times as long as the measured part; a slower machine gets more time for both.
        settings = {"once": True, "connections": 5, "ramp_s": 0.02, "tokens": round(seconds * 1000)}
        result = await run(port, seconds=seconds, **settings)
        if (result.checked, result.requests, result.lost) == (5, 0, 0) and result.events > 5:
            break
    assert (result.checked, result.requests, result.lost) == (5, 0, 0)
    assert result.events > 5
    assert result.gap_ms.p50 > 0
    assert result.delay_ms.p50 >= 0


class Closing(Connection):
    """A worker that ends the connection with each answer, and says so."""

    def _send(self, status, content):
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content)
        )
        self._transport.close()


class UntilClose(Closing):
    def _send(self, status, content):
        self._transport.write(b"HTTP/1.0 200 OK\r\n\r\n" + content)
        self._transport.close()


@pytest.mark.parametrize("kind", [Closing, UntilClose])
async def test_connections_that_end_with_an_answer_are_opened_again(worker, serve, kind):
    port = await serve(lambda: kind(worker[0]))
    result, _ = await run_until(lambda result: result.checked > 3, port, stream=False)
    assert result.lost == 0


class Scripted(asyncio.Protocol):
    """Answers whatever it gets with the same bytes, then perhaps ends the connection."""

    def __init__(self, answer, then="stay"):
        self.answer = answer
        self.then = then

    def connection_made(self, transport):
        self.transport = transport

    def data_received(self, data):
        self.transport.write(self.answer)
        if self.then != "stay":
            getattr(self.transport, self.then)()


@pytest.mark.parametrize(
    ("answer", "then", "kind", "words"),
    [
        (b"HTTP/1.1 503 -\r\nContent-Length: 4\r\n\r\nbusy", "stay", "refused-503", "status 503: busy"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", "close", "incomplete", "before the message"),
        (b"", "close", "incomplete", "before the message"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "stay", "incomplete", "not the answer"),
        (b"nonsense\r\n\r\n", "stay", "http-5xx", "status 500"),
        (b"", "stay", "timeout", "no end within 0.5 s"),
    ],
)
async def test_what_is_lost_is_counted_by_kind(serve, answer, then, kind, words, monkeypatch):
    if kind == "timeout":
        monkeypatch.setattr(client, "DRAIN_S_MAX", 0.5)
    port = await serve(lambda: Scripted(answer, then))
    result, _ = await run_until(lambda result: result.lost >= 3, port, stream=False)
    assert result.checked == 0
    assert result.failures.keys() == {kind}
    assert words in result.first_failure


async def test_bytes_after_an_answer(serve):
    body = b'{"usage":{"completion_tokens":4}}'
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    port = await serve(lambda: Scripted(answer + b"more"))
    result, _ = await run_until(lambda result: result.failures, port, stream=False)
    assert result.failures.keys() == {"out-of-order"}
    assert "bytes after the answer: b'more'" in result.first_failure


async def test_nobody_listens(unused_tcp_port):
    await run_until(lambda result: result.failures == {"connect": 3}, unused_tcp_port, once=True)
    result, _ = await run_until(lambda result: result.lost > 3, unused_tcp_port)
    assert result.failures.keys() == {"connect"}


async def test_a_stream_that_could_not_begin_in_time_is_lost(worker):
    # The second would begin an hour later.
    result, _ = await run_until(
        lambda result: result.checked, worker[1], once=True, connections=2, ramp_s=7200
    )
    assert (result.checked, result.failures) == (1, {"timeout": 1})
    assert "did not stand before the end" in result.first_failure


def test_the_request():
    spec = LoadSpec(phase=phase(), model="m", ports=(1,), proxy_pids=(), worker_pids=())
    assert b'"stream":true' in request_bytes(spec)
    plain = spec.model_copy(update={"phase": phase(stream=False)})
    assert b'"stream"' not in request_bytes(plain)
    assert LoadSpec.model_validate_json(spec.model_dump_json()) == spec
