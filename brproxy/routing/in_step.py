"""Whole prompts for workers that share a barrier and do nothing else: who goes with the next step. Pure.

A step takes ``t0 + b * max_g P_g``, P_g the prompt tokens of worker g in it. Nobody joins a step that runs,
and all workers are free when it ends. So what a worker prefills now says nothing of who should have the next
prompt, and a prompt that is bound meanwhile is bound without those that come after it. All wait for the step
to end, and then share the next one, with equal prompt tokens for each worker (staggered batching, arXiv
2512.16134).

Not all of them go at once: a large prompt holds up everybody who is in its step. In order of size, the
smallest first, those that wait are cut into steps, each of which takes as long as its largest prompt or as
its share of the tokens, whichever is more. The cuts are those with the least sum over all prompts of
*urgency* times the time until each is prefilled, so that large prompts go together, or when little else
waits. What waits longer is more urgent, and what has waited for too long goes with the next step.

Where prompts are prefilled in chunks none of this helps: a step is bounded then, and each of them is a new
choice of the engine. Holding prompts back leaves workers empty that had a chunk to do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from brproxy.routing.view import NOT_ADMITTED, FloatArray, RoundState


def next_step(
    prompts: FloatArray,
    urgency: FloatArray,
    base_tokens: float,
    workers: int,
    requests_max: int,
    least: int = 1,
) -> int:
    """Return how many of ``prompts`` (float64[N], tokens, the smallest first, N > 0) go with the next step.

    ``urgency[N]`` weighs how much later each is prefilled. A step without prompts costs as much as
    ``base_tokens`` of them, and takes at most ``requests_max`` (1 or more). At least ``least`` go, as far as
    a step takes them.
    """
    count = len(prompts)
    sums = np.concatenate(([0.0], np.cumsum(prompts)))
    # What all from here on weigh: they wait for each step until their own has ended.
    weigh = np.concatenate((np.cumsum(urgency[::-1])[::-1], [0.0]))
    rest = np.zeros(count + 1)
    best = count
    for first in range(count - 1, -1, -1):
        fewest = min(max(least, 1), requests_max, count) if first == 0 else 1
        ends = slice(first + fewest, min(count, first + requests_max) + 1)
        largest = prompts[ends.start - 1 : ends.stop - 1]
        lasts = base_tokens + np.maximum(largest, (sums[ends] - sums[first]) / workers)
        costs = weigh[first] * lasts + rest[ends]
        best = int(np.argmin(costs))
        rest[first] = costs[best]
        best += ends.start
    return best


def spread(
    state: RoundState, prompts: Sequence[int], sequences: Sequence[int], due: Sequence[bool]
) -> list[int]:
    """Return the worker of each of ``prompts`` (tokens), NOT_ADMITTED for those without a slot or room.

    The largest first, each to the worker with the fewest prompt tokens: what is known as longest processing
    time first. Those that are ``due`` go before all others, and where one of them finds no room the others do
    not take what there is. ``state`` is changed as they go.
    """
    chosen = [NOT_ADMITTED] * len(prompts)
    for i in sorted(range(len(prompts)), key=lambda i: (not due[i], -prompts[i], i)):
        eligible = state.eligible(prompts[i])
        if not eligible:
            if due[i]:
                break
            continue
        worker = min(eligible, key=lambda g: (state.prefill_tokens[g], state.kv_tokens[g], g))
        state.admit(worker, prompts[i], sequences[i])
        chosen[i] = worker
    return chosen
