"""A scenario from a seed. All that is drawn is drawn here.

A seed allows some kinds of faults and not others: what hides behind the noise of all together shows when only
a few of them meet.
"""

from __future__ import annotations

import random
from dataclasses import replace

from tests.simulation.actions import Action, Answer, Ask, Scenario, Trouble, Visit

WORKER_FAULTS = frozenset(
    {
        *("refusal", "refusal-event", "refusal-hangs", "error", "garbage", "garbage-body", "interim"),
        *("late", "drip", "hang", "hang-mid", "cut", "reset", "stale", "no-done", "extra", "early"),
        *("usage-numbers", "length-numbers", "close-framing", "large"),
    }
)
CLIENT_FAULTS = frozenset(
    {
        *("leaves", "resets", "stalls", "half-closes", "slow-body", "endless-body", "pipelines", "http10"),
        *("head", "token-ids", "token-numbers", "uploads", "upgrades", "pages", "bad-requests", "bursts"),
    }
)
GROUP_FAULTS = frozenset({"group-anew", "group-cut"})
WORLD_FAULTS = GROUP_FAULTS | frozenset(
    {
        *("connect-refused", "connect-silent", "connect-reset", "restart", "freeze", "out-of-files"),
        *("health-late", "health-never", "health-endless", "health-error", "clock-jump"),
        *("policy-raises", "predictor-raises", "shutdown", "member-leaves", "member-joins"),
        *("member-drains", "limits-fall", "limits-rise"),
        *("load-foreign", "load-garbage", "load-missing"),
    }
)
FAULTS = WORKER_FAULTS | CLIENT_FAULTS | WORLD_FAULTS

PREDICTORS = ("oracle", "oracle", "oracle", "survival", "hierarchical", "exact-match")
POLICIES = ("br-0", "br-0", "br-h", "join-shortest-queue", "round-robin", "least-kv", "vllm-queue")
NUMBERS = (0, 1, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -1)


