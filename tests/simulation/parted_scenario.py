"""A scenario with prefill and decode apart, from a seed: as any other, and with what only that can do."""

from __future__ import annotations

import random
from dataclasses import replace

from tests.simulation.actions import KEEP, Action, Answer, Ask, Parted, Scenario, Trouble, Visit
from tests.simulation.kv import FREED_BY_DECODE
from tests.simulation.metaserver import URL
from tests.simulation.scenario import FAULTS, Draw

LEG_FAULTS = frozenset(
    {
        *("prefill-refusal", "prefill-error", "prefill-bad-request", "prefill-garbage", "prefill-cut"),
        *("prefill-reset", "prefill-hang", "prefill-late", "prefill-no-params"),
        *("handle-unknown", "lease-short", "transfer-slow", "few-freed", "page-fails"),
        *("posts-odd", "posts-bare", "own-handles", "unsplit", "same-ids", "short-prompts"),
        *("decodes-slow", "prefill-dies", "prefill-poison", "decode-poison", "pool-waits"),
    }
)
PARTED_FAULTS = FAULTS | LEG_FAULTS

CROWD_IDS = 10_000
TRANSFERS = ("nixl", "nixl", "mooncake", "ascend", "ascend-layerwise", "sglang")
ENDS_OF_PREFILLS = ("restart", "restart", "freeze", "connect-refused", "health-never", "health-error")
"""What takes a prefill worker out, or what it keeps with it."""
POSTS = ("unknown", "twice", "late", "no-json", "no-length", "long")


