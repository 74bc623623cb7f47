"""A decision round with plain loops, every subset and every step, and the views that it is compared on."""

from functools import cache
from itertools import combinations

import numpy as np
from hypothesis import strategies as st

from brproxy.routing.balance import random_order
from brproxy.routing.view import NOT_ADMITTED, ClusterView, Home
from brproxy.step_costs import StepCosts

UNLIMITED = 1 << 40


def make_view(
    kv_tokens,
    prompts,
    slots_free,
    *,
    kv_free=None,
    passed_over=None,
    forecast=None,
    sequences=None,
    homes=None,
    running=0,
    turnover_steps=1.0,
    growth_foreseen=0.0,
    slowness=None,
    waited=None,
):
    workers = len(kv_tokens)
    kv = np.array(kv_tokens, dtype=np.int64)
    return ClusterView(
        kv_tokens=kv,
        requests=np.full(workers, running, dtype=np.int64),
        slots=np.full(workers, 64, dtype=np.int64),
        slots_free=np.array(slots_free, dtype=np.int64),
        kv_capacity=np.full(workers, UNLIMITED, dtype=np.int64),
        kv_free=np.array(kv_free if kv_free is not None else [UNLIMITED] * workers, dtype=np.int64),
        prompt_tokens=np.array(prompts, dtype=np.int64),
        passed_over=np.array(passed_over if passed_over is not None else [0] * len(prompts), dtype=np.int64),
        forecast=kv[:, None].astype(float) if forecast is None else forecast,
        sequences=None if sequences is None else np.array(sequences, dtype=np.int64),
        homes=homes,
        turnover_steps=turnover_steps,
        growth_foreseen=growth_foreseen,
        costs=None if slowness is None else StepCosts(0.03, 1e-7, 0.0, None, tuple(slowness)),
        waited=None if waited is None else np.array(waited, dtype=np.float64),
    )


