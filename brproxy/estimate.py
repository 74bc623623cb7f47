"""How many tokens a prompt and a streamed chunk are, learnt from what workers report. Pure.

A prompt is what a regression over the classes of its bytes says, learnt for each model, times a factor that
is learnt for each of the model's users, since texts of the same classes differ by who writes them. Of chunks
each model has a ratio of output tokens to them. No single report counts for much: one that cannot be true
teaches nothing, and a very large one counts no more than a long prompt does.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from math import ceil
from typing import Generic, TypeVar

from brproxy.regression import Regression, tokens_at_most
from brproxy.types import TOKENS_MAX, TextCounts

_WEIGHT_MAX = 1024
"""What a report counts at most: tokens of a prompt, or chunks of a stream."""

_EXPECTED = 0.01
"""An estimate that is so little off, relative to the report, was as good as any."""

_EXPECTED_PER_LESSON = 32
"""Reports of what was expected for one that is learnt from: learning costs forty times what asking does."""

_USERS_MAX = 4096
"""Users of all models whose factors are remembered."""


@dataclass(frozen=True, slots=True)
class RatioLimits:
    """Start value of a ratio, and the range outside of which a report is taken for a mistake.

    ``kept``: what an older report keeps of its weight with each new one. ``inertia``: the start value counts
    as a report of this size that does not grow old.
    """

    initial: float
    lowest: float
    highest: float
    kept: float = 0.98
    inertia: float = 0.0


TOKENS_PER_CHUNK = RatioLimits(initial=1.0, lowest=0.1, highest=64.0)
USERS_FACTOR = RatioLimits(initial=1.0, lowest=0.4, highest=2.5, kept=0.9, inertia=300.0)

K = TypeVar("K", bound=Hashable)


class LearntRatio(Generic[K]):
    """A quotient for each key, learnt online; the ``keys_max`` keys that learnt last are remembered.

    It is one of decayed sums, so that a large report counts for more than a small one and old traffic fades.
    """

    def __init__(self, limits: RatioLimits, keys_max: int) -> None:
        self._limits = limits
        self._keys_max = keys_max
        self._sums: OrderedDict[K, tuple[float, float]] = OrderedDict()

    def value(self, key: K) -> float:
        """Return the ratio for ``key``, within the limits; the initial one before any report."""
        sums = self._sums.get(key)
        return self._limits.initial if sums is None else sums[0] / sums[1]

    def learn(self, key: K, above: float, below: float) -> None:
        """Take in a report of ``above / below``; one that is not within the limits says nothing."""
        limits = self._limits
        if below <= 0 or not limits.lowest <= above / below <= limits.highest:
            return
        if below > _WEIGHT_MAX:
            above, below = above / below * _WEIGHT_MAX, _WEIGHT_MAX
        inertia = limits.inertia
        sum_above, sum_below = self._sums.get(key, (inertia * limits.initial, inertia))
        inertia *= 1 - limits.kept
        self._sums[key] = (
            sum_above * limits.kept + above + inertia * limits.initial,
            sum_below * limits.kept + below + inertia,
        )
        self._sums.move_to_end(key)
        if len(self._sums) > self._keys_max:
            self._sums.popitem(last=False)


class TokenEstimator:
    """What is known of all models that the proxy has seen, the ``models_max`` that learnt last, and of users.

    ``bytes_per_token``: of letters, before a model has learnt anything.
    """

    def __init__(self, bytes_per_token: float, models_max: int) -> None:
        self._bytes_per_token = bytes_per_token
        self._models_max = models_max
        self._unlearnt = Regression(bytes_per_token)
        self._as_expected = 0
        self._models: OrderedDict[str, Regression] = OrderedDict()
        self._users: LearntRatio[tuple[str, str]] = LearntRatio(USERS_FACTOR, _USERS_MAX)
        self._tokens_per_chunk: LearntRatio[str] = LearntRatio(TOKENS_PER_CHUNK, models_max)

    def prompt_tokens(self, model: str, user: str, text: TextCounts, tokens_max: int = TOKENS_MAX) -> int:
        """Return the estimate for a prompt; at least 1 if there is any text.

        It is a guess, so it is never more than ``tokens_max``, what a worker can hold: the prompt may fit.
        """
        factor = self._users.value((model, user))
        tokens = self._models.get(model, self._unlearnt).tokens(text) * factor
        # Mostly there are more letters than that, each of which could be a token.
        if tokens > text[0]:
            tokens = min(tokens, tokens_at_most(text))
        estimate = ceil(tokens)
        # As min has it, at a third of what that takes: each request asks for it.
        if estimate > tokens_max:
            return tokens_max
        return estimate

    def template_tokens(self, model: str, text: TextCounts) -> int:
        """Return the estimate of what a model's template puts around the messages of a chat; 0 for a text."""
        return round(self._models.get(model, self._unlearnt).template_tokens(text))

    def learn_prompt(
        self, model: str, user: str, text: TextCounts, prompt_tokens: int, estimate: int | None = None
    ) -> None:
        """Learn from a worker's report that ``text`` was ``prompt_tokens``.

        Of those that say what was expected few are learnt from: they are most, once a model is known.
        ``estimate`` is what ``prompt_tokens`` returned when the request came, None: as it would now.
        """
        if estimate is None:
            estimate = self.prompt_tokens(model, user, text)
        off = estimate - prompt_tokens
        # An estimate is rounded up, so that one that is right may be one more.
        if 0 <= off <= 1 or abs(off) <= _EXPECTED * prompt_tokens:
            self._as_expected += 1
            if self._as_expected % _EXPECTED_PER_LESSON:
                return
        regression = self._models.get(model) or Regression(self._bytes_per_token)
        if not regression.learn(text, prompt_tokens):
            return
        self._models[model] = regression
        self._models.move_to_end(model)
        if len(self._models) > self._models_max:
            self._models.popitem(last=False)
        # The user's is what the model's own weights leave.
        self._users.learn((model, user), prompt_tokens, regression.tokens(text))

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
