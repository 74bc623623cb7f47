"""mooncake: the traces of the Mooncake paper (JSON lines)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, TextIO

import orjson

from loadgen.traces.trace_format import RowError, TraceFormat, count_field, make_request, register_format
from loadgen.workload import TraceRequest

_KEYS = {"timestamp", "input_length", "output_length"}


@register_format("mooncake")
class MooncakeFormat(TraceFormat):
    """``timestamp`` in ms, ``input_length``, ``output_length``, and ``hash_ids`` of 512-token blocks.

    Requests whose blocks are all the same send the same prompt.
    """

    HAS_TIMES: ClassVar[bool] = True

    def recognises(self, head: str) -> bool:
        """See TraceFormat.recognises."""
        # The first line may be longer than the head: its opening is enough.
        first = head.lstrip().split("\n", 1)[0]
        return first.startswith("{") and all(f'"{key}"' in first for key in _KEYS)

    def read(self, file: TextIO) -> Iterator[TraceRequest | None]:
        """See TraceFormat.read."""
        prompt_keys: dict[tuple[object, ...], int] = {}
        for line, text in enumerate(file, start=1):
            if not text.strip():
                continue
            row = _row(line, text)
            blocks = tuple(row["hash_ids"]) if isinstance(row.get("hash_ids"), list) else ()
            key = prompt_keys.setdefault(blocks, len(prompt_keys)) if blocks else None
            yield make_request(
                line,
                _seconds(line, row["timestamp"]),
                count_field(line, "input_length", row["input_length"]),
                count_field(line, "output_length", row["output_length"]),
                key,
            )


def _row(line: int, text: str) -> dict[str, Any]:
    try:
        row = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise RowError(line, f"must be a JSON object: {error}") from error
    if not isinstance(row, dict) or not row.keys() >= _KEYS:
        raise RowError(line, f"must be a JSON object with {', '.join(sorted(_KEYS))}")
    return row


def _seconds(line: int, timestamp: object) -> float:
    if not isinstance(timestamp, int | float):
        raise RowError(line, f"timestamp must be a number of milliseconds, got {timestamp!r}")
    return timestamp / 1000
