"""mooncake: vLLM's MooncakeConnector, whose prefill workers are told by decode workers where the KV goes."""

from __future__ import annotations

from typing import ClassVar

import orjson

from brproxy.engines.body import SLOW_BYTES_MAX, parsed
from brproxy.engines.transfer import (
    PARAMS,
    Body,
    Handoff,
    Order,
    Transfer,
    TransferError,
    one_token,
    register_transfer,
)

BOOTSTRAP_PORT = 8998
"""Where a prefill server tells its engine ids, unless configured (``VLLM_MOONCAKE_BOOTSTRAP_PORT``)."""

_ENGINE_ID_CHARACTERS_MAX = 256


@register_transfer("mooncake")
class MooncakeTransfer(Transfer):
    """Both legs at once, joined by a ``transfer_id``; the prefill reply says nothing of use.

    As vLLM's own proxy does (``examples/disaggregated/mooncake_connector/mooncake_connector_proxy.py``). The
    page at BOOTSTRAP_PATH is ``{"<rank>": {"engine_id": ..}}``. One id stands for one prompt, so that
    requests of several are not split.
    """

    ORDER: ClassVar[Order] = Order.TOGETHER
    BOOTSTRAP_PATH: ClassVar[str] = "/query"

    def prefill_body(self, path: str, body: Body, handoff: Handoff) -> bytes:
        """See Transfer.prefill_body."""
        params = {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "transfer_id": handoff.transfer_id,
        }
        return one_token(path, self.read(path, body), {PARAMS: orjson.dumps(params)})

    def decode_body(self, path: str, body: Body, handoff: Handoff) -> bytes:
        """See Transfer.decode_body; raises TransferError also without an engine id."""
        if not handoff.engine_id or not handoff.prefill_host:
            msg = f"no engine id of {handoff.prefill_host or 'the prefill worker'}: its /query must name one"
            raise TransferError(msg)
        port = BOOTSTRAP_PORT if handoff.bootstrap_port is None else handoff.bootstrap_port
        params = {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "remote_bootstrap_addr": f"http://{_in_url(handoff.prefill_host)}:{port}",
            "remote_engine_id": handoff.engine_id,
            "transfer_id": handoff.transfer_id,
        }
        return self.read(path, body).edited({PARAMS: orjson.dumps(params)})

    def read_bootstrap(self, body: bytes, rank: int | None) -> str | None:
        """See Transfer.read_bootstrap."""
        if len(body) > SLOW_BYTES_MAX:
            return None
        page = parsed(body)
        if type(page) is not dict:
            return None
        # A server that is one worker may be any rank of a deployment.
        entry = next(iter(page.values())) if rank is None and len(page) == 1 else page.get(str(rank))
        engine_id = entry.get("engine_id") if type(entry) is dict else None
        if type(engine_id) is not str or not 0 < len(engine_id) <= _ENGINE_ID_CHARACTERS_MAX:
            return None
        return engine_id if engine_id.isprintable() else None


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
