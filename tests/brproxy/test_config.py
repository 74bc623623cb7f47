"""The configuration: what is taken, what is refused, and in which words."""

import tomllib
from pathlib import Path

import pytest

from brproxy.config import load_config, parse_config
from brproxy.config_reference import reference_rows, reference_table
from brproxy.validation import ConfigError

CONFIG_FOLDER = Path(__file__).parents[2] / "config"
WORKER = '[[worker]]\nurl = "http://127.0.0.1:8001"\n'


def parse(text):
    return parse_config(tomllib.loads(text), "x.toml")


def message(text):
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*.toml")), ids=lambda path: path.name)
def test_every_shipped_file_loads(path):
    assert load_config(path).worker


def test_the_shipped_file_names_every_key_with_its_default():
    text = (CONFIG_FOLDER / "brproxy.toml").read_text(encoding="utf-8")
    document = tomllib.loads(text)
    for key, default, _ in reference_rows():
        if key.startswith("[[worker]] ") or default == "not set":
            assert f"{key.removeprefix('[[worker]] ').rpartition('.')[2]} = " in text
            continue
        value = document
        for step in key.split("."):
            value = value[step]
        assert tomllib.loads(f"x = {default}")["x"] == value, key


def test_the_readme_has_the_reference():
    readme = (CONFIG_FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert reference_table() in readme, "run `brproxy reference` and put its output into README.md"


def test_a_minimal_file():
    config = parse(WORKER)
    assert config.routing.policy == "br-0"
    assert config.worker[0].label == "127.0.0.1:8001"
    assert config.worker[0].models == frozenset()
    assert list(config.groups) == ["default"]


def test_groups_and_models():
    config = parse(
        WORKER + 'model = "a"\ngroup = "one"\n'
        '[[worker]]\nurl = "http://h:2/"\nmodel = ["b", "c"]\ngroup = "two"\nname = "dp-2"\n'
    )
    assert {name: [w.label for w in workers] for name, workers in config.groups.items()} == {
        "one": ["127.0.0.1:8001"],
        "two": ["dp-2"],
    }
    assert config.worker[1].models == {"b", "c"}
    assert config.worker[1].url == "http://h:2"


def test_each_policy_has_its_own_table():
    config = parse(
        WORKER + '[routing]\npolicy = "br-h"\n[routing.br-h]\ngamma = 0.5\n[routing.br-0]\nwindow = 7\n'
    )
    assert config.policy_params().gamma == 0.5
    assert config.policy_params().horizon_steps is None
    assert config.predictor_params().window == 2000


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "x.toml: worker: is missing; it must be given"),
        ("worker = 3", "x.toml: worker: must be a list, got 3"),
        ("worker = []", "x.toml: worker: List should have at least 1 item after validation, not 0"),
        (WORKER + "slots = 0", "x.toml: worker[0].slots: must be at least 1, got 0"),
        (WORKER + 'slots = "4"', "x.toml: worker[0].slots: must be an integer, got '4'"),
        (WORKER + "slotz = 4", "x.toml: worker[0].slotz: unknown key; did you mean 'slots'?"),
        (WORKER + "model = 3", "x.toml: worker[0].model: must be a string or a list of strings, got 3"),
        (WORKER + WORKER, "x.toml: worker[0], worker[1]: the same url 'http://127.0.0.1:8001'; each"),
        (
            WORKER + '[routing]\npolicy = "br0"',
            "x.toml: routing.policy: unknown policy 'br0'; allowed: br-0, br-h,",
        ),
        (
            WORKER + 'engine = "tgi"',
            "x.toml: worker[0].engine: unknown engine 'tgi'; allowed: openai, sglang, vllm",
        ),
        (WORKER + "[routing.br-0]\nwindow = 0", "x.toml: routing.br-0.window: must be at least 1, got 0"),
        (
            WORKER + "[routing.br-0]\nwindw = 0",
            "x.toml: routing.br-0.windw: unknown key; did you mean 'window'?",
        ),
        (WORKER + "[routng]\npolicy = 1", "x.toml: routng: unknown key; did you mean 'routing'?"),
        (
            WORKER + '[log]\nlevel = "loud"',
            "x.toml: log.level: must be 'debug', 'info', 'warning' or 'error', got",
        ),
        (WORKER + "[timeouts]\nstall_s = 0", "x.toml: timeouts.stall_s: must be greater than 0, got 0"),
        ("listen = 4\n" + WORKER, "x.toml: listen: must be a table, got 4"),
        ('[[worker]]\nurl = "127.0.0.1:8001"', 'x.toml: worker[0].url: must be like "http://host:port"'),
        ('[[worker]]\nurl = "http://h:99999"', 'x.toml: worker[0].url: must be like "http://host:port"'),
        (
            '[[worker]]\nurl = "http://h:1/v1"',
            'x.toml: worker[0].url: must be only "http://host:port", without path',
        ),
        (
            WORKER + 'name="a"\n[[worker]]\nurl="http://h:1"\nname="a"',
            "x.toml: worker[0], worker[1]: the same name 'a'",
        ),
        (
            WORKER + '[[worker]]\nurl="http://h:1"\nmodel="m"',
            "x.toml: worker[1]: group 'default' has workers with",
        ),
    ],
)
def test_messages(text, expected):
    assert message(text).startswith(expected)


def test_several_mistakes_are_counted():
    assert message(WORKER + "slots = 0\nmodel = 3\nkv_capacity_tokens = 0\n").endswith("(and 3 more)")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"none.toml: cannot be read: No such file"):
        load_config(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[listen\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken.toml: not valid TOML: .*line 1"):
        load_config(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"broken.toml: must be UTF-8 text: byte 0 is not"):
        load_config(broken)
