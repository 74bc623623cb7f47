"""What a step of one barrier group costs: learnt from what passes through, as far as nobody says it. Pure.

Time is told from outside: ``is_due`` says that a look at the group is wanted, which ``look`` takes when a
step has ended. Once in ``WINDOWS_A_FIT`` windows the costs are worked out anew: some milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from brproxy.ledger import Ledger
from brproxy.roster import Member
from brproxy.step_chunks import CHUNKS
from brproxy.step_costs import StepCosts
from brproxy.step_fit import Costs, Counts, Fit, Given, Known, Loads, fit_costs
from brproxy.step_slowness import WORKERS_A_PASS, Slowness, look_again
from brproxy.step_windows import Pace, StepWindows, Window

FloatArray = NDArray[np.float64]

WINDOWS_MAX = 512
"""Most windows that are remembered, the last ones."""

WINDOWS_A_FIT = 8
"""Windows between two fits, and the fewest for the first."""

LOOK_S = ((31, 0.25), (WINDOWS_MAX - 1, 0.5), (WINDOWS_MAX, 4.0))
"""Least length of a window (seconds) while there are up to so many: the first ones tell soon, and later ones
are of half an hour."""

_WINDOWS_EACH_CHUNK = 128
"""Up to so many windows each fit tries all chunks; later ones try them in turn, to cost less."""

_WINDOWS_AGAIN, _AGAIN = 64, 2
"""Up to so many windows each fit is worked out so often again, with the prompts of all of them summed up by
what it says: the first ones were summed up before anything was known."""

_BETTER = 0.95
"""What another chunk must bring the errors down to: where prefill is cheap all are alike."""

_MEASURABLE = 6.0
"""Prefill that is not so many standard errors above no cost is told to cost nothing.

