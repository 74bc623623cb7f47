"""What tests of counted prompts share: an engine that counts when it may, and requests beside it."""

import asyncio

import orjson
import pytest

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
ENGINE = {"exact": "engine", "timeout_s": 600}
WORDS = "one two three four five six seven"
REPLY = orjson.dumps({"choices": [{"index": 0, "text": " x", "finish_reason": "stop"}]})


def ok(body, status="200 OK"):
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


class Engine:
    """A worker that answers requests when it is let, and counts words when it may."""

    def __init__(self):
        self.answers, self.counts = asyncio.Event(), asyncio.Event()
        self.answers.set()
        self.counts.set()
        self.answer = None
        self.asked = []
        self.served = []
        self.asked_lines = []

    async def script(self, worker, reader, writer):
        while True:
            body = await worker.read_request(reader)
            head = worker.requests[-1]
            if head.startswith(b"POST /tokenize "):
                self.asked.append(orjson.loads(body))
                self.asked_lines.append(head.lower())
                await self.counts.wait()
                writer.write(self.answer or self.counted(self.asked[-1]))
            else:
                self.served.append(body)
                await self.answers.wait()
                writer.write(ok(REPLY))

    @staticmethod
    def counted(document):
        texts = [m["content"] for m in document.get("messages", [])] or [document["prompt"]]
        count = sum(len(text.split()) for text in texts)
        return ok(orjson.dumps({"count": count, "max_model_len": 9, "tokens": list(range(count))}))


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def start(engine, raw_worker, start_proxy):
    async def start(prompts=ENGINE, workers=1, worker=None, **tables):
        urls = [(await raw_worker(engine.script)).url for _ in range(workers)]
        return await start_proxy(urls, prompts=prompts, worker={"slots": 1} | (worker or {}), **tables)

    return start


@pytest.fixture
def ask(client):
    """Return a function that sends a request and returns what becomes of it, as a task."""

    def ask(proxy, prompt=WORDS, path=TEXT, headers=None, **more):
        async def status():
            document = {"model": "m", "prompt": prompt} if path == TEXT else {"model": "m"}
            async with client.post(proxy.url + path, json=document | more, headers=headers) as response:
                await response.read()
                return response.status

        return asyncio.create_task(status())

    return ask


def counting(proxy):
    return proxy.running.service.counting


def prompts(proxy):
    return counting(proxy).stats.prompts
