"""``loadgen results``: experiments, what is kept of them, and the tables in RESULTS.md."""

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from brproxy.types import InvalidInputError
from brproxy.validation import ConfigError
from loadgen.cli import app
from loadgen.commands import pictures, results
from loadgen.commands.results_file import load_experiments
from loadgen.commands.simulation_plan import plan_simulation
from loadgen.report.markdown import markdown_table, marked

ROOT = Path(__file__).parents[3]
EXPERIMENTS = ROOT / "config" / "results.toml"

SCENARIO = """
policies = ["least-kv", "br-0"]
seeds = 2
[workload]
name = "short"
requests_per_worker = 12
[cluster]
workers = 2
slots = 4
"""
FILE = """
[labels]
"br-0" = "ours"
[policies]
three = ["join-shortest-queue", "least-kv", "br-0"]
[[run]]
name = "small"
scenario = "small.toml"
[[run]]
name = "load"
scenario = "small.toml"
policies = "three"
workers = [1, 3]
rates = [0.5, 1.1]
requests_per_worker = 10
[[run]]
name = "traced"
scenario = "small.toml"
trace = "trace.csv"
requests_per_worker = 20
[[table]]
name = "small"
runs = ["small"]
figures = ["idle_fraction", "tpot_ms_p95"]
[[table]]
name = "load"
runs = ["load-g3-*"]
layout = "runs"
keys = ["workers", "rate"]
figures = ["idle_fraction", "throughput_of_perfect"]
[[table]]
name = "against"
runs = ["load-*", "traced"]
layout = "differences"
policies = ["br-0", "least-kv"]
keys = ["workload", "rate"]
figures = ["output_tokens_per_s", "ttft_ms_p95"]
"""
TRACE = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(
    f"2024-05-12 00:00:{i % 60:02}+00:00,{100 + i},{5 + i % 7}\n" for i in range(60)
)


