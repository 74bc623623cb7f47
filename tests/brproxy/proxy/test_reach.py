"""How a worker is reached: below a base path, with fields of its own, and with certificates."""

import asyncio
import ssl

import pytest
import trustme

from brproxy.config import parse_config
from brproxy.validation import ConfigError

DOCUMENT = {"model": "emulated", "prompt": "x", "max_tokens": 1}
OWN = {"Authorization": "Bearer worker", "X-Own": "1"}


async def ask(client, proxy, path="/v1/completions", headers=None, **more):
    async with client.post(
        proxy.url + path, json=DOCUMENT | more, headers=headers, allow_redirects=False
    ) as response:
        return response.status, response.headers, await response.read()


async def test_requests_checks_and_questions_go_below_the_base_with_the_workers_own_fields(
    start_worker, start_proxy, client, fixed
):
    async def script(writer):
        writer.write(fixed(b'{"object":"list","data":[{"id":"m"}]}'))
        return True

    server = await start_worker(script)
    workers = [{"url": server.url + "/base/", "headers": OWN, "ranks": "0-1"}]
    proxy = await start_proxy([], workers=workers, health=True, health_table={"interval_s": 600})
    said = {"authorization": "Bearer client", "X-OWN": "2", "X-Other": "3"}
    for _ in range(2):
        assert (await ask(client, proxy, "/v1/completions?q=/v1", said))[0] == 200
    async with client.get(proxy.url + "/v1/models", headers=said) as response:
        assert (await response.json())["data"][0]["id"] == "m"
    lines = [line for line, _, _ in server.requests]
    assert lines == [
        "GET /base/health HTTP/1.1",
        *["POST /base/v1/completions?q=/v1 HTTP/1.1"] * 2,
        "GET /base/v1/models HTTP/1.1",
    ]
    host = server.url.removeprefix("http://")
    for _, headers, _ in server.requests:
        assert (headers["host"], headers["authorization"], headers["x-own"]) == (host, "Bearer worker", "1")
    assert [headers.get("x-other") for _, headers, _ in server.requests] == [None, "3", "3", None]
    assert {headers.get("x-data-parallel-rank") for _, headers, _ in server.requests} == {None, "0", "1"}
    await proxy.idle()


async def test_a_client_gets_what_is_its_own_to_another_worker(start_worker, start_proxy, client, fixed):
    async def script(writer):
        writer.write(fixed(b"{}"))
        return True

    servers = [await start_worker(script) for _ in range(2)]
    workers = [{"url": servers[0].url, "headers": OWN}, {"url": servers[1].url}]
    proxy = await start_proxy([], workers=workers, routing={"policy": "round-robin"})
    for _ in range(2):
        await ask(client, proxy, headers={"Authorization": "Bearer client"})
    assert servers[0].requests[0][1]["authorization"] == "Bearer worker"
    assert servers[1].requests[0][1]["authorization"] == "Bearer client"
    assert "x-own" not in servers[1].requests[0][1]


async def test_where_a_worker_leads_is_below_its_base(start_worker, start_proxy, client):
    places = []

    async def script(writer):
        place = places.pop()
        writer.write(b"HTTP/1.1 307 There\r\nLocation: %b\r\nContent-Length: 0\r\n\r\n" % place.encode())
        return True

    server = await start_worker(script)
    proxy = await start_proxy([server.url + "/base"])
    for place, seen in (
        (f"{server.url}/base/v1/x", "/v1/x"),
        ("/base/v1/y", "/v1/y"),
        ("https://elsewhere/base", "https://elsewhere/base"),
    ):
        places.append(place)
        status, headers, _ = await ask(client, proxy)
        assert (status, headers["Location"]) == (307, seen)


@pytest.fixture
def authority():
    return trustme.CA()


@pytest.fixture
async def tls_worker(stack, authority):
    """Return the URL of a worker that takes only clients with a certificate of ``authority``."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(context)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    async def handle(reader, writer):
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                await reader.readexactly(int(length or 0))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=context)
    stack.callback(server.close)
    return f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.fixture
def files(authority, tmp_path):
    """Return the paths of PEM files by the keys that name them."""
    own = authority.issue_cert("brproxy.test")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    own.private_key_pem.write_to_path(tmp_path / "key.pem")
    for blob in own.cert_chain_pems:
        blob.write_to_path(tmp_path / "own.pem", append=True)
    return {
        "ca_file": str(tmp_path / "ca.pem"),
        "client_certificate_file": str(tmp_path / "own.pem"),
        "client_key_file": str(tmp_path / "key.pem"),
    }


async def test_certificates_on_both_sides(tls_worker, files, start_proxy, client):
    proxy = await start_proxy([], workers=[{"url": tls_worker, **files}], health=True)
    assert (await ask(client, proxy))[::2] == (200, b"{}")
    await proxy.idle()


@pytest.mark.parametrize("missing", ["ca_file", "client_certificate_file"])
async def test_without_one_of_them_there_is_no_connection(missing, tls_worker, files, start_proxy, client):
    given = {key: path for key, path in files.items() if key != missing}
    if missing == "client_certificate_file":
        del given["client_key_file"]
    proxy = await start_proxy([], workers=[{"url": tls_worker, **given}], limits={"retries_max": 0})
    assert (await ask(client, proxy))[0] == 502


async def test_other_files_count_for_new_connections_and_no_older_one_is_kept(
    tls_worker, files, start_proxy, client, until
):
    unknown = {"ca_file": files["ca_file"]}
    proxy = await start_proxy([], workers=[{"url": tls_worker, **unknown}], limits={"retries_max": 0})
    deployment = proxy.running.deployment

    def reload(given):
        config = parse_config({"worker": [{"url": tls_worker, **given}]}, "test")
        return deployment.change(config.worker, "test")

    (endpoint,) = proxy.running.service.groups["default"].endpoints
    for given, status in ((files, 200), (unknown, 502), (files, 200)):
        changes = reload(given)
        assert "reached otherwise" in str(changes)
        assert endpoint.take_idle() is None, "it was made with other files"
        assert (await ask(client, proxy))[0] == status
        await until(lambda: not proxy.ledger.bound)
    with pytest.raises(ConfigError, match="ca_file"):
        reload(files | {"ca_file": "/nowhere"})
    assert (await ask(client, proxy))[0] == 200
