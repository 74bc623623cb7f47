"""The map says what is there: its files exist, all modules are on it, and a request takes steps that are."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAP = (ROOT / "brproxy" / "ARCHITECTURE.md").read_text(encoding="utf-8")
LAYOUT = MAP.split("```")[1]
LIFE = MAP.partition("## Life of a request")[2].partition("\n## ")[0]
STEPS = re.findall(r"`([\w/]+\.py):([\w.]+)`", LIFE)
FREE_OF_LOGIC = {"__init__.py", "__main__.py"}


def test_each_step_of_a_request_s_life_says_where_it_is():
    steps = re.split(r"\n(?=\d+\. )", LIFE)[1:]
    assert len(steps) == 7
    for step in steps:
        assert re.search(r"`[\w/]+\.py:[\w.]+`", step), step


@pytest.mark.parametrize(("file", "name"), sorted(set(STEPS)))
def test_what_it_names_is_there(file, name):
    found = ast.parse((ROOT / "brproxy" / file).read_text(encoding="utf-8")).body
    for part in name.split("."):
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        defined = {node.name: node for node in found if isinstance(node, kinds)}
        assert part in defined, f"{file} has no {name}"
        found = defined[part].body


def modules():
    return [path for path in (ROOT / "brproxy").rglob("*.py") if path.name not in FREE_OF_LOGIC]


def test_every_module_is_on_the_map():
    named = set(re.findall(r"[\w*]+\.py", LAYOUT))
    by_folder = {"policies", "predictors", "dialects", "transfers"}
    missing = [
        path.name for path in modules() if path.name not in named and path.parent.name not in by_folder
    ]
    # Predictors are named by what they are called.
    assert missing == []


def test_every_file_on_the_map_is_there():
    there = {path.name for folder in ("brproxy", "loadgen") for path in (ROOT / folder).rglob("*.py")}
    assert set(re.findall(r"\w+\.py", LAYOUT)) - there == set()
    assert (
        set(re.findall(r"\w+\.py", MAP)) - there - {"NAME.py", "test_architecture.py"} - named_tests()
        == set()
    )


def named_tests():
    """Return the files of tests that the map names."""
    there = {path.name for path in (ROOT / "tests").rglob("*.py")}
    return set(re.findall(r"\w+\.py", MAP)) & there


def test_no_module_is_longer_than_one_can_read():
    for path in modules():
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"