@pytest.fixture
def folder(tmp_path):
    for name, text in (("small.toml", SCENARIO), ("results.toml", FILE), ("trace.csv", TRACE)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


@pytest.fixture
def simulated(monkeypatch):
    """Every policy that is simulated, in order."""
    done = []
    real = results.simulate_all

    def counting(scenario, policies, *rest):
        done.extend(policies)
        return real(scenario, policies, *rest)

    monkeypatch.setattr(results, "simulate_all", counting)
    return done


def invoke(folder, *arguments):
    experiments = ("--experiments", folder / "results.toml", "--out", folder / "kept", "--processes", 1)
    return CliRunner().invoke(app, ["results", *map(str, (*experiments, *arguments))])


def kept(folder, name):
    return json.loads((folder / "kept" / f"{name}.json").read_text(encoding="utf-8"))


def test_runs_and_tables(folder):
    result = invoke(folder, "--traces", folder)
    assert result.exit_code == 0, result.output
    names = {path.stem for path in (folder / "kept").iterdir()}
    assert names == {"small", "load-g1-0.5", "load-g1-1.1", "load-g3-0.5", "load-g3-1.1", "traced"}
    report = kept(folder, "load-g3-0.5")
    scenario = report["scenario"]
    assert (scenario["workers"], scenario["rate"], scenario["requests"]) == (3, 0.5, 30)
    assert [policy["policy"] for policy in report["policies"]] == ["join-shortest-queue", "least-kv", "br-0"]
    assert (
        kept(folder, "traced")["scenario"] | {"workload": "trace", "requests": 40, "workers": 2}
        == (kept(folder, "traced")["scenario"])
    )
    lines = result.output.splitlines()
    assert "| policy | idle, % | TPOT P95, ms |" in lines
    assert "| G | rate | join-shortest-queue | least-kv | ours |" in lines
    assert sum(line.startswith("| 3 | ") for line in lines) == 2
    compared = "output tokens/s, % against least-kv | TTFT P95, %"
    assert f"| workload | rate | {compared} | worse beyond the interval |" in lines
    idle = {policy["policy"]: policy for policy in kept(folder, "small")["policies"]}["br-0"]
    mean, half_width = 100 * idle["idle_fraction"], 100 * idle["intervals"]["idle_fraction"]
    assert any(line.startswith(f"| ours | {mean:.1f} ± {half_width:.1f} | ") for line in lines)
    assert (
        "`loadgen results --only load`: small.toml; 30 requests a seed, seeds: 2. "
        "In each cell: idle, % / of perfect, %."
    ) in lines


def test_nothing_runs_twice(folder, simulated):
    invoke(folder, "--traces", folder)
    assert len(simulated) == 2 + 4 * 3 + 2
    again = invoke(folder, "--traces", folder)
    assert len(simulated) == 2 + 4 * 3 + 2
    assert again.exit_code == 0


def test_an_interrupted_run_goes_on_where_it_was(folder, monkeypatch, simulated):
    counting = results.simulate_all

    def interrupted(scenario, policies, *rest):
        if "br-0" in policies:
            raise KeyboardInterrupt
        return counting(scenario, policies, *rest)

    monkeypatch.setattr(results, "simulate_all", interrupted)
    assert invoke(folder, "--only", "load").exit_code != 0
    assert [policy["policy"] for policy in kept(folder, "load-g3-0.5")["policies"]] == simulated
    assert simulated == ["join-shortest-queue", "least-kv"]
    monkeypatch.setattr(results, "simulate_all", counting)
    assert invoke(folder, "--only", "load").exit_code == 0
    assert simulated[2:4] == ["br-0", "join-shortest-queue"]
    whole = kept(folder, "load-g3-0.5")
    assert [policy["policy"] for policy in whole["policies"]] == ["join-shortest-queue", "least-kv", "br-0"]


def test_what_simulate_writes_is_what_is_kept(folder, simulated):
    commands = invoke(folder, "--traces", folder, "--commands").output.splitlines()
    assert len(commands) == 6
    assert not (folder / "kept").exists()
    (folder / "kept").mkdir()
    for line in commands:
        program, *arguments = shlex.split(line)
        assert program == "loadgen"
        done = CliRunner().invoke(app, [*arguments, "--processes", "1"])
        assert done.exit_code == 0, done.output
    assert invoke(folder, "--traces", folder, "--commands").output == ""
    result = invoke(folder, "--traces", folder)
    assert result.exit_code == 0, result.output
    assert simulated == []
    assert "| ours |" in result.output


def test_fewer_seeds_than_wanted_are_not_enough_and_more_are(folder, simulated):
    invoke(folder, "--only", "small", "--seeds", 3)
    invoke(folder, "--only", "small")
    assert simulated == ["least-kv", "br-0"]
    assert kept(folder, "small")["scenario"]["seeds"] == 3
    invoke(folder, "--only", "small", "--seeds", 4)
    assert simulated == ["least-kv", "br-0"] * 2
    assert [len(p["by_seed"]["idle_fraction"]) for p in kept(folder, "small")["policies"]] == [4, 4]


def test_only_what_is_kept(folder, simulated):
    invoke(folder, "--only", "load-g3-1.1")
    assert simulated == ["join-shortest-queue", "least-kv", "br-0"]
    result = invoke(folder, "--kept")
    assert len(simulated) == 3
    assert "| 3 | 1.1 | " in result.output
    assert "Not there: load-g3-0.5." in result.output
    assert "small.toml; 24 requests" not in result.output


def test_many_runs_are_counted(folder):
    text = FILE.replace("rates = [0.5, 1.1]", "rates = [0.5, 0.6, 0.7, 0.8, 0.9, 1.1]")
    (folder / "results.toml").write_text(text, encoding="utf-8")
    for name in ("load-g1-1.1", "load-g3-1.1"):
        invoke(folder, "--only", name, "--seeds", 1)
    result = invoke(folder, "--kept", "--only", "against")
    assert "small.toml; 10 / 30 requests a seed, seeds: 1. Not there: 11 of 13 runs." in result.output


def test_a_trace_that_is_not_there_is_left_out_and_said_so(folder):
    result = invoke(folder, "--only", "against", "--traces", folder / "nowhere")
    assert result.exit_code == 0
    assert "traced is left out: no folder given with --traces has trace.csv" in result.stderr
    assert "Not there: traced." in result.output


def test_another_scenario_is_not_taken_for_this_one(folder):
    invoke(folder, "--only", "small")
    (folder / "small.toml").write_text(SCENARIO.replace("slots = 4", "slots = 5"), encoding="utf-8")
    for arguments in ((), ("--kept",), ("--commands",)):
        error = invoke(folder, "--only", "small", *arguments).exception
        assert isinstance(error, InvalidInputError)
        assert str(error) == (
            f"{folder}/kept/small.json: has another scenario, with slots 4, not 5; "
            "delete it, or give another --out"
        )


def test_what_is_no_report_is_refused(folder):
    (folder / "kept").mkdir()
    (folder / "kept" / "small.json").write_text("{}", encoding="utf-8")
    error = invoke(folder, "--only", "small").exception
    assert (
        str(error) == f"{folder}/kept/small.json: is no report of loadgen simulate; delete it to have it made"
    )


def test_a_look(folder):
    assert invoke(folder, "--only", "small", "--quick").exit_code == 0
    scenario = kept(folder, "small")["scenario"]
    assert (scenario["seeds"], scenario["requests"]) == (2, 2 * 150)


def test_tables_go_between_their_marks(folder):
    page = folder / "page.md"
    page.write_bytes(b"# A\r\n\n<!-- table small -->\nold\n<!-- end -->\nb")
    assert invoke(folder, "--only", "small", "--write", page).exit_code == 0
    text = page.read_bytes().decode()
    assert text.startswith("# A\r\n\n<!-- table small -->\n| policy | idle, % | TPOT P95, ms |\n")
    assert text.endswith("seeds: 2.\n<!-- end -->\nb")
    assert "old" not in text
    assert str(invoke(folder, "--kept", "--write", folder).exception).endswith(
        "cannot be renewed: Is a directory"
    )


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('runs = ["small"]', 'runs = ["smal"]', r"table\[0\].runs: no run is called 'smal'"),
        ('"tpot_ms_p95"', '"tpot_ms"', r"table\[0\].figures: unknown 'tpot_ms'; allowed: .*tpot_ms_p95"),
        (
            'keys = ["workers", "rate"]',
            'keys = ["worker"]',
            r"table\[1\].keys: unknown 'worker'; all",
        ),
        (
            'policies = ["br-0", "least-kv"]',
            'policies = ["br-0"]',
            r"table\[2\].policies: differences need",
        ),
        (
            'policies = "three"',
            'policies = "four"',
            r"run\[1\].policies: unknown list 'four'; k",
        ),
        ("workers = [1, 3]", "workers = [3, 3]", r"run: 2 are called 'load-g3-0.5'"),
        ('name = "small"\nruns', 'name = "load"\nruns', r"table: 2 are called 'load'"),
        ('name = "load"\nscen', 'name = "a/b"\nscen', r"run\[1\].name: String should match pattern"),
    ],
)
def test_mistakes_in_the_file(old, new, message, folder):
    path = folder / "results.toml"
    path.write_text(FILE.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"results.toml: {message}"):
        load_experiments(path)


