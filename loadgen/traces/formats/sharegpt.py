"""sharegpt: ShareGPT conversations (JSON), the common offline benchmark; it has no times."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, TextIO

import orjson

from loadgen.traces.trace_format import RowError, TraceFormat, make_request, register_format
from loadgen.workload import TraceRequest

BYTES_PER_TOKEN = 4
"""The texts come without token counts; four bytes of English are about one token."""


@register_format("sharegpt")
class ShareGptFormat(TraceFormat):
    """A list of ``{"conversations": [{"from", "value"}, …]}``; first turn the prompt, second the output."""

    HAS_TIMES: ClassVar[bool] = False

    def recognises(self, head: str) -> bool:
        """See TraceFormat.recognises."""
        return head.lstrip().startswith("[") and '"conversations"' in head

    def read(self, file: TextIO) -> Iterator[TraceRequest | None]:
        """See TraceFormat.read. A row's line is the number of its conversation."""
        try:
            conversations = orjson.loads(file.read())
        except orjson.JSONDecodeError as error:
            raise RowError(error.lineno, f"must be a JSON list: {error.msg}") from error
        for number, conversation in enumerate(conversations, start=1):
            prompt, output = _first_exchange(number, conversation)
            yield make_request(number, 0.0, _tokens(prompt), _tokens(output))


def _first_exchange(number: int, conversation: Any) -> tuple[str, str]:
    try:
        turns = conversation["conversations"]
        values = [turn["value"] for turn in turns[:2]]
    except (KeyError, TypeError) as error:
        raise RowError(number, f"conversation {number} must have turns with a value") from error
    if len(values) < 2 or not all(isinstance(value, str) for value in values):
        return "", ""
    return values[0], values[1]


def _tokens(text: str) -> int:
    return -(-len(text.encode("utf-8", "surrogatepass")) // BYTES_PER_TOKEN)
