"""The import arrows of the architecture: who may import whom."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# What each part of brproxy may import of the others; itself is always allowed.
BASE = {"types", "clock", "registry"}
STATES = {"transitions", "lifecycle", "health", "roster", "slow_start", "waiting", "faults"}
STEPS = {"step_costs", "step_fit", "step_slowness", "step_chunks", "step_windows", "step_model"}
CORE = (
    BASE
    | STATES
    | {
        "routing",
        "prediction",
        "bound_rows",
        "ledger",
        "happenings",
        "learning",
        "foresight",
        "sessions",
        "dispatcher",
    }
    | {"batches", "growth", "turnover", "rounds", "fleet", "regression", "estimate", "prompt_counts"}
    | {"prefill_pace"}
    | STEPS
)
ALLOWED = {
    "types": set(),
    "clock": {"types"},
    "registry": {"types"},
    "transitions": {"types"},
    "lifecycle": {"types", "transitions"},
    "roster": {"types", "transitions", "health"},
    "waiting": {"types", "lifecycle", "routing"},
    "regression": {"types"},
    "estimate": {"types", "regression"},
    "health": set(),
    "logs": set(),
    "command": {"types"},
    "step_costs": set(),
    "step_fit": set(),
    "step_slowness": {"step_fit"},
    "step_chunks": {"types"},
    "step_windows": {"types", "happenings", "ledger", "lifecycle", "roster", "step_chunks"},
    "step_model": {"ledger", "roster"} | STEPS - {"step_model"},
    "prefill_pace": {"happenings", "lifecycle", "step_costs", "step_model"},
    "routing": BASE | {"step_costs"},
    "prediction": BASE,
    "engines": BASE,
    "slow_start": {"roster", "health"},
    "bound_rows": {"types", "lifecycle", "roster", "routing", "prediction"},
    "ledger": BASE | {"bound_rows", "lifecycle", "roster", "routing", "prediction", "slow_start"},
    "offsets": set(),
    "silences": set(),
    "signals": {"types", "ledger", "roster", "offsets", "silences", "engines", "logs"},
    "faults": set(),
    "adapters": {"types", "lifecycle", "roster"},
    "happenings": {"faults", "lifecycle", "roster"},
    "learning": {"happenings", "lifecycle", "prediction"},
    "turnover": {"ledger"},
    "growth": {"faults", "ledger", "lifecycle", "prediction", "routing"},
    "foresight": {"types", "step_costs", "faults", "ledger", "routing", "prediction", "turnover"},
    "rounds": {"types", "dispatcher", "lifecycle"},
    "sessions": {"types", "happenings", "ledger", "lifecycle", "roster", "routing"},
    "dispatcher": BASE
    | STATES
    | {"ledger", "happenings", "learning", "foresight", "growth", "sessions", "routing", "prediction"}
    | {"step_costs"},
    "batches": {"types", "dispatcher", "happenings", "ledger", "lifecycle", "prediction", "roster"}
    | {"waiting"},
    "fleet": BASE | {"dispatcher", "roster", "step_costs", "step_model"},
    "balancer": BASE
    | {
        "batches",
        "dispatcher",
        "ledger",
        "lifecycle",
        "prediction",
        "roster",
        "rounds",
        "routing",
        "sessions",
    },
    "verl_router": {"balancer", "clock", "config_sections", "sessions", "validation"},
    "prompt_counts": {"types", "dispatcher", "happenings", "lifecycle"},
    "tokenizer_file": {"types"},
    "telemetry": CORE | {"engines", "signals", "fault_tolerance"},
    "validation": {"types"},
    "state_file": {"prediction"},
    "config_sections": {"validation"},
    "config_affinity": {"validation", "config_sections"},
    "config_batches": {"validation", "config_sections", "relay"},
    "config_costs": {"validation"},
    "config_workers": {"validation", "origins", "engines", "ranks", "relay"} | BASE,
    "config_asking": {"validation", "config_sections"},
    "config": {"config_sections", "config_affinity", "config_batches", "config_costs", "config_asking"}
    | {"config_workers", "validation", "routing", "prediction"}
    | BASE,
    "config_reference": {"config", "config_workers", "validation"},
    "journey": {"types", "transitions"},
    "fault_tolerance": {"types", "transitions", "engines"},
    "origins": {"types"},
    "ranks": {"types"},
    "relay": {"types", "transitions", "origins", "logs"},
    "proxy": CORE
    | {"adapters", "engines", "telemetry", "relay", "journey", "logs", "ranks", "signals", "origins"}
    | {"fault_tolerance", "tokenizer_file"},
    "listening": {"types", "config_sections"},
    "findings": {"config_workers", "engines"},
    "first_file": {"config_workers", "engines", "findings"},
    "discovery": {"build", "config", "config_workers", "engines", "findings", "origins", "proxy", "relay"},
    "starting": {"types", "config", "config_workers", "discovery", "findings", "first_file"},
    "open_files": set(),
    "plans": {"config", "config_workers", "roster"},
    "deployment": {"types", "config", "config_workers", "fleet", "plans", "roster", "validation"},
    "addresses": {"config_workers", "origins"},
    "resolving": {"addresses", "config", "config_workers", "deployment", "logs", "origins", "validation"},
    "reloading": {"resolving", "returning", "config", "deployment", "findings", "plans", "validation"},
    "returning": {"build", "config_workers", "deployment", "discovery", "findings", "fleet", "health", "logs"}
    | {"plans", "proxy", "roster", "validation"},
    "admin": {"config_sections", "config_workers", "deployment", "reloading", "listening", "validation"}
    | {"types", "fleet", "plans", "roster", "proxy", "relay"},
    "making": {"build", "config", "config_workers", "fleet", "proxy"},
    "parts": {"build", "config", "deployment", "making", "reloading", "resolving", "returning", "proxy"}
    | {"offsets", "signals", "telemetry", "fault_tolerance"},
    "workers_command": {"types", "admin", "config", "config_sections", "origins"},
    "counters": {"clock", "config", "estimate", "prompt_counts", "tokenizer_file", "proxy", "relay"},
    "build": CORE
    | {"counters", "deployment", "plans"}
    | {"state_file", "engines", "telemetry", "config", "config_workers", "open_files", "proxy", "relay"},
    "app": {"build", "clock", "config", "config_sections", "listening", "open_files", "proxy", "relay"}
    | {"state_file", "discovery", "admin", "deployment", "parts", "reloading", "resolving"},
    "cli": CORE
    | {
        "engines",
        "config",
        "config_workers",
        "config_reference",
        "proxy",
        "relay",
        "app",
        "build",
        "command",
        "logs",
        "discovery",
        "findings",
        "starting",
        "workers_command",
    },
    "__main__": {"cli"},
    "__init__": set(),
}
LOADGEN_MAY_USE = CORE | {"command", "validation"}
PURE = (
    *sorted(STEPS),
    "routing",
    "prediction",
    "engines",
    "ledger",
    "transitions",
    "lifecycle",
    "roster",
    "slow_start",
    "waiting",
    "batches",
    "balancer",
    "happenings",
    "learning",
    "growth",
    "turnover",
    "prefill_pace",
    "foresight",
    "sessions",
    "findings",
    "addresses",
    "first_file",
    "faults",
    "offsets",
    "silences",
    "rounds",
    "adapters",
    "dispatcher",
    "health",
    "fleet",
    "prompt_counts",
    "regression",
    "estimate",
    "journey",
    "origins",
    "ranks",
    "deployment",
    "fault_tolerance",
)
NOT_PURE = {"asyncio", "socket", "aiohttp", "time", "random", "threading", "os", "uvloop", "subprocess"}


def imported(path):
    """Return the dotted names that a module imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def part(path):
    """Return the part of brproxy that a file belongs to: its first folder or its own name."""
    inside = path.relative_to(ROOT / "brproxy")
    return inside.parts[0] if len(inside.parts) > 1 else inside.stem


