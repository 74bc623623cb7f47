"""Clients that speak HTTPS."""

import ssl

import pytest
import trustme

from brproxy.listening import ListenError

CHAT = "/v1/chat/completions"
ASK = {"model": "emulated", "stream": True, "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}


@pytest.fixture
def authority():
    return trustme.CA()


@pytest.fixture
def pem(authority, tmp_path):
    path = tmp_path / "proxy.pem"
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(path)
    return path


async def test_a_stream_over_tls(start_emulator, start_proxy, client, authority, pem):
    proxy = await start_proxy(
        (await start_emulator(1)).urls, listen={"port": 0, "tls_certificate_file": str(pem)}
    )
    context = ssl.create_default_context()
    authority.configure_trust(context)
    url = proxy.url.replace("http:", "https:") + CHAT
    async with client.post(url, json=ASK, ssl=context) as response:
        body = await response.read()
    assert (response.status, body.count(b"data: "), body.endswith(b"data: [DONE]\n\n")) == (200, 7, True)
    await proxy.idle()


async def test_a_worker_is_told_that_the_client_speaks_https(
    start_worker, answer, fixed, start_proxy, client, authority, pem
):
    worker = await start_worker(answer(fixed(b"{}")))
    proxy = await start_proxy([worker.url], listen={"port": 0, "tls_certificate_file": str(pem)})
    context = ssl.create_default_context()
    authority.configure_trust(context)
    async with client.get(proxy.url.replace("http:", "https:") + "/v1/files", ssl=context) as response:
        assert response.status == 200
    (_, fields, _) = worker.requests[0]
    assert (fields["x-forwarded-proto"], fields["x-forwarded-for"]) == ("https", "127.0.0.1")


async def test_a_certificate_that_cannot_be_used_is_named(start_proxy, tmp_path):
    missing = str(tmp_path / "none.pem")
    with pytest.raises(
        ListenError, match=r"listen.tls_certificate_file: '.*none.pem' or its key cannot be used: No such"
    ):
        await start_proxy(["http://127.0.0.1:1"], listen={"port": 0, "tls_certificate_file": missing})
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    with pytest.raises(ListenError, match=r"empty.pem' or its key cannot be used"):
        await start_proxy(["http://127.0.0.1:1"], listen={"port": 0, "tls_certificate_file": str(empty)})
