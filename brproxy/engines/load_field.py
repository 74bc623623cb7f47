"""The header field in which vLLM tells its load with a response: ORCA, as JSON and as text. Pure."""

from __future__ import annotations

from typing import NamedTuple

import orjson

from brproxy.engines.load import FULL_MAX, count_of

FORMAT_FIELD = b"endpoint-load-metrics-format"
"""What a request asks with, for JSON or TEXT."""
LOAD_FIELD = b"endpoint-load-metrics"
"""What the response says. vLLM has it with answers that are no streams, as they are when these are made."""

_BYTES_MAX = 4096
_USAGE, _WAITING = "kv_cache_usage_perc", "num_requests_waiting"
_PREFIX = "named_metrics."


class FieldLoad(NamedTuple):
    """What one response says: KV cache taken (0 to 1) and requests that wait, each None where it does not.

    ``is_bad``: something in it is not what it should be, and was left out.
    """

    usage: float | None = None
    waiting: int | None = None
    is_bad: bool = False


_BAD = FieldLoad(is_bad=True)


def read_load_field(value: bytes) -> FieldLoad:
    """Return what the field's ``value`` says; never raises."""
    form, _, rest = value.strip().partition(b" ")
    if len(value) > _BYTES_MAX:
        return _BAD
    if form.upper() == b"JSON":
        return _of_json(rest)
    return _of_text(rest) if form.upper() == b"TEXT" else _BAD


def _of_json(text: bytes) -> FieldLoad:
    try:
        document = orjson.loads(text)
    except orjson.JSONDecodeError:
        return _BAD
    named = document.get("named_metrics", {}) if isinstance(document, dict) else None
    return _of_named(named) if isinstance(named, dict) else _BAD


def _of_text(text: bytes) -> FieldLoad:
    named: dict[str, object] = {}
    for part in text.decode("latin-1").split(","):
        name, found, value = part.strip().partition("=")
        if not name and not found:
            continue
        try:
            figure = float(value)
        except ValueError:
            return _BAD
        # One for each of several engines, and nobody says whose is which.
        key = name.removeprefix(_PREFIX)
        if key in named:
            return _BAD
        named[key] = figure
    return _of_named(named)


def _of_named(named: dict[str, object]) -> FieldLoad:
    usage, waiting = _share_of(named.get(_USAGE)), count_of(named.get(_WAITING))
    is_bad = (_USAGE in named and usage is None) or (_WAITING in named and waiting is None)
    return FieldLoad(usage, waiting, is_bad)


def _share_of(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= FULL_MAX:
        return None
    return min(float(value), 1.0)
