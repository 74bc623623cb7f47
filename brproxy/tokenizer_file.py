"""A model's tokenizer, from a file, by the ``tokenizers`` library: the extra ``brproxy[tokenizer]``."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from brproxy.types import InvalidInputError

TextTokens = Callable[[list[str], bool], int]
"""Returns the tokens of some texts, each by itself; True: with what the tokenizer puts around a text.

It may be called in any thread, and lets others run meanwhile.
"""


def load_tokenizer(path: Path) -> TextTokens:
    """Read a ``tokenizer.json``; raises InvalidInputError for what is none, and without the library."""
    # One text after another in the calling thread: else the library makes a thread for each core.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415
    except ImportError as error:
        msg = "prompts.exact = \"file\" needs the tokenizers library: pip install 'brproxy[tokenizer]'"
        raise InvalidInputError(msg) from error
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no class of its own for what it cannot read
        reason = str(error).partition("\n")[0]
        msg = f"prompts.tokenizer: {path} is no tokenizer.json that can be read: {reason}"
        raise InvalidInputError(msg) from error
    # A model's own limits and paddings are of training, not of what an engine counts.
    tokenizer.no_truncation()
    tokenizer.no_padding()

    def text_tokens(texts: list[str], is_whole: bool) -> int:
        # Of a list, as only then the library lets go of the interpreter; without offsets it is faster.
        return sum(map(len, tokenizer.encode_batch_fast(texts, add_special_tokens=is_whole)))

    return text_tokens