def test_an_unknown_name(folder):
    error = invoke(folder, "--only", "larg").exception
    assert str(error) == (
        "no table or run is called 'larg'; known are against, load, load-g1-0.5, load-g1-1.1, load-g3-0.5, "
        "load-g3-1.1, small, traced"
    )


def test_the_shipped_experiments():
    experiments = load_experiments(EXPERIMENTS)
    for run in experiments.runs:
        plan = run.plan(None)
        assert (plan is None) == bool(run.trace), run
        if plan is not None:
            assert plan.policies
            assert plan.scenario(1).cluster.workers == (run.workers or plan.scenario(1).cluster.workers)
    assert all(any(table.has(run.name) for table in experiments.tables) for run in experiments.runs)


def test_published_figures_are_of_as_many_requests_as_the_file_says():
    plan = plan_simulation(ROOT / "config" / "scenarios" / "proprietary.toml", *(None,) * 5)
    assert plan.with_requests(None) is plan
    fewer = plan.with_requests(3)
    assert plan.published
    assert not fewer.published
    assert len(fewer.scenario(1).draw()[0].requests) == 3 * 8


def policies_of(experiments, table):
    """Return the policies of a table's runs, in order."""
    plans = [run.plan(None) for run in experiments.runs if table.has(run.name)]
    return [*dict.fromkeys(policy for plan in plans if plan is not None for policy in plan.policies)]


