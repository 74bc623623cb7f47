"""What decode workers of the layer-wise form post to the proxy: what they must, and what nobody should."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from tests.brproxy.wire import WireError, read_answer
from tests.simulation.actions import Ask
from tests.simulation.kv import Cluster
from tests.simulation.loop import VirtualLoop
from tests.simulation.transport import PROXY
from tests.simulation.wire import Wire
from tests.simulation.workers import SCRIPT

URL = f"http://{PROXY[0]}:{PROXY[1]}"


class Posts:
    """The posts of one decode leg."""

    def __init__(self, loop: VirtualLoop, cluster: Cluster, wrong: Callable[[str, str], None]) -> None:
        self._loop = loop
        self._cluster = cluster
        self._wrong = wrong

    async def have_prefilled(self, host: str, request_id: bytes, ask: Ask, params: dict[str, Any]) -> bool:
        """Ask for a prefill, and wait until its KV is there; False: it does not come."""
        name, board = self._cluster.name(host), self._cluster.board
        target = str(params["metaserver"]).removeprefix(URL)
        if self._cluster.parted.drops_query:
            target = target.partition("?")[0]
        document = {
            "request_id": f"chatcmpl-{request_id.decode('latin-1')}",
            "do_remote_decode": True,
            "remote_engine_id": name,
            "remote_host": host,
            "remote_port": 9000,
            "remote_block_ids": [[1]],
        }
        body = json.dumps(document).encode()
        for kind in ask.posts:
            self._besides(kind, target, body)
        self._cluster.expected.add(name)
        # It goes on where the leg is ended, as the engine's own thread.
        post = self._start(target, body)
        try:
            has_failed = lambda: post.done() and post.result() != 200  # noqa: E731 - of this leg alone
            post.add_done_callback(lambda _post: board.changed())
            await board.until(
                lambda: name in self._cluster.delivered or has_failed(), self._cluster.parted.wait_s
            )
            return name in self._cluster.delivered
        finally:
            self._cluster.expected.discard(name)
            if "late" in ask.posts:
                self._loop.call_later(0.2, self._start, target, body)

    def _besides(self, kind: str, target: str, body: bytes) -> None:
        """Post something that is not this leg's own post."""
        path = target.partition("?")[0]
        if kind == "unknown":
            other = json.dumps({"request_id": "chatcmpl-nobody", "remote_engine_id": "n"}).encode()
            self._start(path, other, expected={404})
        elif kind == "no-json":
            self._start(target, b'{"request_id": ', expected={400})
        elif kind == "no-length":
            self._start(target, None, expected={400})
        elif kind == "long":
            self._start(target, b" " * 10_000 + b"[]", expected={400})
        elif kind == "twice":
            self._start(target, body)

    def _start(self, target: str, body: bytes | None, expected: set[int] | None = None) -> asyncio.Task[int]:
        task = self._loop.create_task(self._post(target, body, expected), name=SCRIPT)
        task.add_done_callback(_seen)
        return task

    async def _post(self, target: str, body: bytes | None, expected: set[int] | None) -> int:
        """Post ``body`` (None: in chunks); return the status, 0 where none comes."""
        try:
            _, wire = await self._loop.network.connect(Wire, *PROXY)
        except OSError:
            return 0
        framing = "Transfer-Encoding: chunked" if body is None else f"Content-Length: {len(body)}"
        lines = (
            f"POST {target} HTTP/1.1\r\nHost: proxy\r\n{framing}\r\nContent-Type: application/json\r\n\r\n"
        )
        upheavals = self._loop.upheavals
        try:
            await wire.send(lines.encode() + (b"2\r\n{}\r\n0\r\n\r\n" if body is None else body))
            while True:
                answer, _ = read_answer(bytes(wire.received), "POST", closed=wire.ended)
                if answer is not None:
                    break
                if not await wire.more() and not wire.received:
                    if self._loop.upheavals == upheavals and not wire.was_reset:
                        self._wrong("answered", f"a post to the metaserver is not answered: {body!r}")
                    return 0
        except WireError:
            return 0
        finally:
            wire.transport.close()
        if answer.status not in (expected or {200, 404, 502}):
            self._wrong("answered", f"a post to the metaserver is answered {answer.status}: {body!r}")
        return answer.status


def _seen(post: asyncio.Task[int]) -> None:
    if not post.cancelled():
        post.exception()
