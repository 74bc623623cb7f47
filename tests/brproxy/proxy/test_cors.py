"""Cross-origin fields on what the proxy itself answers: as workers say, or as the configuration does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.config import parse_config
from brproxy.proxy.cors import Cors
from brproxy.validation import ConfigError
from tests.brproxy.wire import get, post

PAGE = "https://page.example"
PREFLIGHT = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization,x-y")
OWN = ["/health", "/ready", "/metrics", "/v1/models", "/v1/chat/completions"]


def about_origins(answer):
    return {
        name.lower(): value for name, value in answer.fields if name.lower().startswith(b"access-control")
    }


@pytest.fixture
async def ask(start_proxy, raw, unused_tcp_port):
    """Return a function that asks a proxy without workers; what it answers is its own."""

    async def make(request, origins=(), url=f"http://127.0.0.1:{unused_tcp_port}", method="GET"):
        proxy = await start_proxy(
            [url],
            listen={"port": 0, "cors_origins": list(origins)},
            limits={"requests_max": 1, "retries_max": 0},
            worker={"model": "m"},
        )
        client = await raw(proxy)
        client.send(request)
        return await client.answer(method)

    return make


@pytest.mark.parametrize("path", OWN)
@pytest.mark.parametrize(
    "origins", [["*"], [PAGE, "http://other"], ["HTTPS://Page.Example"], ["http://other"], []]
)
async def test_own_answers_and_errors_may_be_read_by_pages_that_are_allowed(path, origins, ask):
    body = b'{"model":"m","prompt":"x"}'
    request = post(path, body, f"Origin: {PAGE}") if "chat" in path else get(path, f"Origin: {PAGE}")
    answer = await ask(request, origins)
    assert answer.status in ({502} if path.startswith("/v1/") else {200})
    exposed = {b"access-control-expose-headers": b"Retry-After, X-Request-Id"}
    if origins == ["*"]:
        assert about_origins(answer) == {b"access-control-allow-origin": b"*"} | exposed
        assert answer.all(b"vary") == []
    elif any(origin.lower() == PAGE for origin in origins):
        assert about_origins(answer) == {b"access-control-allow-origin": PAGE.encode()} | exposed
        assert answer.all(b"vary") == [b"Origin"]
    else:
        assert about_origins(answer) == {}
        assert answer.all(b"vary") == ([b"Origin"] if origins else [])


async def test_a_preflight_is_answered_for_pages_that_are_allowed(ask):
    answer = await ask(get("/v1/x", f"Origin: {PAGE}", *PREFLIGHT, method="OPTIONS"), [PAGE])
    assert answer.status == 204
    told = about_origins(answer)
    assert told[b"access-control-allow-origin"] == PAGE.encode()
    assert told[b"access-control-allow-headers"] == b"authorization,x-y"
    assert b"POST" in told[b"access-control-allow-methods"]
    assert told[b"access-control-max-age"] == b"600"
    assert answer.all(b"vary") == [b"Origin", b"Access-Control-Request-Headers"]


@pytest.mark.parametrize(
    ("origins", "fields"),
    [([], (f"Origin: {PAGE}", *PREFLIGHT)), ([PAGE], ("Origin: http://o", *PREFLIGHT)), ([PAGE], PREFLIGHT)],
)
async def test_other_options_go_to_a_worker(origins, fields, ask, start_worker, answer, fixed):
    worker = await start_worker(answer(fixed(b"", headers="Access-Control-Allow-Origin: w\r\n")))
    told = await ask(get("/v1/x", *fields, method="OPTIONS"), origins, worker.url)
    assert told.one(b"access-control-allow-origin") == b"w"
    assert len(worker.requests) == 1


async def test_the_models_are_the_proxys_own_answer(ask, start_worker, answer, fixed):
    about = "Access-Control-Allow-Origin: w\r\nAccess-Control-Allow-Credentials: true\r\n"
    worker = await start_worker(answer(fixed(b'{"data":[]}', headers=about)))
    told = await ask(get("/v1/models", f"Origin: {PAGE}"), ["*"], worker.url)
    assert about_origins(told)[b"access-control-allow-origin"] == b"*"
    assert b"access-control-allow-credentials" not in about_origins(told)
    told = await ask(get("/v1/models", f"Origin: {PAGE}"), [], worker.url)
    assert about_origins(told)[b"access-control-allow-origin"] == b"w"


async def test_what_a_worker_answers_is_its_own(ask, start_worker, answer, fixed):
    worker = await start_worker(answer(fixed(b"{}", headers="Access-Control-Allow-Origin: w\r\n")))
    told = await ask(get("/v1/x", f"Origin: {PAGE}"), ["*"], worker.url)
    assert about_origins(told) == {b"access-control-allow-origin": b"w"}


@given(st.lists(st.sampled_from(["*", PAGE, "http://a:1"]), max_size=3), st.none() | st.text(min_size=1))
def test_lines_are_the_same_as_fields(origins, origin):
    cors = Cors(origins)
    sent = None if origin is None else origin.encode("utf-8", "surrogatepass")
    lines = cors.lines(sent)
    assert lines.count(b"\r\n") == len(cors.fields(origin))
    allowed = b"Access-Control-Allow-Origin" in lines
    assert allowed == ("*" in origins or (origin or "").lower() in origins)


@pytest.mark.parametrize(
    "origin", ["page", "https://page/", "https://page/x", "https://", "", "https:// page", "null"]
)
def test_what_is_no_origin_is_an_error_of_the_configuration(origin):
    document = {"worker": [{"url": "http://h:1"}], "listen": {"cors_origins": [origin]}}
    with pytest.raises(ConfigError, match=r'x: listen\.cors_origins\[0\]: must be like "https://host:port"'):
        parse_config(document, "x")
