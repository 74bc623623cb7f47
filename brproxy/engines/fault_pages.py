"""What vLLM says when a rank of its barrier group has failed, and how it is told to go on. Pure.

As vLLM 0.33 has it (``vllm/entrypoints/serve/fault_tolerance/api_router.py``, what it answers comes from
``vllm/v1/engine/core_client.py`` and ``vllm/v1/fault_tolerance/engine_core_sentinel.py``): with
``--enable-fault-tolerance`` a rank that fails, or whose peers do, ends what it runs and waits for 120 s to be
told what to do. A server has one engine then, as ranks are balanced from outside.
"""

from __future__ import annotations

from enum import Enum
from typing import Any, Final, NamedTuple

from brproxy.engines.body import read_json

STATUS_PATH = "/fault_tolerance/status"
APPLY_PATH = "/fault_tolerance/apply"
RETRY = b'{"instruction": "retry", "params": {}}'

BYTES_MAX = 1 << 16
"""Of a page that names an engine and an exception (bytes)."""

_WORDS_MAX = 200
_ENGINES_MAX = 1024


class Standing(Enum):
    """How a server stands: what it says, or that it says nothing.

    UNHEALTHY: it waits to be told what to do. DEAD: it cannot go on. SILENT: it did not answer this time.
    ABSENT: nobody is there.
    """

    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"
    DEAD = "dead"
    SILENT = "silent"
    ABSENT = "absent"


class Report(NamedTuple):
    """How a server stands and why; ``failed`` is the id of the last instruction that it could not follow."""

    standing: Standing
    reason: str = ""
    failed: str = ""


_SAID: Final = {each.value: each for each in (Standing.HEALTHY, Standing.UNHEALTHY, Standing.DEAD)}
_WORST_FIRST: Final = (Standing.DEAD, Standing.UNHEALTHY, Standing.HEALTHY)


def read_status(body: bytes) -> Report | None:
    """Return what the page at STATUS_PATH says, of several engines the worst; None if it is no such page."""
    engines = read_json(body).document.get("engines")
    if type(engines) is not list or not 1 <= len(engines) <= _ENGINES_MAX:
        return None
    reports = [_report(engine) for engine in engines]
    known = [report for report in reports if report is not None]
    if len(known) < len(reports):
        return None
    return min(known, key=lambda report: _WORST_FIRST.index(report.standing))


def read_instruction_id(body: bytes) -> str:
    """Return the id that a server has given to an instruction; "" if it does not say."""
    return _words(read_json(body).document.get("request_id"))


def _report(engine: Any) -> Report | None:
    status = engine.get("status") if type(engine) is dict else None
    standing = _SAID.get(status) if type(status) is str else None
    if standing is None:
        return None
    failed = _words(engine.get("last_ft_request_id"))
    reasons = (_words(engine.get("fault_info")), _words(engine.get("ft_error")))
    return Report(standing, "; ".join(filter(None, reasons)), failed)


def _words(value: Any) -> str:
    """Return a text as one line that a log can bear, "" for anything else."""
    return " ".join(value[:_WORDS_MAX].split()) if type(value) is str else ""
