"""What prefill and decode workers say to each other through a proxy, in five forms. Pure.

Sources: vLLM 0.33's nixl/pull_scheduler.py and mooncake_connector.py, vllm-ascend's mooncake_connector.py
and mooncake_layerwise_connector.py, SGLang 0.5.23's disaggregation/. How the emulated workers then move KV
between themselves is their own: a request to ``FETCH_PATH`` of the prefill worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from brproxy.types import InvalidInputError
from loadgen.emulator.settings import Transfer

FETCH_PATH, FREE_PATH, RENEW_PATH = "/emulator/kv/fetch", "/emulator/kv/free", "/emulator/kv/renew"
DELIVER_PATH = "/emulator/kv/deliver"
QUERY_PATH = "/query"

PARAMS = "kv_transfer_params"
HANDLES = (
    *(PARAMS, "bootstrap_host", "bootstrap_port", "bootstrap_room"),
    *("routed_dp_rank", "disagg_prefill_dp_rank"),
)
"""Members of a request's body that are about the two legs."""

BOOTSTRAP_PORT = 8998
BLOCK_TOKENS = 16
TEXT_BYTES_MAX = 1024


class TransferFailedError(Exception):
    """KV did not come, or nobody came for it."""


class Place(NamedTuple):
    """Where KV is held: the prefill server's URL, the engine (a rank of it) and the request's id there."""

    url: str
    engine: str
    request_id: str

    def document(self) -> dict[str, str]:
        """Return what is sent to the prefill server to name what is held."""
        return {"engine": self.engine, "request_id": self.request_id}


def read_named(document: object) -> tuple[str, str]:
    """Return engine and request id of what a decode worker names; raises InvalidInputError."""
    if not isinstance(document, dict):
        msg = "the body must be a JSON object with engine and request_id"
        raise InvalidInputError(msg)
    return _text(document, "engine"), _text(document, "request_id")


def params_of(handles: Mapping[str, Any]) -> dict[str, Any]:
    """Return a request's ``kv_transfer_params``, empty if it has none."""
    params = handles.get(PARAMS)
    return params if isinstance(params, dict) else {}