class BruteForce:
    """The round with plain loops: every subset, every step of the horizon."""

    def __init__(self, view, params, gamma, alpha, beta, seed):
        self.view, self.params = view, params
        self.horizon = view.forecast.shape[1]
        self.gamma, self.alpha, self.beta = gamma, alpha, beta
        self.slowness = [1.0] * view.workers if view.costs is None else view.costs.slowness
        self.loads = [
            [load * slow for load in loads]
            for loads, slow in zip(view.forecast.tolist(), self.slowness, strict=True)
        ]
        self.slots = view.slots_free.tolist()
        self.kv = view.kv_free.tolist()
        self.sequences = [1] * view.waiting if view.sequences is None else view.sequences.tolist()
        self.waiting = list(range(view.waiting))
        self.homes = view.homes or [None] * view.waiting
        self.tie_break = random_order(np.random.default_rng(seed).random(), range(view.workers))
        self.closed = set()
        self.decision = [NOT_ADMITTED] * view.waiting

    def margin(self, worker, step):
        return max(load[step] for load in self.loads) - self.loads[worker][step]

    def margins_to_fill(self, window):
        """Return what the margin of a worker at a step is for a choice from ``window``."""
        workers = self.view.workers
        prompts = [int(self.view.prompt_tokens[i]) for i in window]
        longest_wait = sum(1 / k for k in range(1, workers + 1))
        growth = self.view.turnover_steps * self.view.requests.mean() * longest_wait
        growth *= 1 - self.view.growth_foreseen

        def margin(worker, step):
            loads = [load[step] for load in self.loads]
            mean, highest = sum(loads) / workers, max(loads)
            if self.params.aim is not None:
                return mean + self.params.aim * (highest - mean) - loads[worker]
            up = max(0.3 * (highest - mean), highest - mean - growth)
            return mean + min(up, 2 * sum(prompts) / len(prompts)) - loads[worker]

        return margin

    def headroom(self, worker):
        weights = [self.gamma**h for h in range(self.horizon)]
        return sum(w * self.margin(worker, h) for h, w in enumerate(weights)) / sum(weights)

    def level(self, worker):
        weights = [self.gamma**h for h in range(self.horizon)]
        return sum(w * load for w, load in zip(weights, self.loads[worker], strict=True)) / sum(weights)

    def near(self, worker, request, least):
        """Return the request's home if it is open, has room and is within the discount of ``least``."""
        home, prompt = self.homes[request], self.view.prompt_tokens[request]
        if home is None or home.place not in self.open() or self.kv[home.place] < prompt:
            return worker
        is_near = round(self.level(home.place) - least - home.discount_tokens, 6) <= 0
        return home.place if is_near else worker

    def best_guest(self, worker, window, best, margin):
        """Return the best single request where what is at home with the worker is worth its discount."""
        prompts, worth = (
            self.view.prompt_tokens.tolist(),
            self.alpha * sum(self.gamma**h for h in range(self.horizon)),
        )
        score = self.score(worker, prompts[best], margin)
        for i in window:
            home = self.homes[i]
            if home is not None and home.place == worker:
                as_guest = self.score(worker, prompts[i], margin) + worth * home.discount_tokens
                if as_guest > score:
                    best, score = i, as_guest
        return best

    def score(self, worker, demand, margin=None):
        total = 0.0
        for h in range(self.horizon):
            overflow = max(0.0, demand - (margin or self.margin)(worker, h) / self.slowness[worker])
            total += self.gamma**h * (self.alpha * demand - self.beta * overflow)
        return total

    def drained_margin(self, worker, step):
        """What the margin would be if all that runs on the worker had left."""
        return max([load[step] for g, load in enumerate(self.loads) if g != worker], default=0)

    def open(self):
        return [g for g in range(len(self.slots)) if self.slots[g] > 0 and g not in self.closed]

    def most_headroom(self, workers):
        if self.params.order == "slots":
            workers = [g for g in workers if self.slots[g] == max(self.slots[w] for w in workers)]
        return min(workers, key=lambda g: (-round(self.headroom(g), 6), -self.slots[g], self.tie_break[g]))

    def overdue(self, request):
        """By how often it was passed over; by time as well, if that was often enough to be about its size."""
        passed_over = self.view.passed_over[request]
        overdue = passed_over / (self.params.passed_over_max_per_worker * self.view.workers)
        if self.view.waited is not None and passed_over >= self.params.window:
            overdue = max(overdue, self.view.waited[request] / 0.9)
        return overdue

    def make_room(self):
        """Overdue requests, before all others: each goes, or the oldest of them holds a worker."""
        for i, prompt in enumerate(self.view.prompt_tokens.tolist()[: self.params.window]):
            workers = self.open()
            overdue = self.overdue(i)
            if overdue < 1 / 2 or not workers:
                continue
            roomy = [g for g in workers if self.kv[g] >= prompt]
            worker = self.most_headroom(roomy) if roomy else max(workers, key=lambda g: self.kv[g])
            if roomy and (
                overdue >= 1
                or len(self.waiting) == 1
                or self.score(worker, prompt) >= 0
                or self.score(worker, prompt, self.drained_margin) < 0
            ):
                self.admit(self.near(worker, i, self.level(worker)), i, prompt)
            elif not self.closed:
                self.closed.add(worker)

    def run(self):
        prompts = self.view.prompt_tokens.tolist()
        self.make_room()
        while self.waiting:
            workers = self.open()
            if not workers:
                break
            worker = self.most_headroom(workers)
            window = [i for i in self.waiting[: self.params.window] if prompts[i] <= self.kv[worker]]
            if not window:
                self.closed.add(worker)
                continue
            needed = sum(self.sequences[i] for i in self.waiting)
            ample = sum(max(s, 0) for g, s in enumerate(self.slots) if g not in self.closed) >= needed
            margin = self.margins_to_fill(window)
            largest = min(1 if ample else self.params.subset_max, self.slots[worker], len(window))
            subsets = [q for size in range(1, largest + 1) for q in combinations(window, size)]
            fitting = [q for q in subsets if sum(prompts[i] for i in q) <= self.kv[worker]]
            best = max(self.score(worker, sum(prompts[i] for i in q), margin) for q in fitting)
            single = best <= 0 or largest == 1
            if single:
                fitting = [q for q in fitting if len(q) == 1]
                best = max(self.score(worker, prompts[q[0]], margin) for q in fitting)
            tolerance = 1e-9 * max(1.0, abs(best))
            chosen = next(
                q
                for q in fitting
                if self.score(worker, sum(prompts[i] for i in q), margin) >= best - tolerance
            )
            if single:
                chosen = (self.best_guest(worker, window, chosen[0], margin),)
            least = self.level(worker)
            for i in chosen:
                if self.slots[worker] > 0:
                    self.admit(self.near(worker, i, least), i, prompts[i])
        return self.decision

    def admit(self, worker, request, prompt):
        self.loads[worker] = [load + prompt * self.slowness[worker] for load in self.loads[worker]]
        self.slots[worker] -= self.sequences[request]
        self.kv[worker] -= prompt
        self.waiting.remove(request)
        self.decision[request] = worker


