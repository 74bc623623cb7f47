"""Logging to standard error: a line of text or a JSON object for each record."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime

import orjson


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time (RFC 3339), level, logger, message, and any traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return orjson.dumps(entry).decode()


def configure_logging(level: str, style: str) -> None:
    """Log records of at least ``level`` in ``style`` ("text" or "json")."""
    handler = logging.StreamHandler()
    handler.setFormatter(
        JsonFormatter() if style == "json" else logging.Formatter("%(asctime)s %(levelname)-7s %(message)s")
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # One line for each request costs more than the decision that it reports; metrics count requests.
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)


class SparingLog:
    """Messages of one kind that may come by the thousand: a line every ``interval_s`` (seconds)."""

    def __init__(self, log: logging.Logger, interval_s: float = 10.0) -> None:
        self._log = log
        self._interval_s = interval_s
        self._next_s = float("-inf")
        self._left_out = 0

    def warning(self, message: str, *arguments: object) -> None:
        """Log ``message`` as logging.Logger.warning does, or count it."""
        self.log(logging.WARNING, message, *arguments)

    def log(
        self, level: int, message: str, *arguments: object, exc_info: BaseException | None = None
    ) -> None:
        """Log ``message`` as logging.Logger.log does, or count it."""
        now_s = time.monotonic()
        if now_s < self._next_s:
            self._left_out += 1
            return
        more = f" (and {self._left_out} more like this)" if self._left_out else ""
        self._next_s, self._left_out = now_s + self._interval_s, 0
        self._log.log(level, message + more, *arguments, exc_info=exc_info)
