"""A deployment as the metrics of its proxy show it, to be simulated: workers, slots, costs of a step, rate.

``GET /metrics`` of a running brproxy, or a page of it that was saved. How many requests come in a second is
only seen where the page can be read twice.
"""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from brproxy.types import InvalidInputError
from loadgen.cluster_settings import ClusterSettings
from loadgen.commands.scenario import Arrivals, Scenario

RATE_S = 10.0
"""Between the two readings that tell how many requests come (seconds)."""

_TIMEOUT_S = 10.0
_PAGE_BYTES_MAX = 1 << 26
_MEASURABLE = 2.0
"""A cost that is not so many standard errors above zero is taken for none."""

_Page = Mapping[str, Mapping[tuple[str, str], float]]
"""Of each series the values by group and worker."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """The deployment, and how many requests come in a second (None: that was not seen)."""

    cluster: ClusterSettings
    requests_per_s: float | None

    def of(self, scenario: Scenario, rate: float | None) -> Scenario:
        """Return ``scenario`` on this deployment; with ``rate``, that share of what it could do arrives."""
        cluster = replace(self.cluster, dispatch_steps=scenario.cluster.dispatch_steps)
        arrivals = scenario.arrivals
        if rate is None and self.requests_per_s:
            arrivals = Arrivals(requests_per_s=self.requests_per_s, cv=arrivals.cv)
        return replace(scenario, cluster=cluster, arrivals=arrivals)


def calibrated_from(
    source: str, group: str | None = None, pause: Callable[[float], None] = time.sleep
) -> Calibration:
    """Read ``source``, a URL of a proxy or of its metrics, or a file; ``group``: its barrier group.

    None: the only one. Raises InvalidInputError, also where the proxy has not learnt enough yet.
    """
    if not source.startswith(("http://", "https://")):
        try:
            text = Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidInputError(f"{source} cannot be read: {error}") from error
        return Calibration(cluster_shown(text, source, group), None)
    url = source if source.rstrip("/").endswith("/metrics") else f"{source.rstrip('/')}/metrics"
    first = _parsed(_fetch(url), url)
    began_s = time.monotonic()
    cluster = _cluster(first, url, group)
    pause(RATE_S)
    second, took_s = _parsed(_fetch(url), url), time.monotonic() - began_s
    came = _admitted(second, url, group) - _admitted(first, url, group)
    return Calibration(cluster, came / took_s if came > 0 else None)


def cluster_shown(page: str, source: str, group: str | None = None) -> ClusterSettings:
    """Return the deployment that ``page``, metrics from ``source``, shows; raises as ``calibrated_from``."""
    return _cluster(_parsed(page, source), source, group)


def _fetch(url: str) -> str:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as answer:  # noqa: S310 - http or https, see above
            body: bytes = answer.read(_PAGE_BYTES_MAX)
    except (OSError, ValueError, urllib.error.URLError) as error:
        raise InvalidInputError(f"{url} cannot be read: {error}") from error
    return body.decode("utf-8", "replace")


def _parsed(text: str, source: str) -> _Page:
    page: dict[str, dict[tuple[str, str], float]] = {}
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                key = sample.labels.get("group", ""), sample.labels.get("worker", "")
                page.setdefault(sample.name, {})[key] = sample.value
    except ValueError as error:
        raise InvalidInputError(f"{source} is no page of metrics: {error}") from error
    return page


def _group(page: _Page, source: str, group: str | None) -> str:
    """Return the group to look at; raises InvalidInputError where none or several could be meant."""
    windows = page.get("brproxy_step_windows", {})
    # Those that prefill for others have no steps to tell of.
    groups = sorted(name for name, _ in windows if not name.endswith("/prefill"))
    if group is not None and group not in groups:
        raise InvalidInputError(f"{source} has no group {group!r}; it has: {', '.join(groups) or 'none'}")
    if group is None and len(groups) != 1:
        has = f"several groups, say which by --group: {', '.join(groups)}" if groups else "no brproxy_step_*"
        raise InvalidInputError(f"{source} has {has}")
    return group or groups[0]


def _admitted(page: _Page, source: str, group: str | None) -> float:
    return page.get("brproxy_admitted_total", {}).get((_group(page, source, group), ""), 0.0)


def _cluster(page: _Page, source: str, group: str | None) -> ClusterSettings:
    name = _group(page, source, group)

    def of_group(series: str) -> float | None:
        return page.get(f"brproxy_step_{series}", {}).get((name, ""))

    def of_workers(series: str) -> list[float]:
        return [value for (of, _), value in page.get(f"brproxy_{series}", {}).items() if of == name]

    costs = [of_group(series) for series in ("base_seconds", "seconds_per_kv_token")]
    base_s, s_per_kv_token = costs
    slots = [int(value) for value in of_workers("worker_slots")]
    if base_s is None or s_per_kv_token is None or not slots:
        windows = int(of_group("windows") or 0)
        msg = f"{source}: group {name} has not learnt what a step costs yet ({windows} windows of steps)"
        raise InvalidInputError(f"{msg}; it needs some seconds of streams, or [costs] in its configuration")
    prefill_s = of_group("seconds_per_prefill_token") or 0.0
    chunk = of_group("prefill_tokens_max")
    if prefill_s < _MEASURABLE * (of_group("seconds_per_prefill_token_error") or 0.0):
        prefill_s, chunk = 0.0, None
    capacities = of_workers("worker_kv_capacity_tokens")
    measurable, slowness = of_workers("step_slowness_measurable"), of_workers("step_slowness")
    return ClusterSettings(
        workers=len(slots),
        slots=max(slots),
        slots_each=tuple(slots) if len(set(slots)) > 1 else (),
        kv_capacity_tokens=int(min(capacities)) if len(capacities) == len(slots) else None,
        step_base_s=max(base_s, 1e-6),
        step_s_per_kv_token=s_per_kv_token,
        prefill_s_per_token=prefill_s,
        prefill_tokens_max=None if chunk is None else max(int(chunk), *slots),
        slowness=tuple(slowness) if any(measurable) else (),
    )