class PartedDraw:
    """Draws from ``seed`` a scenario of the kinds of faults in ``allowed``."""

    def __init__(self, seed: int, allowed: frozenset[str] = PARTED_FAULTS) -> None:
        self._seed = seed
        self._rng = rng = random.Random(f"parted {seed}")
        self._base = Draw(seed, allowed, f"parted scenario {seed}")
        share = rng.choice((0.0, 0.1, 0.25, 0.5, 1.0))
        self._faults = {name for name in sorted(LEG_FAULTS) if (rng.random() < share) & (name in allowed)}
        # It needs no other fault to be one, and would be rare among them.
        self._waits = (rng.random() < 0.25) & ("pool-waits" in allowed)

    def scenario(self) -> Scenario:
        """Return it."""
        rng, base = self._rng, self._base.scenario()
        groups = tuple(dict.fromkeys(group for _, _, group, _ in base.workers))
        transfers = tuple((group, rng.choice(TRANSFERS)) for group in groups)
        decoding = rng.choice(("decode", "decode", "both"))
        slots, capacity = rng.choice((1, 2, 4, 16)), rng.choice((None, None, 4000, 40_000))
        width = rng.choice((0, 0, 1, 2, 4))
        more = tuple(
            (slots, capacity, group, width) for group in groups for _ in range(rng.choice((1, 2, 2, 3)))
        )
        workers = base.workers + more
        roles = (decoding,) * len(base.workers) + ("prefill",) * len(more)
        bare = self._has("posts-bare", 1.0)
        lease_s = 1.0 if self._has("lease-short", 0.8) else rng.choice((4.0, 10.0))
        parted = Parted(
            roles,
            transfers,
            lease_s,
            transfer_s=rng.choice((0.3, 1.0)) if self._has("transfer-slow", 0.7) else 0.01,
            wait_s=rng.choice((2.0, 5.0)),
            drops_query=bare,
        )
        actions: list[Action] = [
            self._visit(action, transfers, bare=bare)
            if isinstance(action, Visit)
            else self._trouble(action, roles)
            for action in base.actions
        ]
        prefills = range(len(base.workers), len(workers))
        if self._has("page-fails", 0.9):
            at_s, lasts_s = rng.random() * 3, rng.choice((0.5, 3.0, 8.0))
            actions.append(Trouble(at_s, "page-fails", rng.choice(prefills), lasts_s))
        if self._has("prefill-dies", 0.7):
            actions += self._ends_of_prefills(actions, prefills)
        actions.sort(key=lambda action: action.at_s)
        settings = base.settings | {"prefill_decode": self._settings(lease_s)}
        drawn = replace(base, settings=settings, workers=workers, actions=tuple(actions), parted=parted)
        return wait_in_pool(drawn, parted, rng) if self._waits else drawn

    def _has(self, fault: str, share: float) -> bool:
        return (self._rng.random() < share) & (fault in self._faults)

    def _settings(self, lease_s: float) -> dict[str, object]:
        rng = self._rng
        short = rng.choice((50, 400))
        few = rng.choice((0, 1))
        # By a generator of its own: the others are what they were before this came.
        barrier = random.Random(f"barrier {self._seed}")
        return {
            "shares_barrier": barrier.random() < 0.4,
            # What a worker keeps it for, less a margin.
            "lease_s": 0.7 * lease_s,
            "split_prompt_tokens_min": short if self._has("short-prompts", 0.7) else 0,
            "free_at_once_max": few if self._has("few-freed", 0.7) else 64,
            "free_timeout_s": 2.0,
            "finish_prefill_s": rng.choice((0.0, 1.0, 3.0)),
            "metaserver_url": URL,
        }

    def _ends_of_prefills(self, actions: list[Action], prefills: range) -> list[Trouble]:
        """Have workers that prefill go out soon after somebody has come."""
        rng = self._rng
        comes_s = [action.at_s for action in actions if isinstance(action, Visit)]
        return [
            Trouble(
                rng.choice(comes_s) + rng.random(),
                rng.choice(ENDS_OF_PREFILLS),
                rng.choice(prefills),
                rng.choice((1.0, 5.0, 12.0)),
            )
            for _ in range(rng.randint(1, 3))
        ]

    def _trouble(self, trouble: Trouble, roles: tuple[str, ...]) -> Trouble:
        """Have it happen to any worker, those that prefill included."""
        return replace(trouble, worker=self._rng.randrange(len(roles)))

    def _visit(self, visit: Visit, transfers: tuple[tuple[str, str], ...], *, bare: bool) -> Visit:
        return replace(visit, asks=tuple(self._ask(ask, dict(transfers), bare=bare) for ask in visit.asks))

    def _ask(self, ask: Ask, transfers: dict[str, str], *, bare: bool) -> Ask:
        rng = self._rng
        unsplit = rng.choice(("prompt_logprobs", "echo", "use_beam_search"))
        is_unsplit = self._has("unsplit", 0.3) and transfers.get(ask.model) != "sglang"
        posts = tuple(kind for kind in POSTS if rng.random() < 0.4)
        same = rng.choice(("one", "other"))
        is_same = self._has("same-ids", 0.5) and not bare
        # One token is what a leg asks for that only frees.
        limit = 2 if ask.max_tokens == 1 else ask.max_tokens
        answers = tuple(self._decode(answer) for answer in ask.answers)
        prefills = tuple(self._prefill() for _ in range(rng.choice((1, 1, 2, 3))))
        death = Answer(
            tokens=1, late_s=rng.choice((0.0, 0.1)), stop_at=0, ending=rng.choice(("close", "reset"))
        )
        return replace(
            ask,
            max_tokens=limit,
            # Behind what they may do first: they die of each further attempt.
            answers=(*answers[:1], death) if self._has("decode-poison", 0.2) else answers,
            prefills=(*prefills[:1], death) if self._has("prefill-poison", 0.2) else prefills,
            own_handles=self._has("own-handles", 0.3) and ask.kind in {"chat", "completion"},
            unsplit=unsplit if is_unsplit and ask.kind in {"chat", "completion"} else "",
            request_id=same if is_same else "",
            posts=posts if self._has("posts-odd", 0.5) else (),
        )

    def _decode(self, answer: Answer) -> Answer:
        unknown = self._has("handle-unknown", 0.3)
        kind = self._rng.choice(("error", "error-event")) if unknown else answer.kind
        slow_s = self._rng.choice((1.0, 3.0))
        late_s = slow_s if self._has("decodes-slow", 0.4) else answer.late_s
        in_event = self._rng.random() < 0.5
        return replace(answer, kind=kind, early=False, late_s=late_s, fails_in_event=in_event)

    def _prefill(self) -> Answer:
        rng = self._rng
        kind, stop_at, ending = "answer", None, KEEP
        for fault, other in (
            ("prefill-refusal", "refusal"),
            ("prefill-error", "error"),
            ("prefill-bad-request", "bad-request"),
            ("prefill-garbage", "garbage"),
            ("prefill-no-params", "no-params"),
        ):
            if self._has(fault, 0.15):
                kind = other
        at, late_s = int(rng.random() ** 2 * 700), rng.choice((0.3, 2.0, 5.0))
        for fault, other in (("prefill-hang", "hang"), ("prefill-cut", "close"), ("prefill-reset", "reset")):
            if self._has(fault, 0.15):
                stop_at, ending = at, other
        return Answer(
            kind,
            rng.choice(("chunked", "length", "length", "close")),
            tokens=1,
            usage=(rng.randint(1, 500), 1) if rng.random() < 0.7 else None,
            late_s=late_s if self._has("prefill-late", 0.4) else 0.02,
            gap_s=0.001,
            stop_at=stop_at,
            ending=ending if stop_at is not None else rng.choice(("keep",) * 4 + ("close",)),
        )


