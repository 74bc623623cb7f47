"""The admin API over real sockets: who may ask, what is answered, and what the proxy makes of it."""

import asyncio

import pytest

from brproxy.admin import BODY_BYTES_MAX
from brproxy.app import running_proxy
from brproxy.config import parse_config
from brproxy.roster import MemberState
from brproxy.validation import ConfigError
from tests.brproxy.wire import RawClient, get, post

TOKEN = "s3cret"


class Admin:
    """The admin API of a running proxy, as a client sees it."""

    def __init__(self, proxy, client):
        self.proxy = proxy
        self.url = f"http://127.0.0.1:{proxy.admin_port}"
        self.client = client

    async def ask(self, method, path, *, token=TOKEN, fields=(), **body):
        headers = dict(fields) | ({"Authorization": f"Bearer {token}"} if token else {})
        async with self.client.request(method, self.url + path, headers=headers, **body) as response:
            return response.status, await response.json()

    async def change(self, method, path):
        _, answer = await self.ask(method, path)
        (row,) = answer["workers"]
        return row["state"]

    async def states(self):
        _, answer = await self.ask("GET", "/admin/workers")
        return {row["name"]: row["state"] for row in answer["workers"]}


@pytest.fixture
def start(stack, client, tmp_path):
    async def start(*urls, health=False, path=None, **admin):
        document = {
            "listen": {"port": 0},
            "admin": {"enabled": True, "port": 0, "token": TOKEN} | admin,
            "health": {"enabled": health},
            "worker": [{"url": url, "name": f"dp-{i}"} for i, url in enumerate(urls)],
        }
        config = parse_config(document, "test")
        return Admin(await stack.enter_async_context(running_proxy(config, path=path)), client)

    return start


DEAD = ("http://127.0.0.1:1", "http://127.0.0.1:2")


async def test_workers_are_listed_with_what_is_booked(start, start_emulator):
    emulator = await start_emulator(1)
    admin = await start(emulator.urls[0], DEAD[0])
    status, answer = await admin.ask("GET", "/admin/workers")
    assert status == 200
    assert answer["workers"][0] == {
        "group": "default",
        "name": "dp-0",
        "url": emulator.urls[0],
        "state": "active",
        "health": "healthy",
        "requests": 0,
        "kv_tokens": 0,
        "slots": 64,
        "kv_capacity_tokens": None,
        "reason": "health checks are off",
    }
    assert [row["name"] for row in answer["workers"]] == ["dp-0", "dp-1"]
    assert answer["groups"] == [
        {
            "name": "default",
            "models": [],
            "prefills": False,
            "state": "active",
            "workers": 2,
            "requests": 0,
            "waiting": 0,
        }
    ]


async def test_a_worker_is_added_drained_resumed_and_removed(start, start_emulator, client):
    emulator = await start_emulator(1)
    admin = await start(*DEAD[:1])
    status, answer = await admin.ask("POST", "/admin/workers", json={"url": emulator.urls[0], "name": "a/b"})
    (row,) = answer["workers"]
    assert (status, row["name"], row["state"]) == (201, "a/b", "active")
    assert await admin.change("POST", "/admin/workers/dp-0/drain") == "draining"
    document = {"model": "emulated", "prompt": "x", "max_tokens": 1}
    async with client.post(f"http://127.0.0.1:{admin.proxy.port}/v1/completions", json=document) as response:
        assert response.status == 200, "by the one that was added"
    assert await admin.change("POST", "/admin/workers/dp-0/resume") == "active"
    assert await admin.change("DELETE", "/admin/workers/a%2Fb") == "gone"
    assert await admin.states() == {"dp-0": "active"}
    status, answer = await admin.ask("DELETE", "/admin/workers/dp-0")
    assert (status, answer["error"]["message"][:43]) == (409, "worker dp-0 is the last of group default: a")
    assert (await admin.ask("POST", "/admin/workers/gone/drain"))[0] == 404


