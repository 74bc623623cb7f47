"""Whether a decode worker of vllm-ascend gave a sequence up, so that it must be prefilled again. Pure."""

from __future__ import annotations

from typing import Final

from brproxy.engines.body import SLOW_BYTES_MAX, parsed

_REASON: Final = "recomputed"
_WRITTEN: Final = b'"recomputed"'


def is_recomputed(data: bytes) -> bool:
    """Tell whether an event or a reply ends a sequence with the stop reason "recomputed"; never raises.

    Only where the word stands alone between quotes is it parsed. One that is longer than a parser should have
    at once is none.
    """
    if _WRITTEN not in data or len(data) > SLOW_BYTES_MAX:
        return False
    document = parsed(data)
    choices = document.get("choices") if type(document) is dict else None
    return type(choices) is list and any(
        type(choice) is dict and choice.get("stop_reason") == _REASON for choice in choices
    )
