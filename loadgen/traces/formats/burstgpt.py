"""burstgpt: the BurstGPT traces (CSV)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from typing import ClassVar, TextIO

from loadgen.traces.trace_format import RowError, TraceFormat, count_field, make_request, register_format
from loadgen.workload import TraceRequest

_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")


@register_format("burstgpt")
class BurstGptFormat(TraceFormat):
    """``Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type``, times in seconds.

    Failed requests have no response tokens and are skipped.
    """

    HAS_TIMES: ClassVar[bool] = True

    def recognises(self, head: str) -> bool:
        """See TraceFormat.recognises."""
        columns = head.split("\n", 1)[0].strip().split(",")
        return all(column in columns for column in _COLUMNS)

    def read(self, file: TextIO) -> Iterator[TraceRequest | None]:
        """See TraceFormat.read."""
        rows = csv.DictReader(file)
        for row in rows:
            timestamp, prompt, output = (row[column] for column in _COLUMNS)
            if None in (timestamp, prompt, output):
                raise RowError(rows.line_num, f"must have the columns {', '.join(_COLUMNS)}")
            yield make_request(
                rows.line_num,
                _seconds(rows.line_num, timestamp),
                count_field(rows.line_num, "Request tokens", prompt),
                count_field(rows.line_num, "Response tokens", output),
            )


def _seconds(line: int, timestamp: str) -> float:
    try:
        return float(timestamp)
    except ValueError as error:
        raise RowError(line, f"Timestamp must be a number of seconds, got {timestamp!r}") from error
