"""Synthetic workloads: prompt and output lengths drawn from laws with the statistics of known traffic.

"proprietary" and "azure-2024" have the statistics of the two workloads of arXiv 2605.06113; "short" is chat
with short answers, small enough for a demonstration on a laptop; "repeated" is templates and conversations
whose prompts come again; "deepseek-r1" has the heavy tails of a public reasoning service, in prompts and in
outputs; "rollouts" are the samples of a reinforcement learner's batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from brproxy.registry import UnknownNameError
from brproxy.types import InvalidInputError
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


@dataclass(frozen=True, slots=True)
class Mixture:
    """Lengths of several kinds of requests, each lognormal in both; long answers may go with short prompts.

    A kind is its share, median and shape σ of its prompts, median and σ of its outputs.
    """

    kinds: tuple[tuple[float, float, float, float, float], ...]
    prompt_tokens_max: int
    output_tokens_max: int

    def draw(self, requests: int, rng: np.random.Generator) -> tuple[TraceRequest, ...]:
        """Draw ``requests`` requests that all arrive at 0."""
        share, *laws = np.array(self.kinds).T
        chosen = rng.choice(len(share), requests, p=share / share.sum())
        columns = []
        for median, sigma, most in (
            (*laws[:2], self.prompt_tokens_max),
            (*laws[2:], self.output_tokens_max),
        ):
            lengths = median[chosen] * np.exp(sigma[chosen] * rng.standard_normal(requests))
            columns.append(np.clip(np.rint(lengths), 1, most).astype(np.int64).tolist())
        return tuple(TraceRequest(0.0, prompt, output) for prompt, output in zip(*columns, strict=True))


# Fitted to the day of 73 clients that ServeGen has of a DeepSeek-R1 service (expectation maximisation over
# the logarithms of both lengths). Prompts: mean 1,269, P50 208, P99 23,450; outputs: 1,527, 792, 12,640.
_DEEPSEEK_R1 = Mixture(
    (
        (0.225, 73, 0.864, 2486, 0.954),
        (0.404, 687, 1.765, 614, 0.815),
        (0.185, 19.7, 0.492, 1061, 0.547),
        (0.186, 314, 0.367, 440, 0.295),
    ),
    prompt_tokens_max=57344,
    output_tokens_max=32768,
)


@dataclass(frozen=True, slots=True)
class Rollouts:
    """The batch of a reinforcement learner: each prompt ``samples`` times, one behind the other.

    Prompts are lognormal; a prompt's outputs are lognormal with a mean of its own, itself lognormal with
    shape ``between`` about 2,000 tokens, and shape ``within``: hard problems take long, each time.
    """

    samples: int = 8
    between: float = 0.8
    within: float = 0.5

    def draw(self, requests: int, rng: np.random.Generator) -> tuple[TraceRequest, ...]:
        """Draw ``requests`` requests that all arrive at 0; the last prompt may have fewer samples."""
        return next(self.epochs(requests, rng))

    def epochs(self, requests: int, rng: np.random.Generator) -> Iterator[tuple[TraceRequest, ...]]:
        """Draw as ``draw``, and then the same prompts again and again, each time with new samples."""
        prompts = -(-requests // self.samples)
        prompt_tokens = lognormal(300, 0.7, 16, 4096)(rng, prompts)
        mean_output = rng.lognormal(math.log(2000) - self.between**2 / 2, self.between, prompts)
        prompt = np.arange(requests) // self.samples
        while True:
            noise = rng.lognormal(-(self.within**2) / 2, self.within, requests)
            outputs = np.clip(np.rint(mean_output[prompt] * noise), 16, 16384).astype(np.int64)
            columns = prompt_tokens[prompt].tolist(), outputs.tolist(), prompt.tolist()
            yield tuple(TraceRequest(0.0, p, o, key, key) for p, o, key in zip(*columns, strict=True))


SYNTHETIC = {
    "proprietary": SyntheticLaw(lognormal(3197, 1.3, 16, 65536), lognormal(1185, 0.9, 8, 8192)),
    "azure-2024": SyntheticLaw(lognormal(4652, 0.9, 16, 65536), shifted_exponential(1001, 51, 8192)),
    "short": SyntheticLaw(lognormal(1600, 1.3, 16, 32768), lognormal(120, 0.9, 8, 1024)),
}


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


_DRAWN: dict[str, Mixture | RepeatedPrompts | Rollouts] = {
    "deepseek-r1": _DEEPSEEK_R1,
    "repeated": RepeatedPrompts(),
    "rollouts": Rollouts(),
}
WORKLOADS = (*SYNTHETIC, *_DRAWN)


def other_epochs(name: str, requests: int, rng: np.random.Generator, count: int) -> list[Workload]:
    """Draw ``count`` other epochs of what ``synthetic_workload`` draws: the same prompts, other samples.

    Raises InvalidInputError for a workload without epochs.
    """
    if not count:
        return []
    law = _DRAWN.get(name)
    if not isinstance(law, Rollouts):
        msg = f"the workload {name!r} has no epochs; rollouts has"
        raise InvalidInputError(msg)
    return [Workload(name, drawn) for drawn in islice(law.epochs(requests, rng), 1, count + 1)]


def synthetic_workload(name: str, requests: int, rng: np.random.Generator) -> Workload:
    """Draw ``requests`` (>= 1) requests that all arrive at 0; raises UnknownNameError."""
    if name in _DRAWN:
        return Workload(name, _DRAWN[name].draw(requests, rng))
    if name not in SYNTHETIC:
        msg = f"unknown workload {name!r}; allowed: {', '.join(WORKLOADS)}"
        raise UnknownNameError(msg)
    law = SYNTHETIC[name]
    prompts = law.prompt_tokens(rng, requests).tolist()
    outputs = law.output_tokens(rng, requests).tolist()
    return Workload(name, tuple(TraceRequest(0.0, p, o) for p, o in zip(prompts, outputs, strict=True)))
