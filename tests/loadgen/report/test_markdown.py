"""Tables in Markdown, their places in a text, and differences on the same requests."""

import re

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from brproxy.types import InvalidInputError
from loadgen.report.markdown import (
    FIGURES,
    differences_header,
    differences_rows,
    figure_text,
    markdown_table,
    marked,
    policies_header,
    policies_rows,
    renewed,
    runs_header,
    runs_rows,
)
from loadgen.report.paired import is_worse, paired_difference
from loadgen.report.schema import PolicyResult, Report
from loadgen.report.statistics import half_width_95

NEEDED = (
    *("imbalance_kv_tokens", "idle_fraction", "throughput_of_perfect", "output_tokens_per_s"),
    *("tpot_ms_p95", "ttft_ms_p95", "wait_ms_p99"),
)


def result(policy, **by_seed):
    """Return a policy's result with the means and intervals of ``by_seed``."""
    plain = dict.fromkeys(NEEDED)
    means = {name: float(np.mean(values)) for name, values in by_seed.items()}
    several = {name: values for name, values in by_seed.items() if len(values) > 1}
    intervals = {name: half_width_95(values) for name, values in several.items()}
    return PolicyResult(
        policy=policy, requests=10, lost=0, intervals=intervals, by_seed=several, **(plain | means)
    )


def report(*results, **scenario):
    return Report(scenario={"requests": 10, "seeds": 2, **scenario}, policies=list(results))


def test_a_figure_has_its_interval():
    assert figure_text(result("a", idle_fraction=[0.1, 0.1]), "idle_fraction") == "10.0 ± 0.0"
    assert figure_text(result("a", idle_fraction=[0.1, 0.3]), "idle_fraction") == "20.0 ± 127.1"
    assert figure_text(result("a", tpot_ms_p95=[61.26]), "tpot_ms_p95") == "61.3"
    assert figure_text(result("a"), "tpot_ms_p95") == "-"
    assert figure_text(None, "tpot_ms_p95") == "-"


def test_every_figure_is_one_of_the_report():
    assert set(FIGURES) <= set(PolicyResult.model_fields)


REPORTS = [
    report(
        *(result("a", idle_fraction=[0.1]), result("b", idle_fraction=[0.2])),
        workers=8,
        prefill_tokens_max=2048,
    ),
    report(
        *(result("b", idle_fraction=[0.3]), result("c", idle_fraction=[0.4])),
        workers=64,
        prefill_tokens_max=None,
    ),
]
IDLE = ["idle_fraction"]


def test_a_row_for_each_policy():
    rows = policies_rows(REPORTS, ["workers"], IDLE, ["b", "a"], {"a": "A"})
    assert rows == [["8", "b", "20.0"], ["8", "A", "10.0"], ["64", "b", "30.0"]]
    assert policies_header(["workers"], IDLE) == ["G", "policy", "idle, %"]


def test_a_row_for_each_run():
    keys = ["workers", "prefill_tokens_max"]
    rows = runs_rows(REPORTS, keys, ["idle_fraction", "tpot_ms_p95"], ["a", "b"])
    assert rows == [["8", "2,048", "10.0 / -", "20.0 / -"], ["64", "whole", "- / -", "30.0 / -"]]
    assert runs_header(keys, ["a", "b"], {"a": "A"}) == ["G", "chunk, tokens", "A", "b"]


def test_differences_and_where_the_first_is_worse():
    reports = [
        report(
            result("ours", output_tokens_per_s=[90, 91], ttft_ms_p95=[10, 12]),
            result("theirs", output_tokens_per_s=[100, 101], ttft_ms_p95=[10, 10]),
            result("others", output_tokens_per_s=[45, 91], ttft_ms_p95=[0, 1]),
            rate=1.1,
        ),
        report(result("ours", output_tokens_per_s=[90, 91]), rate=None),
        report(
            result("ours", output_tokens_per_s=[100, 101]),
            result("theirs", output_tokens_per_s=[90, 91]),
            rate=0.5,
        ),
    ]
    figures, policies = ["output_tokens_per_s", "ttft_ms_p95"], ["ours", "theirs", "others"]
    first, second, third = differences_rows(reports, ["rate"], figures, policies, {"theirs": "T"})
    assert first == [
        *("1.1", "-10.0 ± 0.6 / +50.0 ± 635.5", "+10.0 ± 127.1 / -"),
        "output tokens/s (T)",
    ]
    assert second == ["own times", "- / -", "- / -", "-"]
    assert third[-1] == "no"
    assert differences_header(["rate"], figures, policies, {"theirs": "T"}) == [
        *("rate", "output tokens/s, % against T / others", "TTFT P95, %"),
        "worse beyond the interval",
    ]


