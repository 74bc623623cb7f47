"""How the proxy accepts connections, over real sockets."""

import asyncio
import errno
import logging
import random
import socket

import pytest

from brproxy.config_sections import Listen
from brproxy.listening import ListenError, urls_of
from brproxy.relay.server import ClientProtocol
from tests.brproxy.wire import RawClient, get

BOTH_LOOPS = True
CONNECTIONS = 24


async def test_many_connections_are_accepted_in_a_few_turns(
    raw_worker, answering, start_proxy, stack, monkeypatch
):
    made = []
    connection_made = ClientProtocol.connection_made

    def noting(self, transport):
        made.append(self)
        connection_made(self, transport)

    monkeypatch.setattr(ClientProtocol, "connection_made", noting)
    proxy = await start_proxy([(await raw_worker(answering())).url])
    for _ in range(CONNECTIONS):
        # Blocking, so that all of them wait when the loop gets its next turn.
        stack.enter_context(socket.create_connection(("127.0.0.1", proxy.running.port)))
    assert not made
    turns = 0
    while len(made) < CONNECTIONS:
        await asyncio.sleep(0)
        turns += 1
    assert turns < CONNECTIONS, "one for each turn would need as many"


async def test_a_taken_port_is_told_in_one_line(raw_worker, answering, start_proxy):
    worker = await raw_worker(answering())
    proxy = await start_proxy([worker.url])
    taken = f"listen: cannot listen on 127.0.0.1:{proxy.running.port}: Address already in use; choose a free"
    with pytest.raises(ListenError, match=taken):
        await start_proxy([worker.url], listen={"port": proxy.running.port})


async def test_an_unknown_host_is_told_in_one_line(raw_worker, answering, start_proxy):
    worker = await raw_worker(answering())
    with pytest.raises(ListenError, match=r"^listen: cannot listen on no\.invalid:0: [A-Z][\w ]+$"):
        await start_proxy([worker.url], listen={"host": "no.invalid", "port": 0})


def test_the_default_is_more_than_one():
    assert Listen().accepts_per_turn > CONNECTIONS


async def ask(host, port, request=None):
    """Return the answer to /health of who listens there."""
    client = RawClient(*await asyncio.open_connection(host, port))
    try:
        client.send(request or get("/health"))
        return await client.answer()
    finally:
        client.writer.close()


def has_ipv6():
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
HOSTS = ["127.0.0.1", "127.0.0.2", "127.3.3.3", "::1", "localhost"]
DRAWS = [random.Random(seed).choices(HOSTS, k=2 + seed) for seed in range(4)]


@needs_ipv6
@pytest.mark.parametrize("hosts", DRAWS, ids=str)
async def test_all_addresses_of_a_list_are_on_one_port(hosts, raw_worker, answering, start_proxy):
    proxy = await start_proxy([(await raw_worker(answering())).url], listen={"host": hosts, "port": 0})
    for host in hosts:
        assert (await ask(host, proxy.running.port)).status == 200
    listened = {"127.0.0.1" if host == "localhost" else host for host in hosts}
    for host in set(HOSTS) - listened - {"localhost"}:
        with pytest.raises(ConnectionRefusedError):
            await ask(host, proxy.running.port)


