"""Reloads and a rolling replacement of all workers under running streams: what becomes of the streams.

``python -m tests.brproxy.proxy.reloads --reloads 200 --streams 300`` prints the figures. Workers here
never cut a stream: one that does not come whole was cut by the proxy.
"""

import argparse
import asyncio
import random
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from brproxy.app import running_proxy
from brproxy.config import load_config
from brproxy.config_workers import Worker
from brproxy.roster import Change

WORKERS = 4
"""Workers in the file; as many more take their places."""

TOKENS = 20
CHUNK = b'data: {"choices":[{"index":0,"text":" %d"}]}\n\n'
DONE = b"data: [DONE]\n\n"
STREAM = b"".join(CHUNK % number for number in range(TOKENS)) + DONE
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclass
class Figures:
    """What became of the streams; ``went_on``: those that ran while their worker was made to leave."""

    reloads: int = 0
    changes: int = 0
    replaced: int = 0
    whole: int = 0
    went_on: int = 0
    most_at_once: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self):
        return (
            f"{self.reloads} reloads with {self.changes} changes, {self.replaced} workers replaced in turn: "
            f"{self.whole} streams came whole, {self.most_at_once} at once, {self.went_on} went on while "
            f"their worker left, {len(self.wrong)} failed or were cut"
        )


async def _serve(reader, writer, gap_s):
    """Answer requests with a stream of TOKENS chunks, ``gap_s`` apart, and checks; it has no other pages."""
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            _, found, rest = head.lower().partition(b"content-length:")
            await reader.readexactly(int(rest.partition(b"\r\n")[0]) if found else 0)
            if head.startswith(b"GET /health"):
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
                continue
            if head.startswith(b"GET "):
                writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
                continue
            writer.write(HEAD)
            for event in STREAM.splitlines(keepends=True)[::2]:
                await asyncio.sleep(gap_s)
                piece = event + b"\n"
                writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            writer.write(b"0\r\n\r\n")
    except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
        # Cancelled with the loop, when all is over.
        pass
    finally:
        writer.close()


