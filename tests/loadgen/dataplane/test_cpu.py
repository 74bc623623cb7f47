"""CPU time, memory and cores of processes that the test has started."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest

from loadgen.dataplane import cpu
from loadgen.dataplane.cpu import (
    Cores,
    CpuTime,
    choose_cores,
    on_core,
    peak_rss_bytes,
    process_tree,
    read_cpu,
    spent_s,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

BURN = """
import sys, time
sys.stdin.readline()
started_s = time.process_time()
while time.process_time() < started_s + 0.15: pass
print("burnt", time.process_time(), flush=True)
sys.stdin.readline()
"""


@contextmanager
def child(code, *command):
    arguments = [*command, sys.executable, "-c", code]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


def test_the_cpu_time_of_a_child():
    with child(BURN) as process:
        before = read_cpu([process.pid])
        process.stdin.write("\n")
        process.stdin.flush()
        burnt_s = float(process.stdout.readline().split()[1])
        spent = spent_s(before, read_cpu([process.pid]))
        # What it took to start counts in `burnt_s`, and perhaps in `before`.
        assert 0.14 <= spent <= burnt_s + 0.02
        assert peak_rss_bytes([process.pid]) > 5e6


def test_what_a_reaped_child_used_is_its_parents():
    code = (
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {BURN!r}], input='\\n\\n', text=True)"
    )
    code += "\nprint(flush=True)\nsys.stdin.readline()"
    with child(code) as process:
        before = CpuTime({}, 0.0)
        assert process.stdout.readline().startswith("burnt")
        process.stdout.readline()
        assert spent_s(before, read_cpu([process.pid])) >= 0.14


def test_threads_that_have_ended_leave_the_coarse_account():
    before, after = CpuTime({(1, 1): 5, (1, 2): 7}, 1.0), CpuTime({(1, 1): 10**9 + 5, (1, 3): 10**9}, 3.5)
    assert spent_s(before, after) == 2.5
    assert spent_s(CpuTime({(1, 1): 5}, 1.0), after) == 2.0
    assert spent_s(CpuTime({}, 1.0), after) == 2.5


def test_a_tree_of_processes():
    code = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"
    with child(code) as process:
        process.stdout.readline()
        tree = process_tree(process.pid)
        assert (tree[0], len(tree)) == (process.pid, 2)


def test_a_process_that_has_ended():
    with child("") as process:
        process.wait()
    assert read_cpu([process.pid]) == CpuTime({}, 0.0)
    assert peak_rss_bytes([process.pid]) == 0
    assert process_tree(process.pid) == [process.pid]


def test_cores(monkeypatch):
    allowed = os.sched_getaffinity(0)
    core = min(allowed)
    with on_core(core), child("import os; print(os.sched_getaffinity(0))") as process:
        assert process.stdout.readline() == f"{{{core}}}\n"
    with on_core(None):
        assert os.sched_getaffinity(0) == allowed
    assert os.sched_getaffinity(0) == allowed
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: {7, 3, 5})
    assert choose_cores(pin=True) == Cores(3, 5)
    assert choose_cores(pin=False) == Cores()
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda _: {7})
    assert choose_cores(pin=True) == Cores()
