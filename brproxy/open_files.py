"""How many files the process may have open: a request needs two, its client's connection and its worker's."""

from __future__ import annotations

import logging
import resource

_SPARE = 256
"""Listeners, probes, logs; and clients that are about to be told that it is too much."""

_TOO_MANY = 64
"""Clients beyond those whose requests are in the proxy: they are told that it is too much (connections)."""

_UNLIMITED = 1 << 20

log = logging.getLogger(__name__)


def raise_open_files_limit() -> int:
    """Raise the limit as far as the system lets a process do that by itself; return it.

    The usual 1024 are for programs that cannot deal with more; the hard limit is hundreds of thousands where
    service managers and containers set it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _UNLIMITED
    raised = max(soft, _UNLIMITED if hard == resource.RLIM_INFINITY else hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
    except (OSError, ValueError) as error:
        log.warning("the limit of %d open files stays as it is: %s", soft, error)
        return soft
    return raised


def requests_for_open_files() -> int:
    """Return for how many requests at once this process may open enough files; at least 1."""
    return max(1, (_limit() - _SPARE) // 2)


def clients_for_open_files() -> int:
    """Return how many clients may be connected: the requests, each with one to a worker, and some more."""
    return requests_for_open_files() + _TOO_MANY


def file_number_max() -> int:
    """Return from which file number on few files are left: the system gives the least that is free."""
    return _limit() - min(_SPARE // 2, _limit() // 8)


def _limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _UNLIMITED if soft == resource.RLIM_INFINITY else soft
