"""Samples of a Prometheus page, picked by name. Pure, and never raises.

An engine's page is mostly histograms that nobody here asks for, and it may come damaged or endless. So lines
are found by their name and only those are read: the work is a search for each name, and what is no finite
number is no sample.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

SAMPLES_MAX = 4096
"""Most samples that are read of one page: some for each of a thousand ranks."""

# A label's value may hold any character, a brace too. Possessive, and bounded: no page makes it slow. The
# bound counts a value as one, and each other character: vLLM's vllm:cache_config_info has some 750.
_REST = re.compile(
    rb'(?:[ \t]*\{((?:[^"{}\n]|"(?:[^"\\\n]|\\.)*+"){0,8192}+)\}[ \t]*|[ \t]+)'
    rb"([-+.0-9A-Za-z]{1,64})(?=[ \t\r\n]|$)"
)
_LABEL = re.compile(r'\s*([A-Za-z_][A-Za-z0-9_]*)\s*=\s*"((?:[^"\\]|\\.)*+)"\s*,?')
_ESCAPED = re.compile(r"\\(.)")
_ESCAPES = {"n": "\n"}


class Sample(NamedTuple):
    """One line of a page: its name, its labels, and its value, which is finite."""

    name: str
    labels: dict[str, str]
    value: float


def samples(page: bytes, names: Iterable[str]) -> list[Sample]:
    """Return the samples called one of ``names``, in order of the page, at most SAMPLES_MAX of them.

    Of what the format allows (Prometheus text format 0.0.4 and OpenMetrics) timestamps and exemplars behind
    a value are passed over. A line that cannot be read is no sample.
    """
    found = []
    places = [(start, name) for name in set(names) for start in islice(_starts(page, name), SAMPLES_MAX)]
    for start, name in sorted(places):
        sample = _read(page, start, name)
        if sample is not None:
            found.append(sample)
            if len(found) == SAMPLES_MAX:
                break
    return found


def _starts(page: bytes, name: str) -> Iterator[int]:
    """Yield where a line begins with ``name``: searching for each takes less than looking at each line."""
    line = b"\n" + name.encode()
    if page.startswith(line[1:]):
        yield 0
    start = page.find(line)
    while start >= 0:
        yield start + 1
        start = page.find(line, start + 1)


def _read(page: bytes, start: int, name: str) -> Sample | None:
    line = _REST.match(page, start + len(name))
    if line is None:
        return None
    labels = (line[1] or b"").decode("utf-8", "replace")
    try:
        value = float(line[2])
    except ValueError:
        return None
    if not math.isfinite(value):
        return None
    pairs = {key: _ESCAPED.sub(_unescaped, text) for key, text in _LABEL.findall(labels)}
    return Sample(name, pairs, value)


def _unescaped(escaped: re.Match[str]) -> str:
    return _ESCAPES.get(escaped[1], escaped[1])