class Draw:
    """Draws a scenario of the kinds of faults in ``allowed``; ``name`` is what its randomness comes from."""

    def __init__(self, seed: int, allowed: frozenset[str] = FAULTS, name: str = "") -> None:
        self._seed = seed
        self._rng = rng = random.Random(name or f"scenario {seed}")
        share = rng.choice((0.0, 0.1, 0.25, 0.25, 0.5, 1.0))
        # Sorted: the order of a set is another in every process. Drawn for all: what is allowed changes
        # nothing about the others.
        self._faults = {
            name for name in sorted(FAULTS - GROUP_FAULTS) if (rng.random() < share) & (name in allowed)
        }
        # By a generator of its own: whether groups come and go changes nothing about all else.
        self._of_groups = random.Random(f"groups {name or seed}")
        self._faults |= {each for each in sorted(GROUP_FAULTS & allowed) if self._of_groups.random() < share}
        # By a generator of its own: whether requests are of a batch changes nothing about all else.
        self._of_batches = random.Random(f"batches {name or seed}")
        self._batches = self._of_batches.choice((("",), ("", "", "r1", "r2"), ("r1",)))
        self._ids = 0

    def scenario(self) -> Scenario:
        rng = self._rng
        groups = rng.choice((("",), ("",), ("a", "b")))
        slots = rng.choice((1, 2, 4, 16))
        capacity = rng.choice((None, None, 400, 4000))
        # By a generator of its own: whether workers have ranks changes nothing about all else.
        ranks = random.Random(f"ranks {self._seed}")
        width = ranks.choice((0, 0, 0, 1, 2, 4))
        workers = tuple(
            (slots, capacity, group, ranks.choice((width, width, 0)))
            for group in groups
            for _ in range(rng.choice((1, 2, 2, 3)))
        )
        length_s = rng.choice((1.0, 5.0, 20.0))
        visits = [self._visit(rng.random() * length_s, groups) for _ in range(rng.randint(3, 12))]
        if self._has("bursts", 0.5):
            at_s = rng.random() * length_s
            visits += [self._visit(at_s, groups) for _ in range(rng.randint(3, 12))]
        troubles = [
            self._trouble(kind, rng.random() * length_s, len(workers))
            for kind in sorted((WORLD_FAULTS - GROUP_FAULTS) & self._faults)
            if kind != "shutdown" or rng.random() < 0.3
            for _ in range(rng.randint(1, 2))
        ]
        troubles += [
            Trouble(self._of_groups.random() * length_s, kind, self._of_groups.randrange(len(workers)), 0.0)
            for kind in sorted(GROUP_FAULTS & self._faults)
        ]
        actions: list[Action] = sorted([*visits, *troubles], key=lambda action: action.at_s)
        return Scenario(self._seed, self._settings(), workers, tuple(actions))

    def _has(self, fault: str, share: float) -> bool:
        """Tell whether a fault that this seed may have happens here."""
        return (self._rng.random() < share) & (fault in self._faults)

    def _settings(self) -> dict[str, dict[str, object]]:
        rng = self._rng
        # By a generator of its own: whether prompts are counted changes nothing about all else.
        counts = random.Random(f"counts {self._seed}")
        return {
            "prompts": {
                "exact": counts.choice(("off", "off", "engine")),
                "wait_s": counts.choice((0.0, 0.0, 0.3)),
                "timeout_s": 1.0,
                "in_flight_max": counts.choice((1, 16)),
                "failures_max": 2,
                "pause_s": 2.0,
            },
            "routing": {
                "policy": rng.choice(POLICIES),
                "tick_ms": rng.choice((20, 100)),
                "seed": rng.randint(0, 99),
            },
            "prediction": {"predictor": rng.choice(PREDICTORS)},
            "limits": {
                "requests_max": rng.choice((6, 64)),
                "pool_requests_max": rng.choice((3, 64)),
                "pool_wait_s_max": rng.choice((2.0, 8.0)),
                "retries_max": rng.choice((0, 1, 2, 2, 3)),
                "idle_connections_max": rng.choice((0, 1, 8)),
                "body_bytes_max": 100_000,
                "upload_bytes_max": rng.choice((1_100_000, 3_000_000)),
            },
            "timeouts": {
                "connect_s": 1.0,
                "first_byte_s": 6.0,
                "stall_s": 4.0,
                # Engines here count what never came through the proxy: what they have lost may be kept.
                "paused_s_max": 3.0,
                "keepalive_s": rng.choice((1.0, 3.0)),
                "client_keepalive_s": 5.0,
                "drain_s": 5.0,
                # Often enough to meet every fault.
                "keepalive_comments_s": rng.choice((0, 0, 0.05, 0.7)),
            },
            "health": {
                "interval_s": 3.0,
                "timeout_s": 1.0,
                "unhealthy_after": rng.choice((1, 2, 3)),
                "ejected_share_max": rng.choice((1.0, 1.0, 0.5, 0.0)),
            },
            # Ranks come and go one by one here, which no file can have them do, and nobody says who it is.
            "discovery": {"enabled": False},
            "estimate": {"ask_usage": rng.random() < 0.8},
            "telemetry": {
                "enabled": rng.random() < 0.5,
                "interval_s": rng.choice((0.5, 2.0)),
                "timeout_s": 1.0,
                "lag_s": rng.choice((0.0, 0.5, 6.0)),
                "stale_s": rng.choice((0.5, 2.0)),
                # What was said of a worker has faded when all must be well again.
                "half_life_s": rng.choice((0.1, 0.3)),
            },
        }

    def _visit(self, at_s: float, groups: tuple[str, ...]) -> Visit:
        rng = self._rng
        asks = tuple(self._ask(groups) for _ in range(rng.choice((1, 1, 1, 2, 3))))
        # What comes behind a request that closes is no request.
        asks = (*(replace(ask, closes=False) for ask in asks[:-1]), asks[-1])
        leaves = self._has("leaves", 0.3)
        stalls = self._has("stalls", 0.3)
        slow = self._has("slow-body", 0.3)
        by_time = rng.random() < 0.5
        after_s, at_bytes = rng.random() * 6, int(rng.random() ** 2 * 3000)
        stall_at, stall_s = int(rng.random() ** 2 * 2000), rng.choice((0.5, 2.0, 9.0))
        # A kilobyte in three seconds at most: who is slower is dropped.
        piece = rng.choice((1, 7, 50, 400))
        gap_s = rng.random() * 0.003 * piece
        sends_max = rng.randint(0, 600)
        return Visit(
            at_s,
            asks,
            pipelined=self._has("pipelines", 0.4),
            piece=piece if slow else 0,
            piece_gap_s=gap_s if slow else 0.0,
            sends_max=sends_max if self._has("endless-body", 0.1) else None,
            leaves_after_s=after_s if leaves and by_time else None,
            leaves_at_bytes=at_bytes if leaves and not by_time else None,
            resets=self._has("resets", 0.5) and leaves,
            stalls_at_bytes=stall_at if stalls else None,
            stall_s=stall_s if stalls else 0.0,
            half_closes=self._has("half-closes", 0.15),
        )

    def _ask(self, groups: tuple[str, ...]) -> Ask:
        rng = self._rng
        self._ids += 1
        kind = rng.choice(("chat", "chat", "chat", "completion", "embedding"))
        for fault, other in (
            ("uploads", "upload"),
            ("upgrades", "upgrade"),
            ("pages", "page"),
            ("bad-requests", "bad"),
        ):
            if self._has(fault, 0.15):
                kind = other
        if kind == "upload":
            prompt = rng.choice((100, 5000, 200_000, 1_200_000))
        else:
            prompt = rng.choice((0, 20, 300, 2000, 20_000))
        method = (
            "HEAD"
            if self._has("head", 0.1) and kind in {"chat", "page"}
            else "GET"
            if kind == "page"
            else "POST"
        )
        number = rng.choice(NUMBERS)
        has_numbers = self._has("token-numbers", 0.3)
        tokens_max, choices = rng.choice((None, 8, 64)), rng.choice((None, None, 3))
        http10, closes = self._has("http10", 0.2), rng.random() < 0.1
        stream, own_usage, token_ids = rng.random() < 0.7, rng.random() < 0.2, self._has("token-ids", 0.4)
        return Ask(
            self._ids,
            kind,
            method,
            model=rng.choice(groups),
            stream=stream and kind in {"chat", "completion"},
            prompt=prompt,
            token_ids=token_ids and kind == "completion" and prompt < 5000,
            max_tokens=number if has_numbers else tokens_max,
            choices=number if has_numbers and rng.random() < 0.3 else choices,
            own_usage=own_usage,
            http10=http10 and kind != "upgrade",
            closes=closes,
            chunked=kind == "upload" and rng.random() < 0.5 and not http10,
            batch=self._of_batches.choice(self._batches),
            answers=tuple(self._answer() for _ in range(rng.choice((1, 2, 3)))),
        )

    def _answer(self) -> Answer:
        rng = self._rng
        kind = "answer"
        for fault in ("refusal", "refusal-event", "error", "garbage", "garbage-body"):
            if self._has(fault, 0.15):
                kind = fault
        tokens = rng.choice((0, 1, 3, 10, 40))
        stop_at = int(rng.random() ** 2 * 3000) if rng.random() < 0.7 else 0
        stops = [
            ending
            for ending, name in (("hang", "hang-mid"), ("close", "cut"), ("reset", "reset"))
            if self._has(name, 0.15)
        ]
        ending = (
            stops[0]
            if stops
            else "stale"
            if self._has("stale", 0.3)
            else rng.choice(("keep",) * 5 + ("close",))
        )
        if self._has("hang", 0.06):
            stops, stop_at, ending = ["hang"], 0, "hang"
        if kind == "refusal" and self._has("refusal-hangs", 0.5):
            # Its head has come, and its body never ends.
            stops, stop_at, ending = ["hang"], 200, "hang"
        usage = (rng.randint(1, 500), tokens) if rng.random() < 0.6 else None
        numbers = rng.choice(NUMBERS), rng.choice(NUMBERS)
        late_s, gap_s = rng.choice((0.5, 3.0, 5.0)), rng.choice((0.02, 0.3))
        number = rng.choice(NUMBERS)
        framing = rng.choice(("chunked", "chunked", "length"))
        return Answer(
            kind,
            "close" if self._has("close-framing", 0.2) else framing,
            tokens,
            numbers if self._has("usage-numbers", 0.3) else usage,
            done=not self._has("no-done", 0.1),
            late_s=late_s if self._has("late", 0.2) else 0.0,
            gap_s=gap_s if self._has("drip", 0.3) else 0.001,
            stop_at=stop_at if stops else None,
            ending=ending,
            interim=self._has("interim", 0.2),
            early=self._has("early", 0.3),
            length_said=number if self._has("length-numbers", 0.1) and not 0 <= number < 1 << 20 else None,
            extra=self._has("extra", 0.1),
            padding=20_000 if self._has("large", 0.1) else 0,
        )

    def _trouble(self, kind: str, at_s: float, workers: int) -> Trouble:
        return Trouble(at_s, kind, self._rng.randrange(workers), self._rng.choice((0.05, 1.0, 5.0, 12.0)))


def draw(seed: int, allowed: frozenset[str] = FAULTS) -> Scenario:
    """Return the scenario of ``seed``, with faults of the kinds in ``allowed`` only."""
    return Draw(seed, allowed).scenario()
