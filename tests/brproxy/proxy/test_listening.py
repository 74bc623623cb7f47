"""How the proxy accepts connections, over real sockets."""

import asyncio
import socket

import pytest

from brproxy.config_sections import Listen
from brproxy.listening import ListenError, url_of
from brproxy.relay.server import ClientProtocol

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


@pytest.mark.parametrize(
    ("settings", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"host": "::1"}, "http://[::1]:8000"),
        ({"host": "proxy", "tls_certificate_file": "x.pem"}, "https://proxy:8000"),
    ],
)
def test_where_clients_find_it(settings, url):
    assert url_of(Listen(**settings), 8000) == url