@cache
def each(elements, size):
    """Return a strategy for ``size`` of ``elements``; once: to make one takes longer than to draw from it."""
    return st.lists(elements, min_size=size, max_size=size)


WORKERS = st.integers(1, 5)
# Few distinct values: equal loads and equal prompts are the cases in which ties decide.
LOADS = st.one_of(st.sampled_from([0, 100, 1000]), st.integers(0, 5000))
PROMPTS = st.lists(st.one_of(st.sampled_from([0, 1, 100, 4000]), st.integers(0, 3000)), max_size=8)
GROWTH = st.integers(0, 500)
SLOTS_FREE = st.integers(0, 3)
KV_FREE = st.one_of(st.just(UNLIMITED), st.integers(0, 6000))
# Of the limit for one worker: not overdue, from when room is made, and must go.
PASSED_OVER = st.sampled_from([0, 0, 0, 20, 96, 191, 192])
SEQUENCES = st.integers(1, 4)
DISCOUNTS = st.one_of(st.sampled_from([0, 100, 900]), st.integers(0, 4000))
RUNNING = st.sampled_from([0, 1, 64])
TURNOVER_STEPS = st.sampled_from([1.0, 2.5, 20.0])
GROWTH_FORESEEN = st.sampled_from([0.0, 0.5, 1.0])
SLOWNESS = st.sampled_from([0.75, 1.0, 1.25])
WAITED = st.sampled_from([0.0, 0.44, 0.46, 0.89, 0.91])


@cache
def optional(elements, size):
    return st.one_of(st.none(), each(elements, size))


@cache
def homes(workers):
    return st.one_of(st.none(), st.builds(Home, st.integers(0, workers - 1), DISCOUNTS))


@st.composite
def views(draw, horizon_steps=0):
    workers, prompts = draw(WORKERS), draw(PROMPTS)
    waiting = len(prompts)
    kv_tokens = draw(each(LOADS, workers))
    steps = [draw(each(GROWTH, workers)) for _ in range(horizon_steps)]
    forecast = np.array(
        [kv_tokens, *[[k + s for k, s in zip(kv_tokens, step, strict=True)] for step in steps]]
    )
    return make_view(
        kv_tokens,
        prompts,
        draw(each(SLOTS_FREE, workers)),
        kv_free=draw(each(KV_FREE, workers)),
        passed_over=[passed_over * workers for passed_over in draw(each(PASSED_OVER, waiting))],
        forecast=forecast.T.astype(float),
        sequences=draw(optional(SEQUENCES, waiting)),
        homes=draw(optional(homes(workers), waiting)),
        running=draw(RUNNING),
        turnover_steps=draw(TURNOVER_STEPS),
        growth_foreseen=draw(GROWTH_FORESEEN),
        slowness=draw(optional(SLOWNESS, workers)),
        waited=draw(optional(WAITED, waiting)),
    )


aims = st.sampled_from([None, None, 0.0, 0.4, 1.0])
