"""Synthetic workloads: prompt and output lengths drawn from laws with the statistics of known traffic.

"proprietary" and "azure-2024" have the statistics of the two workloads of arXiv 2605.06113; "short" is chat
with short answers, small enough for a demonstration on a laptop; "repeated" is templates and conversations
whose prompts come again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from brproxy.registry import UnknownNameError
from loadgen.workload import TraceRequest, Workload

IntArray = NDArray[np.int64]
Law = Callable[[np.random.Generator, int], IntArray]


def lognormal(mean_tokens: float, sigma: float, lowest: int, highest: int) -> Law:
    """Return a law of lognormal lengths with that mean (before clipping) and shape σ."""
    mu = math.log(mean_tokens) - sigma**2 / 2

    def draw(rng: np.random.Generator, requests: int) -> IntArray:
        lengths = np.rint(rng.lognormal(mu, sigma, requests))
        clipped: IntArray = np.clip(lengths, lowest, highest).astype(np.int64)
        return clipped

    return draw


def shifted_exponential(lowest: int, mean_beyond: float, highest: int) -> Law:
    """Return a law of ``lowest`` tokens and an exponential rest with mean ``mean_beyond``."""

    def draw(rng: np.random.Generator, requests: int) -> IntArray:
        lengths = lowest + np.floor(rng.exponential(mean_beyond, requests))
        clipped: IntArray = np.minimum(lengths, highest).astype(np.int64)
        return clipped

    return draw


@dataclass(frozen=True, slots=True)
class SyntheticLaw:
    """Independent laws of prompt and output lengths, in tokens."""

    prompt_tokens: Law
    output_tokens: Law


SYNTHETIC = {
    "proprietary": SyntheticLaw(lognormal(3197, 1.3, 16, 65536), lognormal(1185, 0.9, 8, 8192)),
    "azure-2024": SyntheticLaw(lognormal(4652, 0.9, 16, 65536), shifted_exponential(1001, 51, 8192)),
    "short": SyntheticLaw(lognormal(1600, 1.3, 16, 32768), lognormal(120, 0.9, 8, 1024)),
}
REPEATED = "repeated"
WORKLOADS = (*SYNTHETIC, REPEATED)


@dataclass(frozen=True, slots=True)
class RepeatedPrompts:
    """Prompts that come again, each with an output-length law of its own.

    ``templates`` single prompts and ``conversations`` of ``turns`` prompts each, every turn longer than the
    one before; popularity falls as 1 / rank. A prompt's outputs are lognormal with a mean of its own, drawn
    as "proprietary" draws lengths, and shape ``spread``; prompt lengths likewise. Prompts of a
    conversation share their prefix.
    """

    templates: int = 200
    conversations: int = 50
    turns: int = 4
    spread: float = 0.2

    def draw(self, requests: int, rng: np.random.Generator) -> tuple[TraceRequest, ...]:
        """Draw ``requests`` requests that all arrive at 0."""
        law = SYNTHETIC["proprietary"]
        prompts = self.templates + self.conversations * self.turns
        prompt_tokens = law.prompt_tokens(rng, prompts)
        mean_output = law.output_tokens(rng, prompts)
        prefix = np.arange(prompts)
        in_conversation = np.arange(self.conversations * self.turns)
        prefix[self.templates :] = self.templates + in_conversation // self.turns
        turn = 1 + in_conversation % self.turns
        prompt_tokens[self.templates :] = np.minimum(
            prompt_tokens[prefix[self.templates :]] // self.turns * turn + 16, 65536
        )
        popularity = 1.0 / (1.0 + rng.permutation(prompts))
        chosen = rng.choice(prompts, requests, p=popularity / popularity.sum())
        noise = rng.lognormal(-(self.spread**2) / 2, self.spread, requests)
        outputs = np.clip(np.rint(mean_output[chosen] * noise), 8, 8192).astype(np.int64)
        columns = (prompt_tokens[chosen].tolist(), outputs.tolist(), chosen.tolist(), prefix[chosen].tolist())
        return tuple(TraceRequest(0.0, p, o, key, pre) for p, o, key, pre in zip(*columns, strict=True))


def synthetic_workload(name: str, requests: int, rng: np.random.Generator) -> Workload:
    """Draw ``requests`` (>= 1) requests that all arrive at 0; raises UnknownNameError."""
    if name == REPEATED:
        return Workload(name, RepeatedPrompts().draw(requests, rng))
    if name not in SYNTHETIC:
        msg = f"unknown workload {name!r}; allowed: {', '.join(WORKLOADS)}"
        raise UnknownNameError(msg)
    law = SYNTHETIC[name]
    prompts = law.prompt_tokens(rng, requests).tolist()
    outputs = law.output_tokens(rng, requests).tolist()
    return Workload(name, tuple(TraceRequest(0.0, p, o) for p, o in zip(prompts, outputs, strict=True)))