def test_results_have_the_tables_that_would_be_written():
    experiments = load_experiments(EXPERIMENTS)
    places = marked((ROOT / "brproxy" / "RESULTS.md").read_text(encoding="utf-8"))
    assert sorted(places) == sorted(table.name for table in experiments.tables)
    for table in experiments.tables:
        if not places[table.name].strip():
            continue  # not run yet
        headings = results.header(table, policies_of(experiments, table), experiments.labels)
        assert places[table.name].startswith("\n" + markdown_table(headings, [])), table.name
        assert f"`loadgen results --only {table.name}`: " in places[table.name]


PICTURES = ROOT / "brproxy" / "pictures"


def test_the_shipped_picture_is_small_and_shown():
    assert [path.name for path in PICTURES.iterdir()] == ["why.png"]
    assert (PICTURES / "why.png").stat().st_size < 150_000
    assert "](brproxy/pictures/why.png)" in (ROOT / "README.md").read_text(encoding="utf-8")


PICTURE = """
[picture.loads]
scenario = "small.toml"
policies = ["join-shortest-queue", "least-kv", "br-0:aim=1", "br-0"]
workers = 4
[picture.prefill]
scenario = "prefilling.toml"
policies = ["br-0:prefill_wait_s_max=0", "br-0"]
workers = 3
requests_per_worker = 60
"""


@pytest.fixture
def pictured(folder):
    prefilling = SCENARIO + "prefill_us_per_token = 20\nprefill_tokens_max = 512\n"
    (folder / "prefilling.toml").write_text(prefilling, encoding="utf-8")
    (folder / "results.toml").write_text(FILE + PICTURE, encoding="utf-8")
    return folder


def test_the_picture_is_drawn(pictured):
    pytest.importorskip("matplotlib")
    for name in ("why.png", "why.svg"):
        result = invoke(pictured, "--picture", pictured / name)
        assert result.exit_code == 0, result.output
        assert (pictured / name).stat().st_size > 10_000
        assert not (pictured / "kept").exists()


def test_every_text_of_the_picture_can_be_read(pictured, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    shown = {}
    monkeypatch.setattr(pictures, "save", lambda plt, figure, path, dots: shown.update(figure=figure))
    assert invoke(pictured, "--picture", pictured / "why.svg").exit_code == 0
    figure = shown["figure"]
    figure.canvas.draw()
    assert figure.get_facecolor() == (1, 1, 1, 1), "a page may be dark"
    texts = [
        text
        for axes in figure.axes
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label)
        if text.get_text()
    ]
    texts += [part._suptitle for part in figure.subfigs]
    titles = [text.get_text() for text in texts]
    assert any(title.startswith("ours\n") and title.endswith("of perfect") for title in titles)
    assert sum("balanced" in title for title in titles) == 2
    boxes = [text.get_window_extent() for text in texts]
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, texts[i]
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, texts[i]
        assert not any(box.overlaps(other) for other in boxes[:i]), texts[i]
    pyplot.close(figure)


def test_a_file_without_a_picture(folder):
    error = invoke(folder, "--picture", folder / "why.png").exception
    assert str(error) == "--picture: the file of experiments has no [picture]"
