"""What one worker's prefill costs all of its group, and when it pays to wait and prefill in step. Pure.

Where workers prefill what they decode, a step takes ``t0 + a * max_g L_g + b * max_g P_g``: all wait for the
worker that prefills the most. The largest P_g is the *prefill envelope*, and ``max P - P_g`` is what worker g
may prefill besides at no cost to anybody, its *prefill margin*. Prompts that go one by one, as slots fall
free, each open an envelope of their own and leave all other margins empty; prompts that go together share
one: a *wave*.

How long to wait for a wave follows from what a step costs. With θ free slots a worker on average

* the slots that are held cost what they would have decoded. KV that is not there makes a step shorter, so
  only t0 counts: ``θ² * t0 * turnover / 2n`` seconds until θ slots of each worker are free, where a worker
  has n requests and one of them leaves every ``turnover`` steps;
* the margins of workers without a free slot stay empty, a share of e^-θ where departures are independent:
  that costs ``θ * b * s / (e^θ - 1)`` seconds, s the mean prompt.

Their sum for each slot is least at ``θ = 2 asinh(√(b * s * 2n / (t0 * turnover)) / 2)``.

A token too many in the prefill envelope costs all workers b once. One in the KV envelope costs them a in each
step until later waves have left that worker out, or what runs there has gone. For a linear controller of
noise the least sum of both is where a wave corrects a / b of the difference for each step since the last one.
So an imbalance lasts some b / a steps, and never longer than requests run.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from brproxy.routing.view import ClusterView
from brproxy.step_costs import StepCosts

_WORTH_WAITING_SLOTS = 1.5
"""With less than so many slots a worker to wait for, prompts that go one by one do little harm."""

_LASTS = 0.5
"""Share of the steps above that a KV imbalance is charged for: its later ones can still be avoided."""


class PrefillTerms(NamedTuple):
    """What waves are judged by.

    ``slots_per_worker`` is θ. The others are in prefill tokens, seconds divided by b: ``kv_token`` is one
    more token in the KV envelope for as long as it lasts, ``slot`` a slot that is empty until the next wave.
    """

    slots_per_worker: float
    kv_token: float
    slot: float

    @staticmethod
    def of(view: ClusterView) -> PrefillTerms | None:
        """Return the terms for ``view``; None where there are slots for all, or waiting is not worth it."""
        costs = view.costs
        if costs is None or costs.s_per_prefill_token <= 0 or view.workers < 2:
            return None
        if int(view.slots_free.sum()) >= sum(view.each_sequences()):
            return None
        running = max(float(view.requests.mean()), 1.0)
        turnover_steps = max(view.turnover_steps, 1 / running)
        slots_per_worker = slots_to_wait_for(costs, float(view.prompt_tokens.mean()), turnover_steps, running)
        if slots_per_worker < _WORTH_WAITING_SLOTS:
            return None
        b = costs.s_per_prefill_token
        lasts_steps = _LASTS / (costs.s_per_kv_token / b + 1 / (turnover_steps * running))
        slot_step_s = costs.base_s / (view.workers * running)
        return PrefillTerms(
            slots_per_worker,
            costs.s_per_kv_token * lasts_steps / b,
            slot_step_s * slots_per_worker * turnover_steps / b,
        )

    def opens(self, view: ClusterView, wait_s_max: float) -> bool:
        """Tell whether a new prefill envelope is opened: enough is free, or slots were held for that long."""
        if view.held_s >= wait_s_max:
            return True
        # A slot without KV room for a prompt is none.
        prompts_free = view.kv_free / max(float(view.prompt_tokens.mean()), 1.0)
        slots = float(np.minimum(view.slots_free, prompts_free).sum())
        return slots >= self.slots_per_worker * view.workers


def slots_to_wait_for(
    costs: StepCosts, mean_prompt_tokens: float, turnover_steps: float, running: float
) -> float:
    """Return θ: the free slots of a worker, on average, with which a wave is worth its price.

    ``running``: requests of a worker (more than 0), of which one leaves every ``turnover_steps``.
    """
    held_s = costs.base_s * turnover_steps / (2 * running)
    empty_s = costs.s_per_prefill_token * mean_prompt_tokens
    # Where holding costs nothing one could wait for all slots.
    return min(2 * math.asinh(math.sqrt(empty_s / held_s) / 2), running) if held_s > 0 else running
