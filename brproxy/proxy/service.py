"""What the handlers work with: each barrier group with its driver, its dialect and connections to workers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from brproxy.adapters import Adapters
from brproxy.clock import Clock
from brproxy.engines.dialect import Dialect
from brproxy.estimate import TokenEstimator
from brproxy.fleet import Fleet, Group, UnknownModelError, least_pressed
from brproxy.proxy.body_room import BodyRoom
from brproxy.proxy.cors import Cors
from brproxy.proxy.driver import GroupDriver
from brproxy.relay.endpoint import Endpoint, Reach
from brproxy.relay.hops import Hops
from brproxy.relay.watch import Watch
from brproxy.roster import Change, Member, RosterError
from brproxy.signals import GroupSignals
from brproxy.telemetry.metrics import Metrics
from brproxy.types import WorkerIndex

if TYPE_CHECKING:
    from brproxy.proxy.counting import Counting
    from brproxy.proxy.departures import Departures
    from brproxy.proxy.groups import Groups
    from brproxy.proxy.in_band import InBand
    from brproxy.proxy.kept_events import Aborts
    from brproxy.proxy.legs.handover import Handover
    from brproxy.proxy.legs.metaserver import Metaserver


class GroupService:
    """One barrier group at work, with the connections to each of its members, as they come and go.

    ``connect`` makes what connects to a member. Members with the same origin are ranks behind one server:
    they share their connections, and what is told of the server counts for each of them. ``handover``: who
    prefills for it, None where its own members do. ``adapters``: which of its members has which.
    ``signals``: what their engines say of their load, None where nobody asks; ``in_band``: asks for it with
    requests, where that is on.
    """

    def __init__(
        self, group: Group, driver: GroupDriver, dialect: Dialect, connect: Callable[[Member], Endpoint]
    ) -> None:
        self.group = group
        self.roster = group.roster
        self.driver = driver
        self.dialect = dialect
        self.handover: Handover | None = None
        self.signals: GroupSignals | None = None
        self.in_band: InBand | None = None
        self.adapters = Adapters(group.roster)
        self._connect = connect
        self._shared: dict[str, Endpoint] = {}
        self._behind: dict[Endpoint, list[Member]] = {}
        self._reachable: dict[int, tuple[Member, Endpoint]] = {}
        for member in group.roster.members:
            self._added(member)
        group.roster.observe(self._member_changed)

    @property
    def endpoints(self) -> Collection[Endpoint]:
        """What connects to the members that are there."""
        return list(self._behind)

    def behind(self, endpoint: Endpoint) -> Sequence[Member]:
        """Return the members that ``endpoint`` connects to: one, or the ranks of one server."""
        return self._behind.get(endpoint, ())

    def member(self, worker: WorkerIndex) -> Member:
        """Return the member with that index; raises RosterError."""
        return self.group.roster.member(worker)

    def endpoint(self, worker: WorkerIndex) -> Endpoint:
        """Return what connects to the member with that index; raises RosterError."""
        return self.reach(worker)[1]

    def reach(self, worker: WorkerIndex) -> tuple[Member, Endpoint]:
        """Return the member with that index, and what connects to it; raises RosterError."""
        try:
            return self._reachable[worker]
        except KeyError:
            msg = f"there is no worker {worker}"
            raise RosterError(msg) from None

    def record(
        self, endpoint: Endpoint, *, ok: bool, reason: str, now_s: float, refused: bool = False
    ) -> list[Member]:
        """Take in the result of a check or of connecting; return the members whose health changed.

        It is about the server, so it counts for each member behind it.
        """
        roster = self.group.roster
        return [
            member
            for member in tuple(self.behind(endpoint))
            if roster.record(member, ok=ok, reason=reason, now_s=now_s, refused=refused)
        ]

    def accuse(self, endpoint: Endpoint, reason: str, now_s: float) -> list[Member]:
        """Take a server out for what it says of itself, until ``reason`` is ""; return as ``record``."""
        roster = self.group.roster
        return [each for each in tuple(self.behind(endpoint)) if roster.accuse(each, reason, now_s)]

    def reached_otherwise(self, origin: str, reach: Reach) -> None:
        """Have ``origin`` be reached by ``reach`` from the next request on, if a member is there."""
        endpoint = self._shared.get(origin)
        if endpoint is not None:
            endpoint.reach_by(reach)

    def _member_changed(self, member: Member, change: Change) -> None:
        if change is Change.ADDED:
            self._added(member)
        elif change is Change.GONE:
            self._gone(member)

    def _added(self, member: Member) -> None:
        endpoint = self._shared.get(member.origin)
        if endpoint is None:
            endpoint = self._shared[member.origin] = self._connect(member)
            self._behind[endpoint] = []
        self._behind[endpoint].append(member)
        self._reachable[member.index] = member, endpoint

    def _gone(self, member: Member) -> None:
        _, endpoint = self._reachable.pop(member.index)
        behind = self._behind[endpoint]
        behind.remove(member)
        if not behind:
            del self._behind[endpoint], self._shared[member.origin]
            endpoint.close()


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """Limits of the handlers, as the configuration's ``limits`` names them."""

    requests_max: int
    retries_max: int
    retry_wait_s: float
    retry_wait_s_max: float
    retry_after_s: int
    control_timeout_s: float
    control_bytes_max: int
    models_kept_s: float
    comments_s: float
    failovers_max: int
    recomputed_max: int
    kept_text_bytes_max: int


