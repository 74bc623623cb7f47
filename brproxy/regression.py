"""How many tokens the bytes of each class are, learnt online from reports of whole prompts. Pure.

A Kalman filter over the weights of the classes: each is known, and how well. So a class that has not been
seen moves by its first report as far as that says, and takes along none of those that are known; a class
that many reports have settled moves by little. Reports count by their relative error, whatever their size,
and what surprises beyond measure counts as a surprise just within it. How one weight depends on another is
not kept: it made no estimate better, and a report four times as dear.
"""

from __future__ import annotations

from math import sqrt
from operator import mul

from brproxy.types import TextCounts

_PRIOR = (0.25, 0.12, 0.7, 0.3, 0.45, 0.24, 4.0, 8.0)
"""Tokens for each byte of a class, message and chat, before any report; the bytes' for four bytes a token."""

_DEVIATIONS = (0.08, 0.1, 0.4, 0.3, 0.3, 0.2, 1.5, 30.0)
"""How far from that a model may well be: the standard deviation of each."""

_BYTE_CLASSES = 6
_MESSAGES, _CHATS = 6, 7
_BYTE_LOWEST, _BYTE_HIGHEST, _MESSAGE_HIGHEST = 0.02, 2.0, 256.0
_BOUNDS = (*((_BYTE_LOWEST, _BYTE_HIGHEST),) * _BYTE_CLASSES, *((0.0, _MESSAGE_HIGHEST),) * 2)

_PRIOR_BYTES_PER_TOKEN = 4.0
_NOISE = 0.1
"""What texts of the same classes differ by: the standard deviation of their tokens, relative."""

_NOISE_TOKENS = 3.0
"""And this besides, so that short prompts say less."""

_DRIFT = 0.05
"""What a weight that is in use may have moved by since the last report, in its deviations."""

_SURPRISE_MAX = 3.0
"""A report counts at most as one that is so many standard deviations off."""


def tokens_at_most(counts: TextCounts) -> float:
    """Return the most tokens that a text can be."""
    others = counts[-2] + counts[-1]
    return _BYTE_HIGHEST * (sum(counts) - others) + _MESSAGE_HIGHEST * others


class Regression:
    """The weights of one model. ``bytes_per_token``: of letters, before any report; others in proportion."""

    __slots__ = ("_drifts", "_prior_variances", "_variances", "_weights")

    def __init__(self, bytes_per_token: float) -> None:
        scale = _PRIOR_BYTES_PER_TOKEN / bytes_per_token
        scales = (scale,) * _BYTE_CLASSES + (1.0, 1.0)
        self._weights = [
            min(max(prior * scale, lowest), highest)
            for prior, scale, (lowest, highest) in zip(_PRIOR, scales, _BOUNDS, strict=True)
        ]
        self._prior_variances = [
            (deviation * scale) ** 2 for deviation, scale in zip(_DEVIATIONS, scales, strict=True)
        ]
        self._drifts = [variance * _DRIFT**2 for variance in self._prior_variances]
        self._variances = self._prior_variances.copy()

    def tokens(self, counts: TextCounts) -> float:
        """Return the estimate for a text."""
        # Written out: a sum over a map takes half as long again.
        letters, blanks, digits, others, wide, three, messages, chats = counts
        w0, w1, w2, w3, w4, w5, w6, w7 = self._weights
        return (
            w0 * letters
            + w1 * blanks
            + w2 * digits
            + w3 * others
            + w4 * wide
            + w5 * three
            + w6 * messages
            + w7 * chats
        )

    def template_tokens(self, counts: TextCounts) -> float:
        """Return what of the estimate is of no text: what stands around the messages of a chat."""
        return self._weights[_MESSAGES] * counts[_MESSAGES] + self._weights[_CHATS] * counts[_CHATS]

    def learn(self, counts: TextCounts, tokens: int) -> bool:
        """Learn that a text is ``tokens``; return False, and learn nothing, if it cannot be."""
        text_bytes = sum(counts) - counts[-2] - counts[-1]
        if tokens <= 0 or not _BYTE_LOWEST * text_bytes <= tokens <= tokens_at_most(counts):
            return False
        weights, variances = self._weights, self._variances
        expected = self.tokens(counts)
        # By the interpreter's own loops: what a class that is not there adds is nothing.
        spreads = list(map(mul, variances, counts))
        variance = (_NOISE * expected) ** 2 + _NOISE_TOKENS**2 + sum(map(mul, spreads, counts))
        surprise_max = _SURPRISE_MAX * sqrt(variance)
        surprise = min(max(tokens - expected, -surprise_max), surprise_max)
        for index, count in enumerate(counts):
            if count:
                gain = spreads[index] / variance
                moved = weights[index] + gain * surprise
                lowest, highest = _BOUNDS[index]
                weights[index] = lowest if moved < lowest else min(moved, highest)
                # By rounding, what a huge count leaves comes out as nothing, or as less. What it may have
                # moved by until the next report is added here, no further than where it began: what is known
                # of a weight is never less than nothing.
                drift, left = self._drifts[index], variances[index] * (1 - gain * count)
                left = left + drift if left > drift else 2 * drift
                prior = self._prior_variances[index]
                variances[index] = min(prior, left)
        return True