async def test_one_that_is_removed_finishes_its_stream(start, start_worker, client, until):
    may_end = asyncio.Event()

    async def script(writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: {}\n\n")
        await may_end.wait()
        writer.write(b"data: [DONE]\n\n")
        return False

    slow = await start_worker(script)
    admin = await start(slow.url, DEAD[0])
    await admin.ask("POST", "/admin/workers/dp-1/drain")
    url = f"http://127.0.0.1:{admin.proxy.port}/v1/completions"
    async with client.post(url, json={"prompt": "x", "stream": True}) as response:
        _, answer = await admin.ask("DELETE", "/admin/workers/dp-0")
        (row,) = answer["workers"]
        assert (row["state"], row["requests"]) == ("leaving", 1)
        status, answer = await admin.ask("POST", "/admin/workers/dp-0/resume")
        assert (status, answer["error"]["message"]) == (
            409,
            "worker dp-0 leaves with its last request: it cannot be resumed, only added again.",
        )
        may_end.set()
        assert (await response.read()).endswith(b"[DONE]\n\n")
    (group,) = admin.proxy.service.fleet.groups
    await until(lambda: len(group.roster.members) == 1)
    assert not any(group.dispatcher.ledger.requests)


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("GET", "/", {}, (404, "The admin API has no such path; it has /admin/workers and /admin/reload.")),
        ("GET", "/admin/workers/", {}, (405, "This path of the admin API takes DELETE.")),
        ("GET", "/admin/workers?a=b", {}, (400, "The admin API takes no query.")),
        ("GET", "/admin/workers/dp-0/sleep", {}, (404, "The admin API has no such path")),
        ("PUT", "/admin/workers", {}, (405, "This path of the admin API takes GET and POST.")),
        ("GET", "/admin/workers", {"data": b"x"}, (400, "This path of the admin API takes no body.")),
        ("POST", "/admin/workers", {"data": b"{"}, (400, "The body is no JSON: ")),
        ("POST", "/admin/workers", {"data": b"[" * 9000}, (400, "The body is no JSON: ")),
        ("POST", "/admin/workers", {"data": b"\xff"}, (400, "The body is no JSON: ")),
        ("POST", "/admin/workers", {"json": []}, (400, "The body must be a JSON object")),
        ("POST", "/admin/workers", {"json": {}}, (400, "worker: url: is missing; it must be given")),
        (
            "POST",
            "/admin/workers",
            {"json": {"url": "h", "slotz": 1}},
            (400, "worker: url: must be like \"http://host:port\", got 'h'; worker: slotz: unknown key"),
        ),
        (
            "POST",
            "/admin/workers",
            {"data": bytes(BODY_BYTES_MAX + 1)},
            (413, "The request body is larger than"),
        ),
        ("POST", "/admin/reload", {}, (400, "the proxy was started without a configuration file")),
    ],
)
async def test_what_is_wrong_is_a_line(method, path, body, expected, start):
    admin = await start(*DEAD)
    status, answer = await admin.ask(method, path, **body)
    message = answer["error"]["message"]
    assert (status, message[: len(expected[1])]) == expected
    assert "\n" not in message
    assert await admin.states() == {"dp-0": "active", "dp-1": "active"}


@pytest.mark.parametrize("shown", ["", "s3cre", "s3cret2", "S3CRET", "s3cr\u00e9t"])
async def test_without_the_token_nothing_is_told_or_done(shown, start):
    admin = await start(*DEAD)
    for method, path in (
        ("GET", "/admin/workers"),
        ("POST", "/admin/workers/dp-0/drain"),
        ("DELETE", "/admin/workers/dp-0"),
        ("POST", "/admin/reload"),
        ("GET", "/x"),
    ):
        status, answer = await admin.ask(method, path, token=shown)
        assert status == 401
        assert TOKEN not in str(answer)
    assert await admin.states() == {"dp-0": "active", "dp-1": "active"}


async def test_a_token_of_another_scheme_is_none(start):
    admin = await start(*DEAD)
    fields = {"Authorization": f"Basic {TOKEN}"}
    assert (await admin.ask("GET", "/admin/workers", token="", fields=fields))[0] == 401