@dataclass(frozen=True, slots=True)
class BodyLimits:
    """Limits of one request's body.

    Bytes of one that is read whole and of one that is passed on as it comes; seconds between two pieces of
    it, and for the whole.
    """

    bytes_max: int
    upload_bytes_max: int
    stall_s: float
    whole_s: float


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """Limits of one response: seconds of silence, bytes of an event looked into and of a reply kept.

    ``paused_s_max``: seconds of silence beyond these while its engine says that it has the request.
    """

    first_byte_s: float
    stall_s: float
    paused_s_max: float
    event_bytes_max: int
    response_parse_bytes_max: int


@dataclass(frozen=True, slots=True)
class SessionReading:
    """Whether requests are looked at for their session, and whether messages tell it where none is named."""

    are_read: bool = False
    by_messages: bool = False


@dataclass(frozen=True, slots=True)
class BatchReading:
    """Which header field names a request's batch, "" if none does, and how long a name may be (bytes)."""

    header: str = ""
    id_bytes_max: int = 128


@dataclass(slots=True)
class Service:
    """Everything behind the handlers; ``groups`` are by name.

    ``reaches`` and ``bootstrap_ports`` are by origin: what a worker needs besides that is noted here before
    it is added. ``metaserver``: where decode workers ask for prefills. ``counting``: has prompts counted,
    None where they are only estimated. ``aborts``: when clients asked for an end of others' requests. Limits
    are others after a reload.
    """

    groups: Groups
    reaches: dict[str, Reach]
    bootstrap_ports: dict[str, int]
    fleet: Fleet
    watch: Watch
    departures: Departures
    estimator: TokenEstimator
    counting: Counting | None
    metrics: Metrics
    clock: Clock
    limits: ServiceLimits
    body_limits: BodyLimits
    body_room: BodyRoom
    relay_limits: RelayLimits
    hops: Hops
    cors: Cors
    metaserver: Metaserver
    aborts: Aborts
    ask_usage: bool
    hash_prompts: bool
    sessions: SessionReading
    batches: BatchReading
    health_checks: bool

    def choose(self, model: str) -> GroupService:
        """Return the group for a request; raises UnknownModelError."""
        try:
            return self.groups.of(self.fleet.choose(model))
        except UnknownModelError:
            # An adapter is a model that no configuration names.
            having = [
                service
                for service in self.groups.each()
                if model in service.adapters.names and not (service.group.prefills or service.group.leaves)
            ]
            if not having:
                raise
            return self.groups.of(least_pressed([service.group for service in having]))
