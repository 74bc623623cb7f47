"""Groups that a reload removes and the next one makes anew, with requests in them."""

from __future__ import annotations

from typing import Any

from brproxy.app import RunningProxy
from tests.simulation.actions import Scenario, Trouble
from tests.simulation.loop import VirtualLoop

CUT_S = 0.5
"""What a group that was removed has for its requests where these are cut off (seconds)."""

ENDS_S = 600.0
"""What it has where they may end: far more than they take (seconds)."""


class Regroup:
    """Removes the groups of ``scenario`` and has them again."""

    def __init__(self, loop: VirtualLoop, scenario: Scenario, proxy: RunningProxy) -> None:
        self._loop = loop
        self._scenario = scenario
        self._proxy = proxy

    def happen(self, trouble: Trouble) -> None:
        """Remove the group of a worker by one reload, and have it again by the next."""
        proxy, group = self._proxy, self._scenario.workers[trouble.worker][2] or "all"
        is_cut = trouble.kind == "group-cut"
        self._loop.upheavals += is_cut
        retiring: Any = proxy.parts._retiring
        retiring._drain_s = CUT_S if is_cut else ENDS_S
        # As they run: a rank that has left by itself, which no file can have it do, has no limits to change.
        workers = proxy.deployment.running()
        for wanted in ([one for one in workers if one.group != group], workers):
            proxy.deployment.change(wanted, "simulation")
