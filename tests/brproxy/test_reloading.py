"""A file that is read again while a worker does not answer: what is known of it is not lost."""

from brproxy.app import running_proxy
from brproxy.config import load_config
from brproxy.discovery import fill_in
from tests.brproxy.engine_pages import MODEL, SGLANG, models, serving


async def test_who_does_not_answer_a_reload_keeps_what_it_was_known_to_hold(stack, tmp_path, caplog):
    server = await stack.enter_async_context(serving(SGLANG))
    path = tmp_path / "brproxy.toml"
    table = "[listen]\nport = 0\n[health]\nenabled = false\n[telemetry]\nenabled = false\n"
    table += f'[[worker]]\nurl = "{server.url}"\nname = "a"\nengine = "sglang"\n'
    path.write_text(table)
    filled = await fill_in(load_config(path))
    proxy = await stack.enter_async_context(running_proxy(filled, path=path))
    server.pages = {}
    assert (await proxy.reloading.reload()).steps == ()
    assert caplog.messages[-1].endswith("no engine is there; what it held last stands in")
    server.pages = SGLANG | {"/v1/models": models("sglang", "other")}
    await proxy.reloading.reload()
    assert caplog.messages[-1] == f"worker a [default]: it serves other now, and served {MODEL}"
    path.write_text(table + "slots = 8\n")
    server.pages = {}
    changes = await proxy.reloading.reload()
    assert list(map(str, changes.steps)) == ["limits changed a [default] (slots)"]
    (member,) = proxy.service.fleet.groups[0].roster.members
    assert (member.limits.slots, member.limits.kv_capacity_tokens) == (8, 440_000)
