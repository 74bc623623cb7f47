"""nixl: vLLM's NixlConnector: decode workers read the KV (pull), or have it written to them (push)."""

from __future__ import annotations

from typing import ClassVar

from brproxy.engines.edits import read_object
from brproxy.engines.transfer import (
    PARAMS,
    Body,
    Handoff,
    Order,
    Transfer,
    one_token,
    params_in,
    register_transfer,
)

_PUSH = b'"push"'
_PREFILL_PARAMS = (
    b'{"do_remote_decode":true,"do_remote_prefill":false,"remote_engine_id":null,'
    b'"remote_block_ids":null,"remote_host":null,"remote_port":null}'
)


@register_transfer("nixl")
class NixlTransfer(Transfer):
    """One after the other: the prefill reply's ``kv_transfer_params`` are the decode leg's.

    As vLLM's own proxies do (``tests/v1/kv_connector/nixl_integration/toy_proxy_server.py`` and
    ``toy_push_proxy_server.py``). The parameters pass as they are; of a push, whose blocks the prefill worker
    finds by itself, without the block ids. A reply for several prompts has those of the first alone, so that
    such requests are not split.

    The lease is 30 s (``kv_lease_duration``) from the end of prefill until the decode worker's scheduler has
    the request, which then extends it. A decode worker that refuses a request, or whose engine has one that
    is ended before or while it fetches, tells the prefill worker to free the blocks
    (``pull_scheduler.py:request_finished``). Its frontend drops what is closed before it has read it, and
    then nobody tells: the blocks were seen to stay for the whole lease.
    """

    ORDER: ClassVar[Order] = Order.PREFILL_FIRST
    LEASE_S: ClassVar[float | None] = 25.0
    MIN_TOKENS: ClassVar[bytes | None] = None
    """What a prefill leg says of ``min_tokens``; None: nothing."""

    def prefill_body(self, path: str, body: Body, handoff: Handoff) -> bytes:
        """See Transfer.prefill_body."""
        document = self.read(path, body)
        return one_token(path, document, {PARAMS: _PREFILL_PARAMS}, min_tokens=self.MIN_TOKENS)

    def decode_body(self, path: str, body: Body, handoff: Handoff) -> bytes:
        """See Transfer.decode_body."""
        return self.read(path, body).edited({PARAMS: handoff.params or b"null"})

    def read_reply(self, body: bytes) -> bytes | None:
        """See Transfer.read_reply."""
        params = params_in(body)
        # Mostly there is nothing to be taken out, which needs no look at each member.
        if params is None or _PUSH not in params:
            return params
        document = read_object(params)
        if document is None or document.value("transfer_mode") != _PUSH:
            return params
        return document.edited({}, ("remote_block_ids",))

    def frees_by_decode(self) -> bool:
        """See Transfer.frees_by_decode."""
        return True
