"""azure: the Azure LLM inference traces of 2023 and 2024 (Azure/AzurePublicDataset, CSV)."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import ClassVar, TextIO

from loadgen.traces.trace_format import RowError, TraceFormat, count_field, make_request, register_format
from loadgen.workload import TraceRequest

_COLUMNS = ["TIMESTAMP", "ContextTokens", "GeneratedTokens"]


@register_format("azure")
class AzureFormat(TraceFormat):
    """``TIMESTAMP,ContextTokens,GeneratedTokens``; 2023 has wall clock times, 2024 a UTC offset as well."""

    HAS_TIMES: ClassVar[bool] = True

    def recognises(self, head: str) -> bool:
        """See TraceFormat.recognises."""
        return head.split("\n", 1)[0].strip().split(",") == _COLUMNS

    def read(self, file: TextIO) -> Iterator[TraceRequest | None]:
        """See TraceFormat.read."""
        rows = csv.reader(file)
        next(rows)
        for row in rows:
            if not row:
                continue
            if len(row) != len(_COLUMNS):
                raise RowError(rows.line_num, f"must have {len(_COLUMNS)} columns, has {len(row)}")
            prompt_tokens = count_field(rows.line_num, "ContextTokens", row[1])
            output_tokens = count_field(rows.line_num, "GeneratedTokens", row[2])
            yield make_request(rows.line_num, _seconds(rows.line_num, row[0]), prompt_tokens, output_tokens)


def _seconds(line: int, timestamp: str) -> float:
    # Python reads microseconds; the 2023 files have a seventh digit, in front of an offset or the end.
    date, dot, rest = timestamp.partition(".")
    if dot:
        digits = len(rest) - len(rest.lstrip("0123456789"))
        timestamp = f"{date}.{rest[: min(digits, 6)]:0<6}{rest[digits:]}"
    try:
        moment = datetime.fromisoformat(timestamp)
    except ValueError as error:
        raise RowError(line, f"TIMESTAMP must be a date and time, got {timestamp!r}") from error
    # Differences are all that counts: without an offset, any zone will do.
    return moment.timestamp() if moment.tzinfo else moment.replace(tzinfo=UTC).timestamp()
