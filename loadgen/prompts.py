"""Prompt texts with a given number of tokens, for engines that count them roughly by words.

The text of a request is a slice of one long sequence of short words: cheap to make, different for each
request, and the same for requests with the same ``prompt_key``.
"""

from __future__ import annotations

import random
from string import ascii_lowercase

from loadgen.workload import TraceRequest

_PIECE_WORDS = 4096


class PromptMaker:
    """Makes prompts; the same seed makes the same ones."""

    def __init__(self, seed: int) -> None:
        chooser = random.Random(seed)
        self._words = [
            "".join(chooser.choices(ascii_lowercase, k=chooser.randint(1, 6))) for _ in range(_PIECE_WORDS)
        ]

    def text(self, request: TraceRequest, number: int) -> str:
        """Return a prompt of ``request.prompt_tokens`` words; ``number`` makes it different from others."""
        key = f"p{request.prompt_key}" if request.prompt_key is not None else f"r{number}"
        words = [key]
        missing = request.prompt_tokens - 1
        start = number % _PIECE_WORDS if request.prompt_key is None else request.prompt_key % _PIECE_WORDS
        while missing > 0:
            piece = self._words[start : start + missing]
            words += piece
            missing -= len(piece)
            start = 0
        return " ".join(words)