The errors are too small where a step yields several tokens at random, so that steps are counted the worse the
fewer requests decode, and each fit is one more chance to be wrong: 1.6 tokens a step made up to five of them.
What holds up decoding is 20 to 100 of them above.
"""

_OTHERS_DIFFER = 0.2
"""By how much costs may change as members come and go: their standard deviation, relative."""


@dataclass(frozen=True, slots=True)
class GivenCosts:
    """What somebody knows of a step: seconds, seconds a token, and tokens; None: it is to be learnt."""

    base_s: float | None = None
    s_per_kv_token: float | None = None
    s_per_prefill_token: float | None = None
    prefill_tokens_max: int | None = None

    @property
    def costs(self) -> Given:
        """The costs in the order of ``step_fit.Costs``."""
        return self.base_s, self.s_per_kv_token, self.s_per_prefill_token


class StepModel:
    """Learns the costs of the group whose ledger this is; ``windows`` observes what happens there.

    ``fit`` is what was learnt last, of ``count`` windows; ``slowness`` is of ``members``, by place.
    """

    def __init__(self, ledger: Ledger, given: GivenCosts | None = None) -> None:
        self._given = given or GivenCosts()
        self._roster, self._version = ledger.roster, -1
        self.windows = StepWindows(ledger)
        self.fit: Fit | None = None
        self.members: tuple[Member, ...] = ()
        self.slowness = Slowness.alike(0)
        self._windows: list[Window] = []
        self._before: Known | None = None
        self._looked_s = float("-inf")
        self._fresh = 0
        self._fits = 0
        # By number of CHUNKS: the one that explains the windows best, and what b is with each.
        self._chunk = _nearest_chunk(self._given.prefill_tokens_max)
        self._s_per_prefill_token = [0.0] * len(CHUNKS)
        base_s, s_per_kv_token, s_per_prefill_token = self._given.costs
        self._costs: StepCosts | None = None
        if not (base_s is None or s_per_kv_token is None or s_per_prefill_token is None):
            # All that is left to learn is who is slower.
            self._costs = StepCosts(base_s, s_per_kv_token, s_per_prefill_token, self.prefill_tokens_max)

    @property
    def count(self) -> int:
        """Windows that are remembered."""
        return len(self._windows)

    @property
    def prefill_tokens_max(self) -> int | None:
        """Most prompt tokens that a worker prefills in one step; None: whole prompts, as far as is seen."""
        return self._given.prefill_tokens_max or CHUNKS[self._chunk]

    @property
    def step_s(self) -> float | None:
        """How long a step took in the last window (seconds), None before there is one."""
        return self._windows[-1].duration_s / self._windows[-1].steps if self._windows else None

    def costs(self) -> StepCosts | None:
        """Return what a step costs as far as it is known by now, None where nothing is."""
        if self._version != self._roster.version:
            self._version = self._roster.version
            members = tuple(self._roster.members)
            if members != self.members:
                self._changed(members)
        return self._costs

    def learnt(self) -> Known | None:
        """Return what is known of the costs, learnt or given, with standard errors; None: nothing yet."""
        if self.fit is not None:
            return Known(self.fit.costs, self.fit.errors)
        costs = self._costs
        return None if costs is None else Known(Costs(*costs[:3]), Costs(0.0, 0.0, 0.0))

    def is_due(self, now_s: float) -> bool:
        """Tell whether a look is wanted (``now_s`` in seconds of the ledger's clock)."""
        count = len(self._windows)
        return now_s - self._looked_s >= next(s for most, s in LOOK_S if count <= most)

    def look(self, at_s: float, read_s: float) -> None:
        """Look at the ledger, where all that was streamed until ``at_s`` is booked; a step ended then.

        ``read_s`` is now (seconds).
        """
        self._looked_s = at_s
        # Has it know the members that are there now.
        self.costs()
        for window in self.windows.look(at_s, read_s):
            if window.members == self.members:
                self._windows.append(window)
                self._fresh += 1
        del self._windows[:-WINDOWS_MAX]
        if self._fresh >= WINDOWS_A_FIT:
            self._fresh = 0
            self._learn()

    def _changed(self, members: tuple[Member, ...]) -> None:
        """Begin anew with other members: what was learnt of the ones before is assumed of these."""
        self.members, self.slowness = members, Slowness.alike(len(members))
        self._windows.clear()
        self._fresh = 0
        if self.fit is not None:
            pairs = zip(self.fit.costs, self.fit.errors, strict=True)
            errors = Costs(*(max(2 * error, _OTHERS_DIFFER * cost) for cost, error in pairs))
            self._before = Known(self.fit.costs, errors)
        if self._costs is not None:
            self._costs = self._costs._replace(slowness=None)

    def _learn(self) -> None:
        """Work out the costs by the windows that are remembered."""
        fit = self._work_out()
        for _ in range(_AGAIN if len(self._windows) <= _WINDOWS_AGAIN else 0):
            pace = self._pace(fit)
            self._windows = [window.at_pace(pace) for window in self._windows]
            fit = self._work_out()
        self.fit, self.windows.pace = fit, self._pace(fit)
        self._fits += 1
        base_s, s_per_kv_token, s_per_prefill_token = fit.costs
        chunk = self.prefill_tokens_max
        if s_per_prefill_token < _MEASURABLE * fit.errors.s_per_prefill_token:
            s_per_prefill_token, chunk = 0.0, self._given.prefill_tokens_max
        self._costs = StepCosts(base_s, s_per_kv_token, s_per_prefill_token, chunk, self.slowness.told())

    def _work_out(self) -> Fit:
        """Return the costs, with the chunk and the slowness noted that explain the windows best."""
        windows = self._windows
        steps = np.array([window.steps for window in windows])
        duration_s = np.array([window.duration_s for window in windows])
        loads = Loads(np.stack([w.before for w in windows]), np.stack([w.after for w in windows]))
        kv_tokens = loads.most(self.slowness.factors)
        prefill_tokens = np.array([window.prefill_tokens for window in windows])
        by_chunk = [Counts(duration_s, steps, kv_tokens, column) for column in prefill_tokens.T]
        fit = self._fit(by_chunk)
        turn = self._fits * WORKERS_A_PASS
        self.slowness = look_again(by_chunk[self._chunk], loads, fit, self.slowness, turn)
        return fit

    def _pace(self, fit: Fit) -> Pace:
        costs = fit.costs
        return Pace(costs.base_s, costs.s_per_kv_token, self._s_per_prefill_token, CHUNKS[self._chunk])

    def _fit(self, by_chunk: Sequence[Counts]) -> Fit:
        """Return the costs with the chunk that explains the windows best, and note which that is."""
        fit = self._fit_of(by_chunk, self._chunk)
        if self._given.prefill_tokens_max is not None:
            return fit
        others: Collection[int] = range(len(CHUNKS))
        if len(self._windows) > _WINDOWS_EACH_CHUNK:
            # One after the other, and always whether there are chunks at all.
            others = {0, self._fits % len(CHUNKS)}
        before = by_chunk[self._chunk].prefill_tokens
        for number in others:
            # Where no prompt is longer than a chunk it is as if there were none.
            if not np.array_equal(by_chunk[number].prefill_tokens, before):
                other = self._fit_of(by_chunk, number)
                if other.off < _BETTER * fit.off:
                    self._chunk, fit = number, other
        return fit

    def _fit_of(self, by_chunk: Sequence[Counts], number: int) -> Fit:
        fit = fit_costs(by_chunk[number], self._given.costs, self._before)
        self._s_per_prefill_token[number] = fit.costs.s_per_prefill_token
        return fit


def _nearest_chunk(tokens: int | None) -> int:
    """Return the number of the chunk in CHUNKS that is nearest to ``tokens``."""
    if tokens is None:
        return 0
    sizes = [chunk for chunk in CHUNKS if chunk is not None]
    return 1 + min(range(len(sizes)), key=lambda number: abs(math.log(sizes[number] / tokens)))