figure_values = st.lists(st.floats(0.1, 1e6), min_size=2, max_size=8)


@given(figure_values, figure_values)
def test_a_difference_is_taken_seed_by_seed(ours, theirs):
    length = min(len(ours), len(theirs))
    ours, theirs = ours[:length], theirs[:length]
    difference = paired_difference(
        result("a", ttft_ms_p95=ours), result("b", ttft_ms_p95=theirs), "ttft_ms_p95"
    )
    percents = [100 * (a - b) / b for a, b in zip(ours, theirs, strict=True)]
    assert difference.percent == pytest.approx(np.mean(percents), rel=1e-6, abs=1e-6)
    assert is_worse(difference, "ttft_ms_p95") == (difference.percent > difference.half_width)
    assert is_worse(difference, "output_tokens_per_s") == (-difference.percent > difference.half_width)


def test_one_seed_shows_nothing_and_seeds_must_pair():
    one = paired_difference(result("a", ttft_ms_p95=[3]), result("b", ttft_ms_p95=[2]), "ttft_ms_p95")
    assert (one.percent, one.half_width) == (pytest.approx(50), None)
    assert not is_worse(one, "ttft_ms_p95")
    three = result("b", ttft_ms_p95=[2, 2, 2])
    assert paired_difference(result("a", ttft_ms_p95=[3, 3]), three, "ttft_ms_p95") is None
    assert paired_difference(result("a"), three, "ttft_ms_p95") is None


names = st.from_regex(r"[a-z0-9][a-z0-9.-]{0,5}", fullmatch=True)
prose = st.text(alphabet="ab|<>-! \n").filter(lambda text: "<!--" not in text)


@st.composite
def pages(draw):
    """Return pieces of prose, and the tables between them with what stands there."""
    tables = draw(st.lists(st.tuples(names, prose), max_size=4, unique_by=lambda table: table[0]))
    return draw(st.lists(prose, min_size=len(tables) + 1, max_size=len(tables) + 1)), tables


def page(pieces, tables):
    parts = [pieces[0]]
    for piece, (name, body) in zip(pieces[1:], tables, strict=True):
        parts += [f"<!-- table {name} -->", body, "<!-- end -->", piece]
    return "".join(parts)


@given(pages(), st.dictionaries(names, prose, max_size=3), st.data())
def test_a_page_keeps_its_prose(drawn, others, data):
    pieces, tables = drawn
    chosen = data.draw(st.sets(st.sampled_from([name for name, _ in tables]))) if tables else set()
    new = {name: data.draw(prose) for name in chosen} | {
        name: body for name, body in others.items() if name not in dict(tables)
    }
    text = page(pieces, tables)
    after = renewed(text, new)
    assert after == page(pieces, [(name, f"\n{new[name]}" if name in new else body) for name, body in tables])
    assert renewed(after, new) == after
    assert marked(text) == dict(tables)
    assert marked(after).keys() == dict(tables).keys()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table a -->", "the table 'a' has no <!-- end --> behind it"),
        ("<!-- end --><!-- table a -->", "the table 'a' has no <!-- end --> behind it"),
        ("<!-- table a --><!-- table b --><!-- end -->", "the table 'a' has no <!-- end --> behind it"),
        (
            "<!-- table a --><!-- end --><!-- table a --><!-- end -->",
            "the table 'a' has two places; it needs one",
        ),
    ],
)
def test_marks_that_do_not_pair(text, message):
    with pytest.raises(InvalidInputError, match=re.escape(message)):
        renewed(text, {})


@given(st.lists(st.text(alphabet="ab %"), min_size=1, max_size=4), st.integers(0, 3))
@example(["a"], 0)
def test_a_table_has_as_many_cells_in_each_line(header, rows):
    table = markdown_table(header, [header] * rows)
    lines = table.splitlines()
    assert len(lines) == rows + 2
    assert {line.count("|") for line in lines} == {len(header) + 1}
