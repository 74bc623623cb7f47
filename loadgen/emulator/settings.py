"""What an emulated deployment is, and how it is served."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from brproxy.types import InvalidInputError
from loadgen.cluster_settings import ClusterSettings

SPEED_MAX = 1000.0
"""Most times as fast as real time that a deployment is emulated."""


class Role(StrEnum):
    """What a deployment does of a request."""

    BOTH = "both"
    PREFILL = "prefill"
    DECODE = "decode"


class Transfer(StrEnum):
    """How KV gets from a prefill worker to a decode worker."""

    NIXL = "nixl"
    MOONCAKE = "mooncake"
    ASCEND = "ascend"
    ASCEND_LAYERWISE = "ascend-layerwise"
    SGLANG = "sglang"


LEASE_S = {
    Transfer.NIXL: 30.0,
    Transfer.MOONCAKE: 480.0,
    Transfer.ASCEND: 480.0,
    Transfer.ASCEND_LAYERWISE: 480.0,
    Transfer.SGLANG: 300.0,
}
"""Seconds that one side waits for the other by default, as the engines do."""


def check_speed(speed: float) -> None:
    """Raise InvalidInputError for a speed, in times of real time, that nothing can be emulated at."""
    if not 0 < speed <= SPEED_MAX:
        raise InvalidInputError(f"the speed must be more than 0 and at most {SPEED_MAX:g}, got {speed}")


@dataclass(frozen=True, slots=True)
class EmulatorSettings:
    """A deployment and how it is served.

    ``base_port`` is the first, the next follow it; 0 takes free ones. ``queued_requests_max``: a worker whose
    queue is that long answers 503, as vLLM does with a queue limit; None: no limit. Behind each port are
    ``ranks_per_url`` workers: X-data-parallel-rank says which, by its number behind that port or, where
    ``ranks_are_global``, in the deployment. ``sglang``: workers say of themselves and their load what
    SGLang says, not what vLLM does.

    ``role`` and ``transfer``: workers hand KV over, or fetch it, in one of five forms. What a prefill worker
    has done it keeps for ``lease_s`` seconds (None: as the engine), which is also how long one side waits
    for the other; it is sent at ``transfer_ms_per_ktoken`` (a prefill worker's setting). ``bootstrap_port``
    is where the first prefill server is found in forms that have such a port, and what SGLang's decode
    workers take for one that a request does not name; 0 takes free ones. A ``recomputed_share`` of what
    ascend's decode workers serve ends early and is to be prefilled again, drawn by ``seed``.
    """

    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    speed: float = 1.0
    model: str = "emulated"
    host: str = "127.0.0.1"
    base_port: int = 0
    queued_requests_max: int | None = None
    ranks_per_url: int = 1
    ranks_are_global: bool = False
    sglang: bool = False
    role: Role | str = Role.BOTH
    transfer: Transfer | str | None = None
    lease_s: float | None = None
    transfer_ms_per_ktoken: float = 5.0
    bootstrap_port: int = 0
    recomputed_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse a speed that is none, workers that do not fill their ports, and half a form of transfer."""
        check_speed(self.speed)
        if self.ranks_per_url < 1 or self.cluster.workers % self.ranks_per_url:
            workers = self.cluster.workers
            msg = f"workers behind a port must be a part of all {workers}, got {self.ranks_per_url}"
            raise InvalidInputError(msg)
        self._check_transfer()

    def _check_transfer(self) -> None:
        if self.role not in [*Role] or self.transfer not in [None, *Transfer]:
            roles, transfers = ", ".join(Role), ", ".join(Transfer)
            msg = f"a role is one of {roles}, a transfer one of {transfers}; got {self.role}, {self.transfer}"
            raise InvalidInputError(msg)
        if self.role != Role.BOTH and self.transfer is None:
            msg = f"workers with the role {self.role} need a transfer: {', '.join(Transfer)}"
            raise InvalidInputError(msg)
        if self.transfer is not None and (self.transfer == Transfer.SGLANG) != self.sglang:
            msg = f"the transfer sglang is SGLang's and the others are not; got {self.transfer}"
            raise InvalidInputError(msg)
        if self.transfer == Transfer.SGLANG and self.role == Role.BOTH:
            msg = "a worker of SGLang is for prefill or for decode; leave its transfer out or give it a role"
            raise InvalidInputError(msg)
        if self.lease_s is not None and self.lease_s <= 0:
            msg = f"lease_s must be more than 0, got {self.lease_s}"
            raise InvalidInputError(msg)
        if self.transfer_ms_per_ktoken < 0 or not 0 <= self.recomputed_share <= 1:
            cost, share = self.transfer_ms_per_ktoken, self.recomputed_share
            msg = f"a transfer costs at least 0 ms and a share is in 0 to 1, got {cost} and {share}"
            raise InvalidInputError(msg)

    @property
    def wait_s(self) -> float:
        """Emulated seconds that KV is kept, and that one side waits for the other."""
        if self.lease_s is not None:
            return self.lease_s
        return LEASE_S[Transfer(self.transfer or Transfer.NIXL)]

    @property
    def has_bootstrap(self) -> bool:
        """Tell whether prefill servers have a port of their own to be found on."""
        return self.role != Role.DECODE and self.transfer in {Transfer.MOONCAKE, Transfer.SGLANG}

    def transfer_s(self, kv_tokens: int) -> float:
        """Return the emulated seconds that ``kv_tokens`` tokens are on their way."""
        return kv_tokens * self.transfer_ms_per_ktoken / 1e6
