"""What a server means by a DP rank's number: tried with requests of one token, for `brproxy check`.

The same header field is an index into a server's own ranks for one engine, and the deployment's rank for
another. A server that does not know a number answers 400, or 200 and an error event, or nothing at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from http import HTTPStatus
from typing import Any, NamedTuple

import orjson

from brproxy.proxy.asking import Question, ask
from brproxy.proxy.exchange.collect import Reply
from brproxy.ranks import RankGuess, rank_line
from brproxy.relay.endpoint import Endpoint
from brproxy.relay.errors import WorkerFailedError

PATH = "/v1/completions"

_WORDS_MAX = 160
"""Of a server's own words, what is shown (characters)."""


class _Taken(Enum):
    """What became of a request. UNKNOWN: it says nothing about the rank."""

    YES = "is taken"
    NO = "is refused"
    SILENT = "gets no answer"
    UNKNOWN = "cannot be tried"


class _Try(NamedTuple):
    """What became of a request, and in which words."""

    taken: _Taken
    words: str = ""


class RankVerdict(NamedTuple):
    """Whether nothing speaks against a guess, and a line that says so or what to change."""

    ok: bool
    text: str


@dataclass(frozen=True, slots=True)
class RankCheck:
    """Asks for one token of ``model`` ("": of none that is named), within so many seconds and bytes."""

    model: str
    timeout_s: float
    bytes_max: int

    async def check(self, endpoint: Endpoint, guess: RankGuess) -> RankVerdict:
        """Try the highest rank as ``guess`` addresses it; at most four requests, one after another."""
        highest = guess.ranks[-1]
        name = f"rank {highest}, sent as {guess.number(highest)},"
        tried = await self._try(endpoint, guess.number(highest))
        if tried.taken is _Taken.YES:
            doubt = await self._doubt(endpoint, guess)
            return RankVerdict(ok=True, text=f"{name} is taken{doubt}")
        what = f"{name} {tried.taken.value} ({tried.words})"
        if tried.taken is _Taken.UNKNOWN:
            return RankVerdict(ok=True, text=what)
        # Only if it is the rank that is not taken, and not the request.
        without = await self._try(endpoint, None)
        if without.taken is not _Taken.YES:
            text = f"{what}, and so is a request without a rank ({without.words}): ranks cannot be tried"
            return RankVerdict(ok=without.taken is not _Taken.SILENT, text=text)
        for other in guess.others():
            if (await self._try(endpoint, other.number(highest))).taken is _Taken.YES:
                number = other.number(highest)
                return RankVerdict(ok=False, text=f"{what}; {number} is taken: set {other}")
        text = f"{what}, nor is another number taken: set ranks to those that are behind this URL"
        return RankVerdict(ok=False, text=text)

    async def _doubt(self, endpoint: Endpoint, guess: RankGuess) -> str:
        """Return what speaks against a guess whose number is taken: that another's is as well."""
        for other in guess.others():
            number = other.number(guess.ranks[-1])
            if (await self._try(endpoint, number)).taken is _Taken.YES:
                return f"; so is {number}: unless more ranks than these are behind this URL, set {other}"
        return ""

    async def _try(self, endpoint: Endpoint, number: int | None) -> _Try:
        document: dict[str, Any] = {"prompt": "x", "max_tokens": 1}
        if self.model:
            document["model"] = self.model
        question = Question(
            PATH,
            self.timeout_s,
            self.bytes_max,
            lines=b"" if number is None else rank_line(number),
            afresh=True,
            document=orjson.dumps(document),
        )
        try:
            return _judged(await ask(endpoint, question))
        except WorkerFailedError as error:
            return _Try(_Taken.SILENT, str(error))


def _judged(reply: Reply) -> _Try:
    status, error = reply.head.status, _stated_error(reply.body)
    if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        return _Try(_Taken.YES) if error is None else _Try(_Taken.NO, f"status {status}, and {error}")
    taken = _Taken.NO if status == HTTPStatus.BAD_REQUEST else _Taken.UNKNOWN
    return _Try(taken, f"status {status}" if error is None else f"status {status}: {error}")


def _stated_error(body: bytes) -> str | None:
    """Return an error that ``body`` states, in one line: as a document, or as an event of a stream."""
    events = [line[5:] for line in body.splitlines() if line.startswith(b"data:")]
    for text in events or [body]:
        try:
            document = orjson.loads(text)
        except orjson.JSONDecodeError:
            continue
        if not isinstance(document, dict):
            continue
        if document.get("object") == "error":
            return _in_one_line(document.get("message"))
        if document.get("error") is not None:
            error = document["error"]
            return _in_one_line(error.get("message") if isinstance(error, dict) else error)
    return None


def _in_one_line(words: object) -> str:
    text = " ".join(str(words).split())
    printable = "".join(c if c.isprintable() else "?" for c in text[:_WORDS_MAX])
    return printable if len(text) <= _WORDS_MAX else printable + "…"