@needs_ipv6
@pytest.mark.parametrize("host", ["", "::", ["", "127.0.0.1"], ["::", "0.0.0.0", "::1"]], ids=str)
async def test_all_addresses_of_both_families(host, raw_worker, answering, start_proxy):
    worker = await raw_worker(
        answering(*[b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"] * 3), limit=1 << 16
    )
    proxy = await start_proxy([worker.url], listen={"host": host, "port": 0})
    for address in ("127.0.0.1", "127.9.9.9", "::1"):
        assert (await ask(address, proxy.running.port, get("/v1/files"))).status == 200
        # IPv4 clients have the address that they have, in no other family's spelling.
        told = f"X-Forwarded-For: {'127.0.0.1' if ':' not in address else address}".encode()
        assert told in worker.requests[-1].split(b"\r\n")


async def test_one_port_is_found_though_others_have_it_on_one_address(
    raw_worker, answering, start_proxy, stack, monkeypatch
):
    tried = []
    given = socket.socket.bind

    def bind(self, address):
        # The first ports that the system gives are taken on the second address.
        if address[1] and len(tried) < 3:
            tried.append(address[1])
            raise OSError(errno.EADDRINUSE, "taken")
        given(self, address)

    worker = await raw_worker(answering())
    monkeypatch.setattr(socket, "socket", type("Socket", (socket.socket,), {"bind": bind}))
    proxy = await start_proxy([worker.url], listen={"host": ["127.0.0.1", "127.0.0.2"], "port": 0})
    assert (await ask("127.0.0.2", proxy.running.port)).status == 200
    assert len(tried) == 3


@needs_ipv6
async def test_where_one_address_is_taken_none_is_left_open(raw_worker, answering, start_proxy):
    worker = await raw_worker(answering())
    proxy = await start_proxy([worker.url], listen={"host": "127.0.0.2", "port": 0})
    port = proxy.running.port
    with pytest.raises(
        ListenError, match=rf"^listen: cannot listen on 127\.0\.0\.2:{port}: Address already in use; ch"
    ):
        await start_proxy([worker.url], listen={"host": ["::1", "127.0.0.2"], "port": port})
    with pytest.raises(ConnectionRefusedError):
        await ask("::1", port)


async def test_a_machine_without_ipv6_listens_on_what_it_has(
    raw_worker, answering, start_proxy, monkeypatch, caplog
):
    class Socket(socket.socket):
        def __init__(self, family=-1, *arguments, **named):
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "no such family")
            super().__init__(family, *arguments, **named)

    worker = await raw_worker(answering())
    monkeypatch.setattr(socket, "socket", Socket)
    with caplog.at_level(logging.WARNING):
        proxy = await start_proxy([worker.url], listen={"host": "", "port": 0})
    assert (await ask("127.0.0.1", proxy.running.port)).status == 200
    told = f"listen: cannot listen on [::]:{proxy.running.port}: Address family not supported by protocol"
    assert told in caplog.messages
    with pytest.raises(ListenError, match=r"cannot listen on \[::1\]:0: Address family"):
        await start_proxy([worker.url], listen={"host": "::1", "port": 0})


@needs_ipv6
async def test_a_bad_request_is_logged_with_the_address_in_brackets(
    raw_worker, answering, start_proxy, caplog
):
    proxy = await start_proxy([(await raw_worker(answering())).url], listen={"host": "::1", "port": 0})
    assert (await ask("::1", proxy.running.port, b"GET\r\n\r\n")).status == 400
    assert any(message.startswith("bad request from [::1]: ") for message in caplog.messages)


@pytest.mark.parametrize("host", ["a" * 64 + ".x", "a..b", "a\0b"])
async def test_what_is_no_name_is_told_in_one_line(host, raw_worker, answering, start_proxy):
    worker = await raw_worker(answering())
    with pytest.raises(ListenError, match=r"^listen: cannot listen on [^\n]+: [^\n]+$"):
        await start_proxy([worker.url], listen={"host": host, "port": 0})


@pytest.mark.parametrize(
    ("settings", "urls"),
    [
        ({}, ["http://127.0.0.1:8000"]),
        ({"host": "::1"}, ["http://[::1]:8000"]),
        ({"host": "proxy", "tls_certificate_file": "x.pem"}, ["https://proxy:8000"]),
        ({"host": ["a", "::1", "a"]}, ["http://a:8000", "http://[::1]:8000"]),
        ({"host": ""}, ["http://0.0.0.0:8000", "http://[::]:8000"]),
    ],
)
def test_where_clients_find_it(settings, urls):
    assert urls_of(Listen(**settings), 8000) == urls
