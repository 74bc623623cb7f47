"""Workers whose name stands for several: one for each address that DNS has for it. Pure.

As long as no address is known, the worker is who its URL is, which is not reached; so its group has it, and
its requests wait for whoever comes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from brproxy.config_workers import Worker
from brproxy.origins import read_worker_url

ADDRESSES_MAX = 256
"""Addresses of one name that are workers (addresses)."""

Addresses = Mapping[str, Sequence[str]]
"""The addresses of each name that is known, by the URL that it is in."""


def is_each(worker: Worker) -> bool:
    """Tell whether each address of the worker's name is to be a worker."""
    return worker.addresses == "each"


def expanded(workers: Iterable[Worker], known: Addresses) -> list[Worker]:
    """Return ``workers`` with those in place of a name that stands for several."""
    return [each for worker in workers for each in at_each(worker, known.get(worker.url, ()))]


def at_each(worker: Worker, addresses: Sequence[str]) -> list[Worker]:
    """Return the workers at ``addresses`` that ``worker`` stands for: itself, if for none."""
    if not is_each(worker) or not addresses:
        return [worker]
    return [_at(worker, address) for address in addresses]


def _at(worker: Worker, address: str) -> Worker:
    origin, base = read_worker_url(worker.url)
    host = f"[{address}]" if ":" in address else address
    own = {
        "url": f"{origin.scheme}://{host}:{origin.port}{base}",
        "name": f"{worker.label}@{address}",
        "addresses": "any",
    }
    return Worker.model_construct(worker.model_fields_set, **(dict(worker) | own))


def followed(
    running: Sequence[Worker], worker: Worker, before: Sequence[str], now: Sequence[str]
) -> list[Worker]:
    """Return ``running`` after the addresses of ``worker`` were ``before`` and are ``now``.

    Who was at an address that stays is left as it is, be it there or removed by hand.
    """
    old, new = at_each(worker, before), at_each(worker, now)
    gone = {each.label for each in old} - {each.label for each in new}
    taken = {each.label for each in [*running, *old]}
    stay = [each for each in running if each.label not in gone]
    return [*stay, *(each for each in new if each.label not in taken)]
