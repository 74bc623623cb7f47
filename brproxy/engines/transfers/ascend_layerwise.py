"""ascend-layerwise: vllm-ascend's MooncakeLayerwiseConnector, which sends KV layer by layer as it is made."""

from __future__ import annotations

import re
from typing import ClassVar, Final

import orjson

from brproxy.engines.body import parsed
from brproxy.engines.edits import read_object
from brproxy.engines.recomputed import is_recomputed
from brproxy.engines.transfer import (
    PARAMS,
    PARAMS_BYTES_MAX,
    Body,
    Handoff,
    Order,
    Transfer,
    one_token,
    register_transfer,
)

_REQUEST_ID_BYTES_MAX: Final = 512
# What vLLM makes of X-Request-Id for chats and, with the number of the prompt, for completions.
_ENGINE_ID: Final = re.compile(r"chatcmpl-(?P<chat>[!-~]+)|cmpl-(?P<completion>[!-~]+)-0")


@register_transfer("ascend-layerwise")
class AscendLayerwiseTransfer(Transfer):
    """The decode worker first: it has room for the KV before that is made, and asks for it.

    It posts where the KV goes to the ``metaserver`` that its leg names, and the prefill leg carries what it
    posted. As vllm-ascend's own proxy does
    (``examples/disaggregated_prefill_v1/load_balance_proxy_layerwise_server_example.py``). A post is known by
    the request's id in it, which the engine has prefixed. One request of several prompts or sequences makes
    several posts; it is not split.
    """

    ORDER: ClassVar[Order] = Order.DECODE_FIRST
    ASKS_AGAIN: ClassVar[bool] = True

    def prefill_body(self, path: str, body: Body, handoff: Handoff) -> bytes:
        """See Transfer.prefill_body."""
        values = {PARAMS: handoff.params or b"null"}
        return one_token(path, self.read(path, body), values, min_tokens=b"1")

    def decode_body(self, path: str, body: Body, handoff: Handoff) -> bytes:
        """See Transfer.decode_body."""
        params = {"do_remote_decode": False, "do_remote_prefill": True, "metaserver": handoff.metaserver}
        return self.read(path, body).edited({PARAMS: orjson.dumps(params)})

    def read_post(self, body: bytes) -> tuple[str, bytes] | None:
        """See Transfer.read_post."""
        document = read_object(body) if len(body) <= PARAMS_BYTES_MAX else None
        value = None if document is None else document.value("request_id")
        if value is None or len(value) > _REQUEST_ID_BYTES_MAX or type(parsed(body)) is not dict:
            return None
        request_id = parsed(value)
        found = _ENGINE_ID.fullmatch(request_id) if type(request_id) is str else None
        return None if found is None else (found["chat"] or found["completion"], body)

    def asks_again(self, data: bytes) -> bool:
        """See Transfer.asks_again."""
        return is_recomputed(data)
