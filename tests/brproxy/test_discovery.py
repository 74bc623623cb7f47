"""Servers of every kind are asked who they are, over real sockets: nobody makes that fail or take longer."""

import logging
import random
import ssl
import tomllib

import pytest
import trustme

from brproxy.config import parse_config
from brproxy.discovery import fill_in, find_out
from brproxy.engines.identity import identify
from brproxy.first_file import file_text
from tests.brproxy.conftest import HANG_S
from tests.brproxy.engine_pages import (
    MODEL,
    OPENAI,
    SGLANG,
    VLLM,
    cache_config,
    loads,
    models,
    server_info,
    serving,
)

PATIENT_S = HANG_S
"""Longer than any answer takes: what is found does not hang on the machine's speed (seconds)."""

LIMITS_S = (0.5, 2, 8, 32)
"""Limits for what ends by them, tried one after the other: on a slow machine the first is too short."""


def config(*urls, timeout_s=PATIENT_S, connect_s=PATIENT_S, bytes_max=4 << 20, **keys):
    return parse_config(
        {
            "discovery": {"timeout_s": timeout_s},
            "timeouts": {"connect_s": connect_s},
            "limits": {"control_bytes_max": bytes_max},
            "worker": [{"url": url} | keys for url in urls],
        },
        "x",
    )


async def found(url, **settings):
    return (await find_out(config(url, **settings)))[url]


@pytest.fixture
def start(stack):
    async def start(pages, **settings):
        return await stack.enter_async_context(serving(pages, **settings))

    return start


@pytest.mark.parametrize(
    ("pages", "engine", "asked"),
    [
        (VLLM, "vllm", {"/version", "/v1/models", "/metrics"}),
        (SGLANG, "sglang", {"/version", "/v1/models", "/server_info", "/v1/loads"}),
        (OPENAI, "openai", {"/version", "/v1/models", "/server_info", "/metrics"}),
    ],
    ids=["vllm", "sglang", "openai"],
)
async def test_each_engine_is_known_by_what_it_says(start, pages, engine, asked):
    server = await start(pages)
    finding = await found(server.url)
    assert (finding.url, finding.failure, finding.identity.engine) == (server.url, "", engine)
    assert finding.identity == identify(pages)
    assert sorted(server.asked) == sorted(asked), "each once"


async def test_a_worker_is_asked_with_its_own_fields_and_below_its_path(start):
    server = await start({f"/base{path}": page for path, page in VLLM.items()})
    finding = await found(server.url + "/base", headers={"Authorization": "Bearer x"})
    assert (finding.url, finding.identity.engine) == (server.url + "/base", "vllm")
    assert server.heads
    assert all(b"Authorization: Bearer x\r\n" in head for head in server.heads)


@pytest.mark.parametrize("sglang", [False, True])
async def test_the_emulator_is_known(start_emulator, sglang):
    emulator = await start_emulator(1, slots=7, sglang=sglang)
    identity = (await found(emulator.urls[0])).identity
    assert (identity.engine, identity.names) == ("sglang" if sglang else "vllm", ("emulated",))
    assert identity.version
    assert identity.models[0].length_tokens_max == 131_072
    assert identity.slots == (7 if sglang else None)


async def test_a_refused_connection(unused_tcp_port):
    url = f"http://127.0.0.1:{unused_tcp_port}"
    finding = await found(url)
    assert (finding.identity, finding.failure) == (None, f"cannot connect to {url}: Connection refused")


@pytest.mark.parametrize(
    ("pages", "status", "failure"),
    [
        ({}, 404, "it answers 404 to everything: no engine is there"),
        ({}, 503, "it answers 503 to everything: no engine is there"),
        ({}, 401, "/v1/models answers 401: it wants a key, in [[worker]] headers"),
        (
            {"/version": b"{}", "/v1/models": b"<html>", "/server_info": b"1", "/metrics": b""},
            404,
            "no engine is there that brproxy knows: /v1/models answers 200, and no list of models came",
        ),
    ],
)
async def test_a_server_that_is_no_engine(start, pages, status, failure):
    finding = await found((await start(pages, status=status)).url)
    assert (finding.identity, finding.failure) == (None, failure)


async def test_a_server_that_is_silent(start):
    server = await start(VLLM, silent=["/version", "/v1/models"])
    finding = await found(server.url, timeout_s=0.2)
    assert (finding.identity, finding.failure) == (None, "it did not answer within 0.2 s")


async def test_what_was_answered_counts_where_the_rest_is_silence(start):
    server = await start(VLLM, silent=["/metrics"])
    for timeout_s in LIMITS_S:
        finding = await found(server.url, timeout_s=timeout_s)
        if "/metrics" in server.asked:
            break
    identity = finding.identity
    assert (identity.engine, identity.version, identity.kv_capacity_tokens) == ("vllm", "0.33.0", None)


async def test_a_page_that_is_too_long_is_not_read(start):
    server = await start(VLLM | {"/metrics": b"#" * 5000 + VLLM["/metrics"]})
    identity = (await found(server.url, bytes_max=4096)).identity
    assert (identity.engine, identity.kv_capacity_tokens) == ("vllm", None)


FAULTS = (
    b"",
    b"\0\xff\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{",
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx",
    b'HTTP/1.1 200 OK\r\nContent-Length: 23\r\n\r\n{"data": [{"id": null}]}',
)
PATHS = ("/version", "/v1/models", "/metrics", "/server_info", "/get_server_info", "/v1/loads")


