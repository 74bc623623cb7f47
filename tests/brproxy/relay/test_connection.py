"""A worker's connection: what it tells the exchange that is on it, and when it may be used again."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.relay.connection import STALE_S, TUNNEL_CLOSE_S, Exchange, WorkerConnection
from brproxy.relay.errors import BrokenResponseError, StaleConnectionError, WorkerFailedError
from brproxy.relay.states import ConnectionStateError, State

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Transport:
    def __init__(self):
        self.written = []
        self.calls = []

    def write(self, data):
        self.written.append(data)

    def __getattr__(self, name):
        return lambda: self.calls.append(name)


class Loop:
    """The little that a connection asks of an event loop, with a time that tests set."""

    def __init__(self):
        self.now_s = 0.0
        self.timers = []

    def time(self):
        return self.now_s

    def call_later(self, delay_s, callback):
        self.timers.append((delay_s, callback))

    def create_future(self):
        return asyncio.get_running_loop().create_future()


class Noted(Exchange):
    """Notes what it is told, in order."""

    def __init__(self, *, bodiless=False, takes=None):
        super().__init__(bodiless=bodiless)
        self.told = []
        self.receive = lambda piece: self.told.append(("receive", piece))
        self.take_chunks = takes

    def interim(self, head):
        self.told.append(("interim", head.status))

    def head(self, head):
        self.told.append(("head", head.status))

    def end(self, piece, trailers):
        self.told.append(("end", piece, trailers))

    def upgraded(self, head, rest):
        self.told.append(("upgraded", head.status, rest))

    def lost(self, error):
        self.told.append(("lost", type(error)))

    def worker_paused(self):
        self.told.append(("worker_paused",))

    def worker_resumed(self):
        self.told.append(("worker_resumed",))

    def crashed(self, error):
        self.told.append(("crashed", type(error)))


class Connected:
    """A connection on a fake transport with an exchange on it."""

    def __init__(self, *reads, exchange=None, whole=True):
        self.idle = []
        self.transport = Transport()
        self.loop = Loop()
        self.connection = WorkerConnection("http://w:1", 4096, self.idle.append, self.loop)
        self.connection.connection_made(self.transport)
        self.exchange = self.next(exchange, whole=whole)
        self.read(*reads)

    def next(self, exchange=None, *, whole=True):
        exchange = exchange or Noted()
        self.connection.send(exchange, b"request", whole=whole)
        return exchange

    def read(self, *reads):
        for data in reads:
            self.connection.data_received(data)

    @property
    def told(self):
        return self.exchange.told


def test_a_response_in_one_read():
    on = Connected(OK + b"ab")
    assert on.told == [("head", 200), ("end", b"ab", b"")]
    assert (on.connection.state, on.idle) == (State.IDLE, [on.connection])


def test_a_response_in_pieces():
    on = Connected(OK[:10], OK[10:], b"a", b"b")
    assert on.told == [("head", 200), ("receive", b"a"), ("end", b"b", b"")]


def test_chunks_of_one_read_come_together():
    on = Connected(CHUNKED, b"1\r\na\r\n2\r\nbc\r\n", b"1\r\nd\r\n0\r\nX: y\r\n\r\n")
    assert on.told == [("head", 200), ("receive", b"abc"), ("end", b"d", b"X: y\r\n")]


def test_interim_responses_come_first():
    on = Connected(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\n\r\n", OK + b"ab")
    assert on.told == [("interim", 100), ("interim", 103), ("head", 200), ("end", b"ab", b"")]


def test_the_connections_end_may_be_the_responses():
    on = Connected(b"HTTP/1.1 200 OK\r\n\r\nabc")
    on.connection.connection_lost(None)
    assert on.told == [("head", 200), ("receive", b"abc"), ("end", b"", b"")]
    assert (on.connection.state, on.idle) == (State.CLOSED, [])


@pytest.mark.parametrize(
    ("reads", "error"),
    [
        ((), WorkerFailedError),
        ((OK[:5],), WorkerFailedError),
        ((OK,), BrokenResponseError),
        ((CHUNKED, b"5\r\nab"), BrokenResponseError),
    ],
)
def test_a_connection_that_is_lost(reads, error):
    on = Connected(*reads)
    on.connection.connection_lost(None)
    assert on.told[-1] == ("lost", error)
    assert (on.connection.state, on.idle) == (State.CLOSED, [])


def test_a_reset_is_no_end_of_a_response_that_ends_with_the_connection():
    on = Connected(b"HTTP/1.1 200 OK\r\n\r\nabc")
    on.connection.connection_lost(ConnectionResetError())
    assert on.told[-1] == ("lost", BrokenResponseError)


@pytest.mark.parametrize("reads", [(b"nonsense\r\n",), (CHUNKED, b"nonsense\r\n")])
def test_nonsense_ends_the_connection(reads):
    on = Connected(*reads)
    assert on.told[-1][0] == "lost"
    assert on.transport.calls == ["abort"]


def test_a_kept_connection_that_was_closed_is_stale_and_a_new_one_is_not():
    on = Connected(OK + b"ab")
    second = on.next()
    on.connection.connection_lost(None)
    assert second.told == [("lost", StaleConnectionError)]


def test_a_kept_connection_that_closes_later_is_not_stale():
    on = Connected(OK + b"ab")
    second = on.next()
    on.loop.now_s += STALE_S
    on.connection.connection_lost(None)
    assert second.told == [("lost", WorkerFailedError)], "the worker may have worked on it"


def test_a_kept_connection_that_began_to_answer_is_not_stale():
    on = Connected(OK + b"ab")
    second = on.next()
    on.read(OK[:3])
    on.connection.connection_lost(None)
    assert second.told == [("lost", WorkerFailedError)]


def test_bytes_that_nobody_asked_for_close_an_idle_connection():
    on = Connected(OK + b"ab")
    on.read(OK + b"cd")
    assert (on.connection.state, on.transport.calls) == (State.CLOSED, ["abort"])
    assert on.told == [("head", 200), ("end", b"ab", b"")]


def test_an_answer_before_the_request_is_whole_ends_the_connection():
    on = Connected(OK + b"ab", whole=False)
    assert on.told[-1] == ("end", b"ab", b"")
    assert (on.connection.state, on.idle) == (State.CLOSED, [])


def test_connection_close_is_respected():
    on = Connected(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") + b"ab")
    assert (on.connection.state, on.idle) == (State.CLOSED, [])


def test_a_head_request_has_no_body_and_keeps_the_connection():
    on = Connected(OK, exchange=Noted(bodiless=True))
    assert on.told == [("head", 200), ("end", b"", b"")]
    second = on.next()
    on.read(OK + b"ab")
    assert second.told == [("head", 200), ("end", b"ab", b"")]


@pytest.mark.parametrize("reads", [(), (OK,), (CHUNKED, b"1\r\na\r\n")])
def test_an_abandoned_exchange_hears_nothing_more(reads):
    on = Connected(*reads)
    before = list(on.told)
    on.connection.abandon()
    on.read(b"1\r\nb\r\n")
    on.connection.connection_lost(None)
    assert on.told == before
    assert "abort" in on.transport.calls


def test_an_exchange_may_abandon_its_connection_while_it_is_told():
    exchange = Noted()
    exchange.head = lambda _head: on.connection.abandon()
    on = Connected(exchange=exchange)
    on.read(OK)
    assert (exchange.told, on.connection.state) == ([], State.CLOSED)


def test_one_request_at_a_time():
    on = Connected()
    with pytest.raises(ConnectionStateError):
        on.next()


def test_a_tunnel_passes_everything_until_it_is_lost():
    on = Connected(b"HTTP/1.1 101 Up\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\nhi", b"more")
    assert on.told == [("upgraded", 101, b"hi"), ("receive", b"more")]
    on.connection.connection_lost(None)
    assert on.told[-1] == ("lost", BrokenResponseError)


def test_a_chunk_is_offered_whole_where_one_begins():
    taken = []

    def take(data):
        taken.append(data)
        return data == b"3\r\nbcd\r\n"

    on = Connected(CHUNKED, b"1\r\na\r\n", exchange=Noted(takes=take))
    on.read(b"3\r\nbcd\r\n", b"2\r\nef\r\n", b"3\r\ngh", b"i\r\n", b"0\r\n\r\n")
    assert taken == [b"3\r\nbcd\r\n", b"2\r\nef\r\n", b"3\r\ngh", b"0\r\n\r\n"]
    pieces = [("receive", piece) for piece in (b"a", b"ef", b"gh", b"i")]
    assert on.told == [("head", 200), *pieces, ("end", b"", b"")]


async def test_a_worker_that_reads_slowly_is_waited_for():
    on = Connected(whole=False)
    on.connection.pause_writing()
    assert on.told == [("worker_paused",)]
    waiting = on.connection.writable()
    on.connection.resume_writing()
    await waiting
    assert on.told[-1] == ("worker_resumed",)


@pytest.mark.parametrize("surplus", [b"x", OK + b"cd", b"\r\n", b"\0\0", b"HTTP/1.1 999"])
@pytest.mark.parametrize("response", [OK + b"ab", CHUNKED + b"2\r\nab\r\n0\r\n\r\n"])
@pytest.mark.parametrize("head_first", [True, False])
def test_a_whole_response_is_one_whatever_comes_behind_it(surplus, response, head_first):
    at = response.index(b"\r\n\r\n") + 4
    reads = [response[:at], response[at:] + surplus] if head_first else [response + surplus]
    on = Connected(*reads)
    assert on.told == [("head", 200), ("end", b"ab", b"")]
    if surplus.strip():
        assert (on.connection.state, on.idle) == (State.CLOSED, []), "what follows belongs to no request"


@pytest.mark.parametrize("status", ["000", "042", "099"])
def test_there_are_no_interim_responses_below_100(status):
    on = Connected(f"HTTP/1.1 {status} Odd\r\nContent-Length: 0\r\n\r\n".encode())
    assert on.told == [("lost", WorkerFailedError)]


def test_trailers_cannot_bring_in_what_belongs_into_the_head():
    names = [b"Set-Cookie", b"content-type", b"X-Sum", b"Location", b"connection", b"Trailer", b"Upgrade"]
    trailers = b"".join(b"%b: 1\r\n" % name for name in names)
    on = Connected(CHUNKED, b"1\r\na\r\n0\r\n" + trailers + b"\r\n")
    assert on.told[-1] == ("end", b"a", b"X-Sum: 1\r\n")
    for framing in (b"Content-Length: 5", b"Transfer-Encoding: chunked"):
        on = Connected(CHUNKED, b"1\r\na\r\n0\r\n" + framing + b"\r\n\r\n")
        assert on.told[-1] == ("end", b"a", b"") or on.told[-1][0] == "lost", "the parser may object first"


def test_a_reason_phrase_has_no_control_characters():
    heads = []
    exchange = Noted()
    exchange.head = heads.append
    Connected(b"HTTP/1.1 200 O\x01K\x7f\r\nContent-Length: 0\r\n\r\n", exchange=exchange)
    assert heads[0].reason == b"OK"


def test_a_tunnel_to_a_worker_that_does_not_read_is_closed_in_time():
    on = Connected(b"HTTP/1.1 101 Up\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
    on.connection.abandon()
    assert on.transport.calls == ["close"]
    ((delay_s, close_now),) = on.loop.timers
    assert delay_s == TUNNEL_CLOSE_S
    close_now()
    assert on.transport.calls == ["close", "abort"]


RESPONSES = (
    OK + b"ab",
    OK[:-2] + b"Connection: close\r\n\r\nab",
    CHUNKED + b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n",
    b"HTTP/1.1 103 Hints\r\n\r\n" + CHUNKED + b"1\r\na\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\nuntil the end",
    b"HTTP/1.1 101 Up\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\nhi",
    b"nonsense",
)


class Raising(Noted):
    """Raises at the ``at``-th thing that it is told, whichever that is."""

    def __init__(self, at):
        super().__init__()
        self._left = at
        self.receive = self._noting("receive")
        for name in ("interim", "head", "end", "upgraded", "lost", "worker_paused", "worker_resumed"):
            setattr(self, name, self._noting(name))
        self.take_chunks = self._noting("take_chunks")

    def _noting(self, name):
        def note(*_):
            self.told.append(name)
            self._left -= 1
            if self._left == 0:
                raise ValueError(name)

        return note


@given(
    response=st.sampled_from(RESPONSES),
    cuts=st.lists(st.integers(0, 100), max_size=5).map(sorted),
    raises_at=st.integers(1, 8),
    lost=st.sampled_from([None, ConnectionResetError()]),
)
def test_whatever_a_callback_raises_ends_its_exchange_once_and_nothing_else(response, cuts, raises_at, lost):
    exchange = Raising(raises_at)
    on = Connected(exchange=exchange)
    for start, end in zip([0, *cuts], [*cuts, len(response)], strict=True):
        if on.connection.state is not State.IDLE and response[start:end]:
            on.read(response[start:end])
        if on.connection.state is State.BODY:
            on.connection.resume_writing()
    kept = on.connection.state is State.IDLE
    on.connection.connection_lost(lost)
    raised = len(exchange.told) >= raises_at
    assert exchange.told.count(("crashed", ValueError)) == raised
    if raised:
        assert exchange.told[raises_at:] == [("crashed", ValueError)], "nothing follows"
        assert on.idle == [], "its connection is not used again"
    else:
        assert on.idle == ([on.connection] if kept else [])
    assert on.connection.state is State.CLOSED
