"""What kills.py sends: requests that know what came of them."""

import asyncio
import time

import orjson

from loadgen.dataplane.message import Message, MessageError
from loadgen.emulator.wire import DONE, words
from tests.brproxy.wire import post

PATH = "/v1/chat/completions"
_ERROR_EVENT = b'data: {"error":'


class Ask:
    """One generation; ``tokens`` come every ``interval_s``, after ``prefill_s``.

    ``first_s``: when its client had the first byte of an answer, ``last_s``: the last that came; on the
    machine's monotonic clock. ``is_whole``: the response ended as HTTP says.
    """

    def __init__(self, name, *, stream, prefill_s, interval_s, tokens, opening="nothing", kills=False):
        self.name = name
        self.stream = stream
        self.tokens = tokens
        self.status = 0
        self.body = bytearray()
        self.first_s = self.last_s = None
        self.is_whole = False
        order = {"name": name, "prefill_s": prefill_s, "interval_s": interval_s}
        self._request = post(
            PATH,
            orjson.dumps(
                {
                    "model": "m",
                    "stream": stream,
                    "messages": [{"role": "user", "content": "a prompt of five words"}],
                    "max_tokens": tokens,
                    "order": order | {"opening": opening, "kills": kills},
                }
            ),
        )
        self._task = None

    def start(self, port):
        self._task = asyncio.create_task(self._run(port))

    @property
    def has_ended(self):
        return self._task is not None and self._task.done()

    async def end(self):
        await self._task

    def cancel(self):
        if self._task is not None:
            self._task.cancel()

    async def _run(self, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(self._request)
        message = Message(until_close=True)
        try:
            while not message.complete:
                data = await reader.read(1 << 16)
                if not data:
                    message.end()
                    break
                self._take(message.feed(data))
            self.is_whole = True
        except (MessageError, ConnectionError):
            pass
        finally:
            writer.close()
        if message.head is not None:
            self.status = int(message.head.start_line.split()[1])

    def _take(self, payload):
        self.body += payload
        # Comments are no answer: they say only that somebody is there.
        if payload and (not self.stream or b"data: " in self.body):
            self.last_s = time.monotonic()
            self.first_s = self.first_s or self.last_s

    @property
    def worker(self):
        """The name of the worker that answered, "" for none."""
        return self.body.partition(b'"id":"chatcmpl-')[2].partition(b".")[0].decode()

    def is_served(self):
        """Whether the client has got every token, once and in order, and a clean end."""
        return self.status == 200 and self.is_whole and self._text() == words(1, self.tokens)

    def is_broken_off(self):
        """Whether the client has got the first tokens, then an error event, and no clean end."""
        before, found, _ = self.body.partition(_ERROR_EVENT)
        begun = self.status == 200 and words(1, self.tokens).startswith(self._text())
        return bool(found) and begun and not self.is_whole and DONE not in before

    def is_given_up(self):
        """Whether the client was told 502; in an event, if it had the head of a stream and no token yet."""
        if self.status == 200:
            return self.is_broken_off() and not self._text() and b'"code":502}' in self.body
        return self.status == 502

    def _text(self):
        if not self.stream:
            return orjson.loads(self.body)["choices"][0]["message"]["content"]
        events = [line[6:] for line in self.body.split(b"\n") if line.startswith(b"data: {")]
        choices = [choice for event in events for choice in orjson.loads(event).get("choices", ())]
        return "".join(choice["delta"]["content"] for choice in choices)

    def __str__(self):
        what = "stream" if self.stream else "request"
        return f"{what} {self.name} ({self.status}, whole: {self.is_whole}): …{bytes(self.body[-200:])!r}"
