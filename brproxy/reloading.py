"""Reads the configuration's file again while the proxy runs, and has its workers follow."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from brproxy.config import load_config
from brproxy.deployment import Deployment
from brproxy.findings import NOT_ASKED, completed
from brproxy.plans import Plan
from brproxy.resolving import Resolving
from brproxy.returning import Returning
from brproxy.validation import ConfigError

log = logging.getLogger(__name__)


class Reloading:
    """Reloads ``path`` (None: the proxy was started without a file), one at a time.

    ``resolving`` knows the addresses of names, and ``returning`` asks workers who they are: nobody waits for
    that, as requests can be routed without.
    """

    def __init__(
        self, deployment: Deployment, path: Path | None, resolving: Resolving, returning: Returning
    ) -> None:
        self._deployment = deployment
        self._returning = returning
        self._resolving = resolving
        self._path = path
        self._one_at_a_time = asyncio.Lock()

    async def reload(self) -> Plan:
        """Apply the file as it is now, log what changed in a line, and return that.

        Raises ConfigError, a line for each mistake, which are logged too; nothing has changed then.
        """
        async with self._one_at_a_time:
            try:
                changes = await self._apply()
            except ConfigError as error:
                for line in str(error).split("\n"):
                    log.error("not reloaded: %s", line)  # noqa: TRY400 - a user's mistake has no traceback
                raise
            level = logging.WARNING if changes.restart else logging.INFO
            log.log(level, "reloaded %s: %s", self._path, changes)
            return changes

    async def follow(self, asked: asyncio.Event) -> None:
        """Reload each time that ``asked`` is set, for ever; what is wrong with the file is only logged."""
        while True:
            await asked.wait()
            asked.clear()
            try:
                await self.reload()
            except ConfigError:
                continue
            except Exception:
                # The next file may be a better one, and there must be somebody to read it.
                log.exception("reloading %s failed", self._path)

    async def _apply(self) -> Plan:
        if self._path is None:
            msg = "the proxy was started without a configuration file: there is nothing to read again"
            raise ConfigError(msg)
        # In a thread: thousands of workers take longer to check than a stream may wait.
        file = await asyncio.to_thread(load_config, self._path)
        resolved = await self._resolving.resolved(file)
        config = resolved.config
        # Else what the file leaves out would go back to its defaults.
        workers = completed(config.worker, NOT_ASKED, self._deployment.running())
        config = config.model_copy(update={"worker": workers})
        changes = self._deployment.reload(config, str(self._path))
        self._resolving.follow(resolved)
        self._returning.reloaded(changes)
        return changes
