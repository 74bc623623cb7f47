"""sglang: SGLang's bootstrap, where both legs meet in a numbered room of the prefill server."""

from __future__ import annotations

from typing import ClassVar, Final

import orjson

from brproxy.engines.edits import JsonObject
from brproxy.engines.input_logprobs import asks_input_logprobs
from brproxy.engines.transfer import (
    Body,
    Handoff,
    Order,
    Transfer,
    TransferError,
    one_sequence,
    prompts_of,
    register_transfer,
)
from brproxy.types import SEQUENCES_MAX

# A rank is chosen by header alone; a client's own would send its legs to different ones.
_OURS: Final = (
    *("bootstrap_host", "bootstrap_port", "bootstrap_room", "bootstrap_pair_key"),
    *("disagg_prefill_dp_rank", "routed_dp_rank", "data_parallel_rank"),
)
_SERVES: Final = ("completions", "responses", "generate")


@register_transfer("sglang")
class SglangTransfer(Transfer):
    """Both legs at once and with the same members; facts by ``srt`` of SGLang 0.5.23.

    A prefill server with ranks takes a request on rank ``room % ranks`` (``follow_bootstrap_room``, in
    ``managers/data_parallel_controller.py``), and fails one that a header sent elsewhere, unless
    ``disagg_prefill_dp_rank`` is there (``disaggregation/common/conn.py``): rooms are made congruent to the
    chosen rank, and both legs name it. A list of prompts has a room for each.

    The prefill leg keeps the client's limits: its token is the answer's first, which ``min_tokens`` must keep
    from being the end, and the engine stops there by itself (``disaggregation/prefill.py``). With ``n`` above
    one all sequences would be in one room (``managers/tokenizer_manager.py``).
    """

    ORDER: ClassVar[Order] = Order.TOGETHER
    DECODES_ALONE: ClassVar[bool] = False
    NESTED_LIMIT: ClassVar[str] = "max_new_tokens"

    def tells_of_prompt(self, path: str, body: bytes) -> bool:
        """See Transfer.tells_of_prompt."""
        return asks_input_logprobs(path, body)

    def read(self, path: str, body: Body) -> JsonObject:
        """See Transfer.read."""
        return body if isinstance(body, JsonObject) else one_sequence(path, body, _SERVES)

    def prefill_body(self, path: str, body: Body, handoff: Handoff) -> bytes:
        """See Transfer.prefill_body."""
        document = self.read(path, body)
        values = {"stream": b"false"} | _meeting(document, handoff)
        return document.edited(values, {*_OURS, "stream_options"})

    def decode_body(self, path: str, body: Body, handoff: Handoff) -> bytes:
        """See Transfer.decode_body."""
        document = self.read(path, body)
        return document.edited(_meeting(document, handoff), _OURS)


def _meeting(document: JsonObject, handoff: Handoff) -> dict[str, bytes]:
    """Return what both legs say of where they meet; raises TransferError where they could not."""
    count = prompts_of(document)
    if count is not None and count > SEQUENCES_MAX:
        msg = f"a request that is handed over must have at most {SEQUENCES_MAX} prompts"
        raise TransferError(msg)
    room, ranks = handoff.room, max(handoff.prefill_ranks, 1)
    if handoff.prefill_rank is not None:
        room += (handoff.prefill_rank - room) % ranks
    values: dict[str, object] = {
        "bootstrap_host": handoff.prefill_host,
        "bootstrap_port": handoff.bootstrap_port,
        "bootstrap_room": room,
    }
    if count is not None:
        values = {
            "bootstrap_host": [handoff.prefill_host] * count,
            "bootstrap_port": [handoff.bootstrap_port] * count,
            "bootstrap_room": [room + index * ranks for index in range(count)],
        }
    if handoff.prefill_rank is not None:
        values["disagg_prefill_dp_rank"] = handoff.prefill_rank
    return {name: orjson.dumps(value) for name, value in values.items()}
