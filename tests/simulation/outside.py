"""What would reach the outside world or differ from run to run, answered so that a run repeats itself."""

from __future__ import annotations

import gc
import logging
import random
import secrets
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

from aiohttp import web_response

from tests.simulation.loop import VirtualLoop

ON_PURPOSE = "raised on purpose"
"""In the text of what the simulation itself raises inside the proxy."""


class ErrorLog(logging.Handler):
    """Keeps what was logged as an error, but for what was raised on purpose."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if ON_PURPOSE not in f"{record.getMessage()} {error}":
            self.said.append(f"{record.getMessage()}: {error!r}")


@contextmanager
def cut_off(loop: VirtualLoop, seed: int) -> Iterator[ErrorLog]:
    """Cut what runs in the block off from the machine: its time, its randomness, its garbage collector."""
    rng = random.Random(seed)
    errors = ErrorLog()
    root = logging.getLogger()
    collects = gc.isenabled()
    gc.disable()
    logging.disable(logging.WARNING)
    root.addHandler(errors)
    try:
        with ExitStack() as stack:
            for change in (
                patch.object(secrets, "token_hex", lambda size: rng.randbytes(size).hex()),
                patch.object(secrets, "randbelow", rng.randrange),
                patch.object(time, "perf_counter", loop.time),
                patch.object(web_response, "rfc822_formatted_time", lambda: "Thu, 01 Jan 1970 00:00:00 GMT"),
            ):
                stack.enter_context(change)
            yield errors
    finally:
        root.removeHandler(errors)
        logging.disable(logging.NOTSET)
        if collects:
            gc.enable()