def wait_in_pool(scenario: Scenario, parted: Parted, rng: random.Random) -> Scenario:
    """Return a scenario with a crowd, in which requests wait for the workers that decode for seconds.

    Meanwhile the leases end of what was prefilled for them, or who has it goes out; or who prefills stands
    still as they come; or they leave, some as they are prefilled; or one finds its decode worker gone, and
    waits for another.
    """
    what = rng.choice(("lease", "out", "frozen", "left"))
    # By a generator of its own: the others are what they were before these came.
    later = random.Random(f"later {scenario.seed}")
    if later.random() < 0.4:
        what = later.choice(("unreached", "left-early"))
    at_s, lasts_s = rng.random() * 5, 12.0
    prefills = [i for i, role in enumerate(parted.roles) if role == "prefill"]
    group = scenario.workers[prefills[0]][2]
    decodes = [i for i, one in enumerate(scenario.workers) if one[2] == group and i not in prefills]
    names = [name for name in TRANSFERS if (name in FREED_BY_DECODE) == (what != "frozen")]
    transfers = tuple((one, rng.choice(names) if one == group else name) for one, name in parted.transfers)
    workers = tuple(
        one if role == "prefill" else (1, None, one[2], 0)
        for role, one in zip(parted.roles, scenario.workers, strict=True)
    )
    # At times longer than a lease and what may come late together.
    decode_s = 5.0 if what == "unreached" else 2.0
    prefill_s = 0.6 if what == "left-early" else 0.02
    decode, prefill = Answer(late_s=decode_s), Answer(tokens=1, late_s=prefill_s, gap_s=0.001)
    crowd = [
        Visit(
            at_s + 0.1 * i,
            (
                Ask(
                    CROWD_IDS + i,
                    model=group,
                    answers=(decode,),
                    prefills=(prefill,),
                    stream=rng.random() < 0.7,
                ),
            ),
        )
        for i in range(12)
    ]
    if what == "left":
        crowd = [replace(visit, leaves_after_s=rng.choice((0.5, 1.5, 3.0))) for visit in crowd]
    elif what == "left-early":
        crowd = [replace(visit, leaves_after_s=later.random() * 2.0) for visit in crowd]
    troubles = {
        "lease": [],
        "left": [],
        "left-early": [],
        "unreached": [Trouble(at_s + 1.5, "restart", decodes[0], lasts_s)],
        "out": [Trouble(at_s + 1.3, "health-never", prefills[0], lasts_s)],
        "frozen": [Trouble(at_s, "freeze", prefills[0], lasts_s)],
    }[what]
    visits = [action for action in scenario.actions if isinstance(action, Visit)]
    actions = sorted([*visits, *crowd, *troubles], key=lambda action: action.at_s)
    # It ends before all must be as if nothing had been.
    lease_s = 1.0 if what in {"lease", "unreached"} else 20.0
    settings = {name: dict(table) for name, table in scenario.settings.items()}
    settings["prefill_decode"]["lease_s"] = 0.7 * lease_s
    settings["routing"]["policy"] = rng.choice(("br-0", "br-h"))
    settings["limits"] |= {
        "requests_max": 64,
        "pool_requests_max": 64,
        "pool_wait_s_max": 60.0,
        "retries_max": 3,
    }
    settings["health"] |= {"unhealthy_after": 1, "ejected_share_max": 1.0}
    return replace(
        scenario,
        settings=settings,
        workers=workers,
        actions=tuple(actions),
        parted=replace(parted, transfers=transfers, lease_s=lease_s),
    )


def draw_parted(seed: int, allowed: frozenset[str] = PARTED_FAULTS) -> Scenario:
    """Return the scenario of ``seed``, with faults of the kinds in ``allowed`` only."""
    return PartedDraw(seed, allowed).scenario()