@asynccontextmanager
async def workers(count, gap_s):
    """Run ``count`` workers and give their URLs."""
    async with AsyncExitStack() as stack:
        urls = []
        for _ in range(count):
            server = await asyncio.start_server(
                # All streams may come to one at once, and a slow machine is no slow worker.
                lambda r, w: _serve(r, w, gap_s),
                "127.0.0.1",
                0,
                backlog=4096,
            )
            stack.callback(server.close)
            urls.append(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        yield urls


def write(path, table):
    """Write a file with ``table``: URL and slots of each worker by its name."""
    text = "[listen]\nport = 0\n[health]\ninterval_s = 0.2\ntimeout_s = 60\n"
    text += "[limits]\npool_wait_s_max = 600\n[timeouts]\nconnect_s = 60\n"
    for name, (url, slots) in table.items():
        text += f'[[worker]]\nname = "{name}"\nurl = "{url}"\nslots = {slots}\n'
    path.write_text(text)


def draw(rng, urls, slots):
    """Draw the workers of a file: some of the names, on any of the workers, with limits of their own."""
    names = rng.sample([f"dp-{i}" for i in range(WORKERS)], rng.randint(1, WORKERS))
    places = rng.sample(urls, len(names))
    return {name: (url, rng.randint(1, slots)) for name, url in zip(names, places, strict=True)}


class Run:
    """One proxy, its streams, and what happens to its workers meanwhile."""

    def __init__(self, proxy, session, figures):
        self._proxy = proxy
        self._session = session
        self._figures = figures
        self._url = f"http://127.0.0.1:{proxy.port}/v1/completions"
        (self.group,) = proxy.service.fleet.groups
        self.ledger = self.group.dispatcher.ledger
        self.group.roster.observe(self._changed)
        self._is_over = False

    def _changed(self, member, change):
        if change is Change.DRAINING:
            self._figures.went_on += self.ledger.requests[member.index]

    async def _ask(self):
        """Ask for one stream after the other, and see that each comes whole."""
        document = {
            "model": "m",
            "prompt": "x" * 400,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        while not self._is_over:
            try:
                async with self._session.post(self._url, json=document) as response:
                    content = await response.read()
            except aiohttp.ClientError as error:
                self._figures.wrong.append(repr(error))
                continue
            self._figures.most_at_once = max(self._figures.most_at_once, self.ledger.bound + 1)
            if response.status == 200 and content == STREAM:
                self._figures.whole += 1
            else:
                self._figures.wrong.append(f"{response.status}: {content[-200:]!r}")

    async def under(self, streams, what):
        """Do ``what`` while so many streams run; then let all end."""
        tasks = [asyncio.create_task(self._ask()) for _ in range(streams)]
        try:
            while self.ledger.bound < streams and not self._figures.wrong:
                await asyncio.sleep(0.01)
            await what
        finally:
            self._is_over = True
            await asyncio.gather(*tasks)

    async def reloads(self, count, path, urls, slots, pause_s, seed):
        """Read a new file every ``pause_s``, drawn from ``seed``."""
        rng = random.Random(seed)
        for _ in range(count):
            write(path, draw(rng, urls, slots))
            changes = await self._proxy.reloading.reload()
            self._figures.reloads += 1
            self._figures.changes += len(changes.steps)
            await asyncio.sleep(pause_s)

    async def replace_all(self, urls, slots):
        """Replace each worker by one at a place that none is at, one after the other."""
        deployment = self._proxy.deployment
        for number, old in enumerate(list(deployment.config.worker)):
            taken = {worker.url for worker in deployment.config.worker}
            url = next(url for url in urls if url not in taken)
            (new,) = deployment.add(Worker(url=url, name=f"new-{number}", slots=slots))
            while not new.is_routable:
                await asyncio.sleep(0.01)
            (member,) = deployment.remove(old.label)
            while member in self.group.roster.members:
                await asyncio.sleep(0.01)
            self._figures.replaced += 1

    def check_books(self):
        """Note what is left of requests that have all ended."""
        (service,) = self._proxy.service.groups.values()
        if self.ledger.bound or any(self.ledger.kv_tokens) or any(self.ledger.requests):
            self._figures.wrong.append(f"left in the books: {self.ledger!r}")
        members = self.group.roster.members
        if len(service.endpoints) != len(members) or any(member.leaves for member in members):
            self._figures.wrong.append(f"left of those who went: {self.group.roster!r}")


async def run(reloads, streams, *, gap_s=0.1, pause_s=0.05, seed=0):
    """Run it and return the figures; ``gap_s`` between two tokens, ``pause_s`` between two reloads."""
    figures = Figures()
    slots = streams
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "brproxy.toml"
        async with workers(2 * WORKERS, gap_s) as urls:
            write(path, {f"dp-{i}": (urls[i], slots) for i in range(WORKERS)})
            connector = aiohttp.TCPConnector(limit=0)
            async with (
                running_proxy(load_config(path), path=path) as proxy,
                aiohttp.ClientSession(connector=connector) as session,
            ):
                one = Run(proxy, session, figures)

                async def all_of_it():
                    await one.reloads(reloads, path, urls, slots, pause_s, seed)
                    write(path, {f"dp-{i}": (urls[i], slots) for i in range(WORKERS)})
                    await proxy.reloading.reload()
                    await one.replace_all(urls, slots)

                await one.under(streams, all_of_it())
                one.check_books()
    return figures


def main():
    """Print the figures; exit code 1 if any stream was lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reloads", type=int, default=200)
    parser.add_argument("--streams", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    figures = asyncio.run(run(arguments.reloads, arguments.streams, seed=arguments.seed))
    print(figures)
    for line in figures.wrong[:10]:
        print(line)
    raise SystemExit(bool(figures.wrong))


if __name__ == "__main__":
    main()