@pytest.mark.parametrize("path", modules("brproxy"), ids=lambda path: str(path.relative_to(ROOT)))
def test_brproxy(path):
    mine = part(path)
    assert mine in ALLOWED, f"{mine}: say in this test what it may import"
    for name in imported(path):
        top, _, rest = name.partition(".")
        assert top != "loadgen", f"{path} imports the load generator"
        if top == "brproxy":
            theirs = rest.split(".")[0]
            assert theirs == mine or theirs in ALLOWED[mine], f"{path} must not import {name}"


@pytest.mark.parametrize("path", modules("loadgen"), ids=lambda path: str(path.relative_to(ROOT)))
def test_loadgen_uses_only_the_pure_parts(path):
    for name in imported(path):
        top, _, rest = name.partition(".")
        assert top != "brproxy" or rest.split(".")[0] in LOADGEN_MAY_USE, f"{path} must not import {name}"


@pytest.mark.parametrize("name", PURE)
def test_pure_parts_know_no_sockets_and_no_clock(name):
    files = [path for path in modules("brproxy") if part(path) == name]
    assert files
    for path in files:
        assert not {top.split(".")[0] for top in imported(path)} & NOT_PURE, path


@pytest.mark.parametrize("command", ["brproxy.cli", "loadgen.cli"])
def test_matrices_are_multiplied_by_one_thread(command):
    # Where numpy comes first, its library starts threads that wait for each other: rounds of 8 ms, not 0.4.
    probe = f"""
import os, sys
class Probe:
    def find_spec(self, name, *_):
        if name == "numpy":
            print(os.environ.get("OPENBLAS_NUM_THREADS"))
sys.meta_path.insert(0, Probe())
import {command}
"""
    clean = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    run = subprocess.run([sys.executable, "-c", probe], env=clean, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["1"]


LOADGEN_PURE = (
    *("cluster", "barrier", "capacity", "arrivals", "workload"),
    *("emulator/handover", "emulator/handover_wire", "emulator/settings"),
    *("dataplane/message", "dataplane/tokens", "dataplane/check", "dataplane/loads"),
)


@pytest.mark.parametrize("name", LOADGEN_PURE)
def test_pure_parts_of_loadgen(name):
    path = ROOT / "loadgen" / f"{name}.py"
    assert not {top.split(".")[0] for top in imported(path)} & NOT_PURE
