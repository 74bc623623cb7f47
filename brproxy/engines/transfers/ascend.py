"""ascend: vllm-ascend's MooncakeConnector, one leg after the other as with NIXL."""

from __future__ import annotations

from typing import ClassVar

from brproxy.engines.recomputed import is_recomputed
from brproxy.engines.transfer import register_transfer
from brproxy.engines.transfers.nixl import NixlTransfer


@register_transfer("ascend")
class AscendTransfer(NixlTransfer):
    """The legs of vllm-ascend's own proxy.

    They are in ``examples/disaggregated_prefill_v1/load_balance_proxy_server_example.py``. A prefill worker
    keeps KV that nobody fetches for 480 s (``VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT``), and frees it when a
    decode worker refuses the request (``mooncake_connector.py:request_finished``). A decode worker that runs
    out of KV ends a sequence with the stop reason "recomputed" (``core/recompute_scheduler.py``).
    """

    LEASE_S: ClassVar[float | None] = 450.0
    ASKS_AGAIN: ClassVar[bool] = True
    MIN_TOKENS: ClassVar[bytes | None] = b"1"

    def asks_again(self, data: bytes) -> bool:
        """See Transfer.asks_again."""
        return is_recomputed(data)
