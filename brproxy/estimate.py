"""How many tokens a prompt and a streamed chunk are, learnt from what workers report. Pure.

Two ratios are kept for each model: bytes per prompt token, and output tokens per streamed chunk. Each is a
quotient of decayed sums, so that a large report counts for more than a small one and old traffic fades. No
single report counts for much: one that cannot be true teaches nothing, and a very large one (half a megabyte
of spaces are few tokens) counts no more than a long prompt does.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from brproxy.types import TOKENS_MAX

_DECAY = 0.98
"""What an older report keeps of its weight with each new one: about the last 50 count."""


_WEIGHT_MAX = 1024
"""What a report counts at most: tokens of a prompt, or chunks of a stream."""


@dataclass(frozen=True, slots=True)
class RatioLimits:
    """Start value of a ratio, and the range outside of which a report is taken for a mistake."""

    initial: float
    lowest: float
    highest: float


BYTES_PER_TOKEN = RatioLimits(initial=4.0, lowest=0.5, highest=16.0)
TOKENS_PER_CHUNK = RatioLimits(initial=1.0, lowest=0.1, highest=64.0)


class LearntRatio:
    """A quotient for each key, learnt online; the ``keys_max`` most recently used keys are remembered."""

    def __init__(self, limits: RatioLimits, keys_max: int) -> None:
        self._limits = limits
        self._keys_max = keys_max
        self._sums: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def value(self, key: str) -> float:
        """Return the ratio for ``key``, within the limits; the initial one before any report."""
        sums = self._sums.get(key)
        return self._limits.initial if sums is None else sums[0] / sums[1]

    def learn(self, key: str, above: float, below: float) -> None:
        """Take in a report of ``above / below``; one that is not within the limits says nothing."""
        if below <= 0 or not self._limits.lowest <= above / below <= self._limits.highest:
            return
        if below > _WEIGHT_MAX:
            above, below = above / below * _WEIGHT_MAX, _WEIGHT_MAX
        sum_above, sum_below = self._sums.get(key, (0.0, 0.0))
        self._sums[key] = (sum_above * _DECAY + above, sum_below * _DECAY + below)
        self._sums.move_to_end(key)
        if len(self._sums) > self._keys_max:
            self._sums.popitem(last=False)


class TokenEstimator:
    """Both ratios of all models that the proxy has seen."""

    def __init__(self, bytes_per_token: float, models_max: int) -> None:
        prompts = RatioLimits(bytes_per_token, BYTES_PER_TOKEN.lowest, BYTES_PER_TOKEN.highest)
        self._bytes_per_token = LearntRatio(prompts, models_max)
        self._tokens_per_chunk = LearntRatio(TOKENS_PER_CHUNK, models_max)

    def prompt_tokens(self, model: str, prompt_bytes: int, tokens_max: int = TOKENS_MAX) -> int:
        """Return the estimate for a prompt of ``prompt_bytes`` UTF-8 bytes; at least 1 if there are any.

        It is a guess, so it is never more than ``tokens_max``, what a worker can hold: the prompt may fit.
        """
        return min(-int(-prompt_bytes // self._bytes_per_token.value(model)), tokens_max)

    def learn_prompt(self, model: str, prompt_bytes: int, prompt_tokens: int) -> None:
        """Learn from a worker's report that ``prompt_bytes`` were ``prompt_tokens``."""
        self._bytes_per_token.learn(model, prompt_bytes, prompt_tokens)

    def tokens_per_chunk(self, model: str) -> float:
        """Return the output tokens that a streamed chunk carries on average."""
        return self._tokens_per_chunk.value(model)

    def learn_chunks(self, model: str, chunks: int, output_tokens: int) -> None:
        """Learn from a worker's report that ``chunks`` held ``output_tokens``."""
        self._tokens_per_chunk.learn(model, output_tokens, chunks)


class StreamCounter:
    """Output tokens of one stream, counted by chunk at a ratio and corrected by reports.

    What it returns are integers that add up: the sum of all increments is always the rounded count.
    """

    __slots__ = ("_booked_tokens", "_chunks_since", "_reported_tokens", "_tokens_per_chunk", "chunks")

    def __init__(self, tokens_per_chunk: float) -> None:
        self._tokens_per_chunk = tokens_per_chunk
        self._reported_tokens = 0
        self._chunks_since = 0
        self._booked_tokens = 0
        self.chunks = 0

    def count(self, chunks: int = 1) -> int:
        """Count ``chunks`` more chunks; return the tokens to book for them."""
        self.chunks += chunks
        self._chunks_since += chunks
        # As _book, without the call: this is done for every stream that has grown, before each decision.
        output_tokens = self._reported_tokens + round(self._chunks_since * self._tokens_per_chunk)
        increment = output_tokens - self._booked_tokens
        self._booked_tokens = output_tokens
        return increment

    def settle(self, output_tokens: int) -> int:
        """Take a report of all output so far; return the tokens to book, fewer than zero to take back."""
        self._reported_tokens = output_tokens
        self._chunks_since = 0
        return self._book(output_tokens)

    def _book(self, output_tokens: int) -> int:
        increment = output_tokens - self._booked_tokens
        self._booked_tokens = output_tokens
        return increment