async def test_the_token_may_be_in_a_file(start, tmp_path):
    path = tmp_path / "token"
    path.write_text("in-a-file\n")
    admin = await start(*DEAD, token="", token_file=str(path))
    assert (await admin.ask("GET", "/admin/workers", token="in-a-file"))[0] == 200
    assert (await admin.ask("GET", "/admin/workers", token="other"))[0] == 401


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read: No such file"),
        (b"", "must have"),
        (b"a b", "must have"),
        (b"\xff", "no UTF-8"),
    ],
)
async def test_a_token_file_that_has_none(content, reason, start, tmp_path):
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"admin.token_file: .*{reason}"):
        await start(*DEAD, token="", token_file=str(path))


async def test_no_web_page_uses_an_api_without_a_token(start):
    admin = await start(*DEAD, token="")
    status, answer = await admin.ask(
        "POST", "/admin/workers/dp-0/drain", token="", fields={"Origin": "http://evil"}
    )
    assert (status, answer["error"]["message"]) == (
        403,
        "Web pages may not use an admin API without a token.",
    )
    assert (await admin.ask("POST", "/admin/workers/dp-0/drain", token=""))[0] == 200


async def test_it_is_off_by_default_and_not_on_the_proxy_s_own_port(
    start_proxy, client, answer, start_worker
):
    worker = await start_worker(answer(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"))
    proxy = await start_proxy([worker.url])
    assert proxy.running.admin_port is None
    async with client.get(proxy.url + "/admin/workers") as response:
        assert (response.status, await response.read()) == (404, b"")
    assert len(worker.requests) == 1, "for the proxy it is a path like any other"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org", "127.0.0.1.example.org"])
def test_without_a_token_only_a_loopback_address_will_do(host):
    with pytest.raises(ConfigError, match=r"test: admin: host .* needs token or token_file"):
        parse_config({"worker": [{"url": DEAD[0]}], "admin": {"host": host}}, "test")
    parse_config({"worker": [{"url": DEAD[0]}], "admin": {"host": host, "token": "x"}}, "test")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.1.2.3"])
def test_loopback_addresses(host):
    assert parse_config({"worker": [{"url": DEAD[0]}], "admin": {"host": host}}, "test").admin.host == host


@pytest.mark.parametrize(
    ("admin", "reason"),
    [
        ({"token": TOKEN, "token_file": "x"}, "token and token_file are both given"),
        ({"token": TOKEN + " "}, "token must be printable ASCII"),
        ({"token": TOKEN + "\n"}, "token must be printable ASCII"),
    ],
)
def test_no_message_shows_a_token(admin, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        parse_config({"worker": [{"url": DEAD[0]}], "admin": admin}, "test")
    assert TOKEN not in str(caught.value)


async def test_a_file_is_read_again_when_asked(start, tmp_path):
    path = tmp_path / "brproxy.toml"
    admin = await start(*DEAD, path=path)
    path.write_text(
        f'[log]\nlevel = "debug"\n[[worker]]\nurl = "{DEAD[0]}"\nname = "dp-0"\nslots = 3\n'
        '[[worker]]\nurl = "http://127.0.0.1:3"\nname = "dp-2"\n'
    )
    status, answer = await admin.ask("POST", "/admin/reload")
    assert status == 200
    assert answer["changes"] == [
        "added dp-2 [default]",
        "limits changed dp-0 [default] (slots)",
        "removed dp-1 [default]",
    ]
    assert "log.level" in answer["needs_restart"]
    assert await admin.states() == {"dp-0": "active", "dp-2": "active"}
    path.write_text("worker = 3\nlisten = 4\n")
    status, answer = await admin.ask("POST", "/admin/reload")
    assert status == 400
    assert answer["mistakes"] == [
        f"{path}: listen: must be a table, got 4",
        f"{path}: worker: must be a list, got 3",
    ]
    assert answer["error"]["message"] == "; ".join(answer["mistakes"])
    assert await admin.states() == {"dp-0": "active", "dp-2": "active"}


async def test_a_group_that_a_reload_removes_is_listed_until_its_last_request_has_ended(
    start, start_worker, client, tmp_path, until
):
    may_end = asyncio.Event()

    async def script(writer):
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: {}\n\n")
        await may_end.wait()
        return False

    slow, path = await start_worker(script), tmp_path / "brproxy.toml"
    admin = await start(slow.url, path=path)
    url = f"http://127.0.0.1:{admin.proxy.port}/v1/completions"
    async with client.post(url, json={"prompt": "x", "stream": True}):
        path.write_text(f'[limits]\nretries_max = 1\n[[worker]]\nurl = "{DEAD[0]}"\ngroup = "other"\n')
        _, answer = await admin.ask("POST", "/admin/reload")
        assert answer["changes"] == [
            "added group other",
            "removed group default",
            "added 127.0.0.1:1 [other]",
        ]
        assert "limits.retries_max" in answer["taken_up"]
        _, answer = await admin.ask("GET", "/admin/workers")
        groups = [(row["name"], row["state"], row["requests"]) for row in answer["groups"]]
        assert groups == [("default (leaving)", "leaving", 1), ("other", "active", 0)]
        assert [row["state"] for row in answer["workers"]] == ["leaving", "active"]
        status, answer = await admin.ask("POST", "/admin/workers/dp-0/drain")
        assert (status, answer["error"]["message"]) == (
            409,
            "worker dp-0 goes with its group default (leaving), whose last requests it serves.",
        )
        may_end.set()
    await until(lambda: [group.name for group in admin.proxy.service.fleet.groups] == ["other"])


async def test_reloads_at_once_come_one_after_the_other(start, tmp_path):
    path = tmp_path / "brproxy.toml"
    path.write_text(f'[[worker]]\nurl = "{DEAD[1]}"\nname = "dp-0"\n')
    admin = await start(*DEAD, path=path)
    answers = await asyncio.gather(*(admin.ask("POST", "/admin/reload") for _ in range(9)))
    assert {status for status, _ in answers} == {200}
    assert sum(bool(answer["changes"]) for _, answer in answers) == 1
    (group,) = admin.proxy.service.fleet.groups
    assert [m.state for m in group.roster.members] == [MemberState.ACTIVE]


@pytest.fixture
def connect(stack):
    """Return a function that connects a RawClient to an admin API."""

    async def connect(admin):
        client = await RawClient.connect(admin.proxy.admin_port)
        stack.callback(client.writer.close)
        return client

    return connect


@pytest.fixture
def lines():
    return (f"Authorization: Bearer {TOKEN}",)


async def test_a_body_that_does_not_come_is_not_waited_for(start, lines, monkeypatch, connect):
    admin = await start(*DEAD)
    # Now, so that it is the body's alone.
    monkeypatch.setattr("brproxy.admin.PATIENCE_S", 0.05)
    client = await connect(admin)
    client.send(post("/admin/workers", b"x" * 9, *lines)[:-1])
    assert (await client.answer()).status == 408
    assert await client.ended()


async def test_a_body_that_is_none(start, lines, connect):
    admin = await start(*DEAD)
    client = await connect(admin)
    head = "\r\n".join(["POST /admin/workers HTTP/1.1", "Host: h", "Transfer-Encoding: chunked", *lines])
    client.send(head.encode() + b"\r\n\r\nzz\r\n")
    assert (await client.answer()).status == 400
    assert await client.ended()


async def test_what_is_no_http_is_answered_in_a_line(start, connect):
    admin = await start(*DEAD)
    client = await connect(admin)
    client.send(b"\x16\x03\x01\r\n\r\n")
    answer = await client.answer()
    assert (answer.status, answer.body[:10]) == (400, b'{"error":{')


async def test_idle_clients_give_way(start, monkeypatch, connect):
    monkeypatch.setattr("brproxy.admin.CONNECTIONS_MAX", 2)
    admin = await start(*DEAD)
    clients = [await connect(admin) for _ in range(3)]
    assert await clients[0].ended()
    clients[2].send(get("/admin/workers", f"Authorization: Bearer {TOKEN}"))
    assert (await clients[2].answer()).status == 200
