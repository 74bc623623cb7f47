"""CPU time, memory and cores of processes, as Linux's /proc tells them."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class CpuTime:
    """What some processes have used up to an instant.

    ``threads_ns``: of each thread that lives, by its process and its id; empty where the kernel keeps no such
    account, or one of them has just ended. ``coarse_s``: of the processes, threads and children that have
    ended included, in steps of 10 ms.
    """

    threads_ns: dict[tuple[int, int], int]
    coarse_s: float


def read_cpu(pids: Iterable[int]) -> CpuTime:
    """Return what these processes have used, user and system; processes that have ended count nothing."""
    pids = tuple(pids)
    threads_ns: dict[tuple[int, int], int] = {}
    try:
        for pid in pids:
            for thread in (_PROC / str(pid) / "task").iterdir():
                on_cpu_ns = (thread / "schedstat").read_bytes().split()[0]
                threads_ns[pid, int(thread.name)] = int(on_cpu_ns)
    except OSError:
        # No such account in this kernel, or a thread has just ended: half an account would mislead.
        threads_ns.clear()
    # utime, stime, cutime, cstime of proc_pid_stat(5).
    ticks = sum(int(field) for pid in pids for field in _stat(pid)[11:15])
    return CpuTime(threads_ns, ticks * _TICK_S)


def spent_s(before: CpuTime, after: CpuTime) -> float:
    """Return the CPU seconds between two instants.

    Exact as long as every thread of ``before`` still lives; else from the account that keeps the dead.
    """
    if before.threads_ns and before.threads_ns.keys() <= after.threads_ns.keys():
        return sum(ns - before.threads_ns.get(thread, 0) for thread, ns in after.threads_ns.items()) / 1e9
    return after.coarse_s - before.coarse_s


def peak_rss_bytes(pids: Iterable[int]) -> int:
    """Return the sum of the most memory that each process had resident so far; shared pages count in each."""
    total = 0
    for pid in pids:
        try:
            status = (_PROC / str(pid) / "status").read_text(encoding="utf-8", errors="replace")
        except OSError:
            continue
        peaks = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
        total += sum(int(kib) for kib in peaks) * 1024
    return total


def process_tree(pid: int) -> list[int]:
    """Return a process and all that it started, directly or not."""
    children = defaultdict(list)
    for entry in _PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children[int(fields[1])].append(int(entry.name))
    tree = [pid]
    for parent in tree:
        tree += children[parent]
    return tree


def _stat(pid: int) -> list[str]:
    """Return the fields of a process's stat from its state on, none if it has ended."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    # The command's name comes before, in parentheses, and may contain anything.
    return text.rpartition(")")[2].split()


@dataclass(frozen=True, slots=True)
class Cores:
    """Where things run: the proxy on one core, workers and client on another. None: anywhere."""

    proxy: int | None = None
    load: int | None = None


def choose_cores(*, pin: bool) -> Cores:
    """Return the first two cores that this process may use; no pinning where there is only one."""
    cores = sorted(os.sched_getaffinity(0))
    return Cores(cores[0], cores[1]) if pin and len(cores) > 1 else Cores()


@contextmanager
def on_core(core: int | None) -> Iterator[None]:
    """Let what is started inside the block run on ``core`` only, with every thread it will ever have."""
    if core is None:
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)