def reply_params(
    transfer: Transfer | str, origin: tuple[str, int], engine: str, request_id: str, kv_tokens: int
) -> dict[str, Any]:
    """Return what a prefill worker's reply says of the KV that it holds (nixl and ascend)."""
    host, port = origin
    blocks = -(-kv_tokens // BLOCK_TOKENS)
    params: dict[str, Any] = {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_block_ids": [[*range(1, blocks + 1)]],
        "remote_engine_id": engine,
        "remote_request_id": request_id,
        "remote_host": host,
        "remote_port": port,
    }
    if transfer == Transfer.ASCEND:
        ascend = {"remote_pcp_size": 1, "remote_dcp_size": 1, "remote_ptp_size": 1, "last_token_id": 1}
        meta = {"remote_multi_nodes_meta_mapping": {}, "num_prompt_blocks": blocks}
        return params | ascend | meta | {"remote_block_size": [BLOCK_TOKENS]}
    sizes = {"tp_size": 1, "dcp_size": 1, "pp_size": 1, "remote_num_tokens": kv_tokens}
    return params | sizes | {"remote_blocks_expiry_time": None, "transfer_mode": "pull"}


def held_place(params: Mapping[str, Any]) -> Place:
    """Return where a decode request's KV is held (nixl and ascend); raises TransferFailedError."""
    try:
        url = read_origin(params, "remote")
        return Place(url, _text(params, "remote_engine_id"), _text(params, "remote_request_id"))
    except InvalidInputError as error:
        raise TransferFailedError(str(error)) from error


def query_page(engines: Mapping[int, str], url: str) -> dict[str, Any]:
    """Return the answer to ``QUERY_PATH``: who the ranks of a prefill server are (mooncake)."""
    addresses = {"0": {"0": url}}
    return {str(rank): {"engine_id": engine, "worker_addr": addresses} for rank, engine in engines.items()}


def queried_url(page: object, engine: str) -> str:
    """Return where an engine is, by the answer to ``QUERY_PATH``; raises TransferFailedError."""
    try:
        for entry in page.values() if isinstance(page, dict) else ():
            if entry["engine_id"] == engine:
                return str(entry["worker_addr"]["0"]["0"])
    except (KeyError, TypeError) as error:
        raise TransferFailedError(f"the bootstrap server's page has no {error}") from error
    raise TransferFailedError(f"the bootstrap server knows no engine {engine!r}")


def read_transfer_id(params: Mapping[str, Any]) -> str:
    """Return the id by which the two legs meet (mooncake); raises InvalidInputError without one."""
    return _text(params, "transfer_id")


def mooncake_ids(params: Mapping[str, Any]) -> tuple[str, Place]:
    """Return the bootstrap server's URL and the place on it (mooncake); raises TransferFailedError."""
    try:
        url = _text(params, "remote_bootstrap_addr")
        place = Place("", _text(params, "remote_engine_id"), read_transfer_id(params))
    except InvalidInputError as error:
        raise TransferFailedError(str(error)) from error
    return url, place


def read_room(handles: Mapping[str, Any]) -> int:
    """Return the room in which the two legs meet (sglang); raises InvalidInputError without one."""
    room = handles.get("bootstrap_room")
    if type(room) is not int or not 0 <= room < 1 << 63:
        msg = "Invalid request: Disaggregated request received without bootstrap room id."
        raise InvalidInputError(msg)
    return room


def room_place(handles: Mapping[str, Any], port_default: int) -> Place:
    """Return where a decode request's KV will be (sglang); raises InvalidInputError.

    The engine is the prefill rank that the request names, empty where the room tells it.
    """
    room, rank = read_room(handles), read_rank(handles, "disagg_prefill_dp_rank")
    url = read_origin(handles, "bootstrap", port_default or BOOTSTRAP_PORT)
    return Place(url, "" if rank is None else str(rank), str(room))


def read_origin(members: Mapping[str, Any], prefix: str, port_default: int | None = None) -> str:
    """Return the URL that the members ``PREFIX_host`` and ``PREFIX_port`` name; raises InvalidInputError."""
    host, port = _text(members, f"{prefix}_host").strip("[]"), members.get(f"{prefix}_port")
    port = port_default if port is None else port
    if type(port) is not int or not 0 < port < 1 << 16:
        msg = f"{prefix}_port must be a port, got {port!r}"
        raise InvalidInputError(msg)
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def read_rank(handles: Mapping[str, Any], name: str) -> int | None:
    """Return a rank that a body names (sglang), None without one; raises InvalidInputError."""
    rank = handles.get(name)
    if rank is not None and (type(rank) is not int or rank < 0):
        msg = f"{name} must be a rank of at least 0, got {rank!r}"
        raise InvalidInputError(msg)
    return rank


def conflict(rank: int, room: int, ranks: int) -> str:
    """Return what SGLang says of a prefill on another rank than the room's."""
    return (
        f"follow_bootstrap_room conflict: dispatched to dp_rank {rank} but bootstrap_room {room} "
        f"implies dp_rank {room % ranks}."
    )


def metaserver_post(origin: tuple[str, int], engine: str, request_id: str, kv_tokens: int) -> dict[str, Any]:
    """Return what a decode worker posts to the metaserver: where KV is to be sent (ascend-layerwise)."""
    host, port = origin
    return {
        "token_ids": [],
        "request_id": request_id,
        "do_remote_prefill": False,
        "do_remote_decode": True,
        "remote_block_ids": [[*range(1, -(-kv_tokens // BLOCK_TOKENS) + 1)]],
        "remote_block_size": [BLOCK_TOKENS],
        "remote_engine_id": engine,
        "remote_host": host,
        "remote_port": port,
        "remote_tp_size": 1,
        "remote_pcp_size": 1,
        "remote_dcp_size": 1,
        "remote_cached_tokens": 0,
    }


def _text(members: Mapping[str, Any], name: str) -> str:
    value = members.get(name)
    if not isinstance(value, str) or not len(value) <= TEXT_BYTES_MAX:
        msg = f"{name} must be a text of at most {TEXT_BYTES_MAX} characters, got {str(value)[:50]!r}"
        raise InvalidInputError(msg)
    return value
