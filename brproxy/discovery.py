"""Workers are asked who they are: all at once, bounded in bytes and in time."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Mapping, Sequence
from http import HTTPStatus

from brproxy.build import endpoint_settings, reach_of
from brproxy.config import Config
from brproxy.config_workers import Worker
from brproxy.engines.identity import MODELS, VERSION, identify, questions
from brproxy.findings import Finding, changes, completed, contradictions, told
from brproxy.origins import read_worker_url
from brproxy.proxy.asking import Question, ask
from brproxy.relay.endpoint import Endpoint, EndpointSettings
from brproxy.relay.errors import WorkerFailedError

log = logging.getLogger(__name__)

ASKED_AT_ONCE_MAX = 64
"""URLs that are asked at the same time (URLs)."""

_UNCODED = b"Accept-Encoding: identity\r\n"
_NEEDS_A_KEY = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})


async def find_out(
    config: Config, workers: Sequence[Worker] | None = None, settings: EndpointSettings | None = None
) -> dict[str, Finding]:
    """Return what asking gave, for the URL of each of ``workers`` (None: all that ``config`` has).

    Takes ``discovery.timeout_s`` at most. Who asks often gives ``settings``, which keep what TLS has read.
    """
    deadline_s = asyncio.get_running_loop().time() + config.discovery.timeout_s
    settings = settings or endpoint_settings(config)
    together = asyncio.Semaphore(ASKED_AT_ONCE_MAX)

    async def one(worker: Worker) -> Finding:
        endpoint = Endpoint(worker.url, settings, reach_of(worker))
        interview = _Interview(
            endpoint, settings, config.discovery.timeout_s, config.limits.control_bytes_max
        )
        try:
            async with asyncio.timeout_at(deadline_s), together:
                await interview.run()
        except TimeoutError:
            # What has been answered until now is told all the same.
            pass
        finally:
            interview.close()
        return interview.finding()

    asked = config.worker if workers is None else workers
    findings = await asyncio.gather(*(one(worker) for worker in asked))
    return {finding.url: finding for finding in findings}


async def fill_in(config: Config) -> Config:
    """Return ``config`` with what it leaves out as the engines say it; logs a line for each worker.

    What the file and the engine contradict each other in is a warning; the file holds. Who has said who it
    is, is not asked again.
    """
    asked = [worker for worker in config.worker if worker.heard.said is None]
    findings = await find_out(config, asked)
    filled = {worker.url: worker for worker in completed(asked, findings)}
    for worker in filled.values():
        tell(worker, findings[worker.url])
    return config.model_copy(update={"worker": [filled.get(each.url, each) for each in config.worker]})


def tell(worker: Worker, finding: Finding) -> None:
    """Log who ``worker`` is, as it was filled in, and what its engine contradicts the file in."""
    name = f"worker {worker.label} [{worker.barrier_group}]"
    if finding.identity is None:
        stays = "; what it held last stands in" if worker.heard.said is not None else ""
        log.warning("%s could not be asked who it is: %s%s", name, finding.failure, stays)
        return
    log.info("%s: %s", name, told(worker, finding.identity))
    for line in contradictions(worker, finding.identity):
        log.warning("%s: %s", name, line)


def tell_changes(before: Sequence[Worker], findings: Mapping[str, Finding]) -> None:
    """Log what the engines of workers say otherwise than when they were last asked."""
    for worker in before:
        finding = findings.get(worker.url)
        if finding is not None and finding.identity is not None and worker.heard.said is not None:
            for line in changes(worker.heard.said, finding.identity):
                log.warning("worker %s [%s]: %s", worker.label, worker.barrier_group, line)


class _Interview:
    """The questions to one URL, and what came of them."""

    def __init__(
        self, endpoint: Endpoint, settings: EndpointSettings, timeout_s: float, bytes_max: int
    ) -> None:
        self._endpoint = endpoint
        self._settings = settings
        self._timeout_s = timeout_s
        self._bytes_max = bytes_max
        self._pages: dict[str, bytes | None] = {}
        self._statuses: dict[str, int] = {}
        self._errors: list[WorkerFailedError] = []
        self._other_scheme = ""

    async def run(self) -> None:
        """Ask until nothing more is to be learnt, or nobody answers."""
        while paths := questions(self._pages):
            await asyncio.gather(*(self._ask(path) for path in paths))
            if not self._statuses:
                break
        if set(self._statuses.values()) <= {HTTPStatus.BAD_REQUEST}:
            await self._try_the_other_scheme()

    def close(self) -> None:
        """Close the connections."""
        self._endpoint.close()

    def finding(self) -> Finding:
        """Return what is known by now."""
        identity = identify(self._pages)
        return Finding(self._endpoint.origin, identity, "" if identity is not None else self._failure())

    async def _ask(self, path: str) -> None:
        try:
            reply = await ask(
                self._endpoint, Question(path, self._timeout_s, self._bytes_max, lines=_UNCODED)
            )
        except WorkerFailedError as error:
            self._errors.append(error)
            self._pages[path] = None
            return
        self._statuses[path] = reply.head.status
        self._pages[path] = reply.body if reply.head.status == HTTPStatus.OK else None

    async def _try_the_other_scheme(self) -> None:
        """Find out whether "http://" should be "https://", or the other way round."""
        origin = read_worker_url(self._endpoint.origin).origin
        other = "http" if origin.scheme == "https" else "https"
        host = origin.url.partition("://")[2]
        given = origin.authority.rpartition(":")[2] == str(origin.port)
        url = f"{other}://{host}" if given else f"{other}://{host}:{origin.port}"
        endpoint = Endpoint(url, self._settings)
        try:
            if other == "https":
                (await endpoint.connect()).abandon()
            else:
                await ask(endpoint, Question(VERSION, self._timeout_s, self._bytes_max))
        except WorkerFailedError as error:
            # A certificate that is not trusted is one: it speaks TLS.
            if not isinstance(error.__cause__, ssl.SSLCertVerificationError):
                return
        finally:
            endpoint.close()
        speaks = "speaks TLS" if other == "https" else "speaks no TLS"
        self._other_scheme = f'it {speaks}: its URL begins with "{other}://"'

    def _failure(self) -> str:
        """Return in one line why nobody knows who is there."""
        if self._other_scheme:
            return self._other_scheme
        if MODELS not in self._statuses:
            if self._errors:
                return str(self._errors[0])
            return f"it did not answer within {self._timeout_s:g} s"
        status = self._statuses[MODELS]
        if status in _NEEDS_A_KEY:
            return f"{MODELS} answers {status}: it wants a key, in [[worker]] headers"
        if len(set(self._statuses.values())) == 1 and status != HTTPStatus.OK:
            return f"it answers {status} to everything: no engine is there"
        return f"no engine is there that brproxy knows: {MODELS} answers {status}, and no list of models came"