@pytest.mark.parametrize("seed", range(8))
async def test_no_mixture_of_faults_breaks_it(start, seed):
    draw = random.Random(seed)
    servers = []
    for _ in range(8):
        pages = draw.choice([VLLM, SGLANG, OPENAI, VLLM | SGLANG, {}])
        faults = {path: draw.choice(FAULTS) for path in PATHS if draw.random() < 0.4}
        silent = [path for path in PATHS if draw.random() < 0.05]
        servers.append(await start(pages, faults=faults, silent=silent))
    urls = [server.url for server in servers]
    findings = await find_out(config(*urls, timeout_s=1, connect_s=0.3))
    assert list(findings) == urls
    for finding in findings.values():
        assert (finding.identity is None) == bool(finding.failure)
        assert finding.failure.isprintable()
    document = tomllib.loads(file_text(findings.values()))
    assert len(document.get("worker", [])) == sum(f.identity is not None for f in findings.values())


@pytest.mark.parametrize(
    "said", [b"SSH-2.0-OpenSSH_9.6\r\n", b"\0" * 64, b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}", b""]
)
async def test_a_server_that_breaks_off(start_worker, answer, said):
    # It also waits for ever for the end of what is no HTTP, when it is tried by TLS.
    finding = await found((await start_worker(answer(said))).url, connect_s=0.2)
    assert finding.identity is None
    assert finding.failure
    assert finding.failure.isprintable()


async def test_a_scheme_that_is_the_wrong_one_is_told(start):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1").configure_cert(context)
    speaks = await start(VLLM, tls=context)
    finding = await found(speaks.url.replace("https", "http"))
    assert (finding.identity, finding.failure) == (None, 'it speaks TLS: its URL begins with "https://"')
    finding = await found(speaks.url)
    assert "certificate verify failed" in finding.failure
    plain = await start(VLLM)
    finding = await found(plain.url.replace("http", "https"))
    assert (finding.identity, finding.failure) == (None, 'it speaks no TLS: its URL begins with "http://"')


async def test_the_silent_take_nothing_from_the_others(start):
    silent = await start({}, silent=["/version", "/v1/models"])
    engine = await start(VLLM)
    urls = [silent.url, silent.url.replace("127.0.0.1", "localhost"), engine.url]
    for timeout_s in LIMITS_S:
        findings = await find_out(config(*urls, timeout_s=timeout_s))
        if findings[engine.url].identity is not None:
            break
    told = f"it did not answer within {timeout_s:g} s"
    assert [findings[url].failure for url in urls] == [told, told, ""]


async def test_only_some_are_asked_at_once(start, monkeypatch):
    monkeypatch.setattr("brproxy.discovery.ASKED_AT_ONCE_MAX", 1)
    silent = await start({}, silent=["/version", "/v1/models"])
    engine = await start(VLLM)
    findings = await find_out(config(silent.url, engine.url, timeout_s=0.5))
    assert (findings[engine.url].failure, engine.asked) == ("it did not answer within 0.5 s", [])


async def test_gaps_are_filled_in_at_start_and_contradictions_are_warnings(start, unused_tcp_port, caplog):
    caplog.set_level(logging.INFO, "brproxy.discovery")
    gap = await start(SGLANG | {"/server_info": server_info(), "/v1/loads": loads((0, 100, 5000))})
    given = await start(SGLANG)
    dead = f"http://127.0.0.1:{unused_tcp_port}"
    asked = parse_config(
        {
            "discovery": {"timeout_s": PATIENT_S},
            "worker": [
                {"url": gap.url, "name": "gap", "engine": "sglang"},
                {"url": given.url, "name": "given", "engine": "sglang", "slots": 8, "kv_capacity_tokens": 9},
                {"url": dead, "name": "dead", "engine": "sglang", "slots": 9},
            ],
        },
        "x",
    )
    filled = await fill_in(asked)
    assert [(w.slots, w.kv_capacity_tokens) for w in filled.worker] == [(100, 5000), (8, 9), (9, None)]
    told = [(record.levelname, record.getMessage()) for record in caplog.records]
    said, slots = f"models: {MODEL}", "slots: 100 (it says)"
    refused = f"cannot connect to {dead}: Connection refused"
    assert told == [
        (
            "INFO",
            f"worker gap [default]: SGLang 0.5.23; {slots}; KV capacity: 5,000 tokens (it says); {said}",
        ),
        ("INFO", f"worker given [default]: SGLang 0.5.23; slots: 8; KV capacity: 9 tokens; {said}"),
        ("WARNING", "worker given [default]: slots = 8 in the file, but it runs 256 at once"),
        ("WARNING", "worker given [default]: kv_capacity_tokens = 9 in the file, but it has 440000"),
        ("WARNING", f"worker dead [default] could not be asked who it is: {refused}"),
    ]


async def test_several_ranks_behind_one_url_are_one_worker_s_room(start):
    page = cache_config(engine=["0", "1"], kv_cache_size_tokens="5000", num_gpu_blocks="9")
    server = await start({"/v1/models": models("vllm", MODEL), "/metrics": page})
    asked = config(server.url)
    assert (await fill_in(asked)).worker[0].kv_capacity_tokens == 10_000
