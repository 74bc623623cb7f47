"""The configuration: what is taken, what is refused, and in which words."""

import tomllib
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.config import load_config, parse_config
from brproxy.config_reference import reference_rows, reference_table
from brproxy.validation import MISTAKES_SHOWN_MAX, ConfigError

CONFIG_FOLDER = Path(__file__).parents[2] / "config"
WORKER = '[[worker]]\nurl = "http://127.0.0.1:8001"\n'


def parse(text):
    return parse_config(tomllib.loads(text), "x.toml")


def messages(document):
    with pytest.raises(ConfigError) as caught:
        parse_config(document, "x.toml")
    return str(caught.value).split("\n")


def message(text):
    (line,) = messages(tomllib.loads(text))
    return line


EXPERIMENTS = CONFIG_FOLDER / "results.toml"
"""Of ``loadgen results``, and no configuration of a proxy."""


@pytest.mark.parametrize(
    "path", sorted({*CONFIG_FOLDER.glob("*.toml")} - {EXPERIMENTS}), ids=lambda path: path.name
)
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


def test_ranks_behind_one_url_are_members_each():
    config = parse(
        WORKER + 'name = "a"\nranks = "8-9,11"\nrank_base = 8\n'
        '[[worker]]\nurl = "http://h:2"\nranks = "2,1"\nrank_mode = "global"\n'
        '[[worker]]\nurl = "http://h:3"\n'
    )
    assert [[(s.key, s.rank, s.lines) for s in worker.seats] for worker in config.worker] == [
        [
            ("a/8", 8, b"X-data-parallel-rank: 0\r\n"),
            ("a/9", 9, b"X-data-parallel-rank: 1\r\n"),
            ("a/11", 11, b"X-data-parallel-rank: 3\r\n"),
        ],
        [
            ("h:2/1", 1, b"X-data-parallel-rank: 1\r\n"),
            ("h:2/2", 2, b"X-data-parallel-rank: 2\r\n"),
        ],
        [("h:3", None, b"")],
    ]
    assert config.group_sizes == {"default": 6}


def test_ranks_count_as_workers():
    workers = [{"url": f"http://h:{i + 1}", "ranks": "0-1023"} for i in range(5)]
    assert messages({"worker": workers}) == [
        "x.toml: worker: must be 4096 workers at most, each rank counted, got 5120"
    ]
    assert parse_config({"worker": workers[:4]}, "x.toml").group_sizes == {"default": 4096}


def test_each_policy_has_its_own_table():
    config = parse(
        WORKER + '[routing]\npolicy = "br-h"\n[routing.br-h]\ngamma = 0.5\n[routing.br-0]\nwindow = 7\n'
    )
    assert config.policy_params("br-h").gamma == 0.5
    assert config.policy_params("br-h").horizon_steps is None
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
        (WORKER + 'model = ["a", 3]', "x.toml: worker[0].model[1]: must be a string, got 3"),
        (WORKER + 'slots = "' + "4" * 999 + '"', "x.toml: worker[0].slots: must be an integer, got '444444"),
        (WORKER + '"a\\n\\u2028b" = 4', 'x.toml: worker[0]."a\\n\\u2028b": unknown key; allowed: url,'),
        (WORKER + "str = 4", "x.toml: worker[0].str: unknown key; allowed: url, name"),
        (WORKER + "model = 3", "x.toml: worker[0].model: must be a string or a list of strings, got 3"),
        (
            WORKER + '[listen]\ntls_key_file = "k"',
            "x.toml: listen.tls_key_file: needs tls_certificate_file, which is not given, got 'k'",
        ),
        (
            WORKER + "[timeouts]\nkeepalive_comments_s = 0.001",
            "x.toml: timeouts.keepalive_comments_s: must be 0 or at least 0.02, got 0.001",
        ),
        (WORKER + "[listen]\nhost = []", "x.toml: listen.host: must have 1 to 64 addresses, not 0"),
        (WORKER + "[listen]\nhost = 3", "x.toml: listen.host: must be a string or a list of strings, got 3"),
        (WORKER + '[listen]\nhost = ["a", 3]', "x.toml: listen.host[1]: must be a string, got 3"),
        (WORKER + WORKER, "x.toml: worker[1].url: 'http://127.0.0.1:8001' is worker[0]'s already; each"),
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
            'x.toml: worker[0].url: must not end in "/v1", with which',
        ),
        (
            WORKER + 'name="a"\n[[worker]]\nurl="http://h:1"\nname="a"',
            "x.toml: worker[1].name: 'a' is worker[0]'s already; each",
        ),
        (WORKER + 'ranks = "0-"', "x.toml: worker[0].ranks: must be numbers and ranges like"),
        (WORKER + "ranks = 8", "x.toml: worker[0].ranks: must be a string, got 8"),
        (WORKER + 'rank_mode = "global"', "x.toml: worker[0].rank_mode: needs ranks, which are not given"),
        (WORKER + "rank_base = 8", "x.toml: worker[0].rank_base: needs ranks, which are not given"),
        (
            WORKER + 'ranks = "8-15"\nrank_base = 9',
            "x.toml: worker[0].rank_base: must be at most the least of the ranks, 8, got 9",
        ),
        (
            WORKER + 'ranks = "8-15"\nrank_base = 8\nrank_mode = "global"',
            'x.toml: worker[0].rank_base: must be 0 with rank_mode "global", which sends ranks as',
        ),
        (
            WORKER + 'ranks = "0-1"\nname = "a"\n[[worker]]\nurl="http://h:1"\nname="a/1"',
            "x.toml: worker[1].name: 'a/1' is worker[0]'s already; each",
        ),
        (
            WORKER + 'ranks = "0-1"\n' + WORKER + 'ranks = "2-3"',
            "x.toml: worker[1].url: 'http://127.0.0.1:8001' is worker[0]'s already; each",
        ),
        (
            WORKER + '[[worker]]\nurl="http://h:1"\nmodel="m"',
            "x.toml: worker[1]: group 'default' has workers with",
        ),
    ],
)
def test_messages(text, expected):
    assert message(text).startswith(expected)


def test_workers_that_disagree_are_all_told_beside_other_mistakes():
    workers = [
        {"url": "http://a:1", "name": "x"},
        {"url": "http://a:1"},
        {"url": "https://a:1"},
        {"url": "http://b:1", "name": "x", "engine": "sglang"},
        {"url": "http://b:2", "model": "m"},
    ]
    lines = messages({"worker": workers, "log": {"level": "loud"}})
    assert [line.removeprefix("x.toml: ").partition(": ")[0] for line in lines] == [
        "worker[1].url",
        "worker[2].name",
        "worker[3].name",
        "worker[3]",
        "worker[4]",
        "log.level",
    ]
    assert "worker[1]'s already" in lines[1], "without a name it is host and port"


def test_each_mistake_in_a_list_has_a_line():
    lines = messages(tomllib.loads(WORKER + '[listen]\ncors_origins = ["https://a/b", "*", "c"]'))
    assert [line.partition(": must")[0] for line in lines] == [
        "x.toml: listen.cors_origins[0]",
        "x.toml: listen.cors_origins[2]",
    ]


def test_mistakes_beyond_the_most_that_are_told_are_counted():
    workers = [{"url": f"http://h:{i + 1}", "slots": 0} for i in range(MISTAKES_SHOWN_MAX + 2)]
    *lines, last = messages({"worker": workers})
    assert len(lines) == MISTAKES_SHOWN_MAX
    assert last == "x.toml: and 2 more mistakes"


# Every key of the reference, as a path from the document with two workers in it; not headers: they are free.
KEYS = [
    keys
    for key, _, _ in reference_rows()
    if key != "[[worker]] headers"
    for keys in (
        [("worker", 0, key.split()[1]), ("worker", 1, key.split()[1])]
        if key.startswith("[[worker]]")
        else [tuple(key.split("."))]
    )
]


@given(
    wrong=st.dictionaries(
        st.sampled_from(KEYS), st.sampled_from([{}, {"a": 1}, date(2026, 1, 1), -1]), max_size=20
    ),
    unknown=st.lists(
        st.tuples(
            st.sampled_from(KEYS).map(lambda keys: keys[:-1]), st.from_regex(r"[a-z]{1,9}_", fullmatch=True)
        ),
        max_size=20,
        unique=True,
    ),
)
def test_every_mistake_is_told_in_a_line_of_its_own(wrong, unknown):
    document = {"worker": [{"url": f"http://h:{port}"} for port in (1, 2)]}
    mistakes = wrong | {(*keys, key): 1 for keys, key in unknown}
    for keys, value in mistakes.items():
        table = document
        for key in keys[:-1]:
            table = table[key] if isinstance(key, int) else table.setdefault(key, {})
        table[keys[-1]] = value
    expected = [".".join(map(str, keys)).replace(".0.", "[0].").replace(".1.", "[1].") for keys in mistakes]
    lines = messages(document) if mistakes else []
    assert all(line.startswith("x.toml: ") for line in lines)
    assert sorted(line.split(": ")[1] for line in lines) == sorted(expected)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"none.toml: cannot be read: No such file"):
        load_config(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[listen\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken.toml: not valid TOML: .*line 1"):
        load_config(broken)
    broken.write_text("x = " + "1" * 5000, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken.toml: not valid TOML: Exceeds the limit .*digits"):
        load_config(broken)
    broken.write_text("x = " + "[" * 5000, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"broken.toml: not valid TOML: maximum recursion depth"):
        load_config(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"broken.toml: must be UTF-8 text: byte 0 is not"):
        load_config(broken)


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("vllm-external-lb", {f"dp-{rank}": None for rank in range(4)}),
        ("vllm-multi-port", {f"dp-{rank}": None for rank in range(4)}),
        ("vllm-hybrid-lb", {f"node-{rank // 8}/{rank}": rank % 8 for rank in range(16)}),
        ("vllm-internal-lb", {f"dp/{rank}": rank for rank in range(16)}),
        ("sglang-dp-attention", {f"sglang/{rank}": rank for rank in range(8)}),
    ],
)
def test_the_worked_examples_address_each_rank_as_its_server_counts(name, numbers):
    config = load_config(CONFIG_FOLDER / f"{name}.toml")
    lines = {seat.key: seat.lines for worker in config.worker for seat in worker.seats}
    assert lines == {
        key: b"" if number is None else b"X-data-parallel-rank: %d\r\n" % number
        for key, number in numbers.items()
    }
    assert list(config.group_sizes) == ["default"], "ranks of one deployment wait for each other"


HEADER = "must be a header field: a name of letters, digits and -, and a value in one line"


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("X A", "secret", HEADER),
        ("X", "secret\r\nY: z", HEADER),
        ("X", "", HEADER),
        ("X", "secret" * 2000, "must have 8192 bytes at most, got 12000"),
        ("transfer-encoding", "secret", "must not be given here: the proxy itself says that to workers"),
        ("Host", "secret", "must not be given here: the proxy itself says that to workers"),
        ("X-DATA-parallel-rank", "7", "must not be given here: the proxy itself says that to workers"),
    ],
)
def test_headers_that_no_worker_gets_are_named_without_their_value(name, value, told):
    (line,) = messages({"worker": [{"url": "http://h:1", "headers": {name: value}}]})
    shown = name if name.isalnum() or "-" in name else f'"{name}"'
    assert line == f"x.toml: worker[0].headers.{shown}: {told}"


def test_headers_of_a_worker():
    config = parse(WORKER + 'headers = { Authorization = "Bearer k", x-b = "ü" }')
    assert config.worker[0].fields == ((b"Authorization", b"Bearer k"), (b"x-b", b"\xc3\xbc"))
    assert messages(tomllib.loads(WORKER + 'headers = { a = "1", A = "2" }')) == [
        "x.toml: worker[0].headers.A: is given twice, in other letters"
    ]
    many = {"worker": [{"url": "http://h:1", "headers": {f"x-{i}": "y" for i in range(33)}}]}
    assert "at most 32 items" in messages(many)[0]


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ('client_key_file = "k"', "client_key_file: needs client_certificate_file, which is not given"),
        ('ca_file = "none.pem"', "ca_file: 'none.pem' cannot be used: No such file or directory"),
        (
            'client_certificate_file = "none.pem"',
            "client_certificate_file: 'none.pem' or its key cannot be used: No such file or directory",
        ),
    ],
)
def test_tls_files_that_cannot_be_used_are_named_when_the_file_is_read(keys, told):
    text = '[[worker]]\nurl = "https://h:1"\n'
    assert message(text + keys) == "x.toml: worker[0]." + told
    plain = message(WORKER + keys)
    assert plain.endswith(("which is not given", 'needs a url like "https://host"'))


def test_a_file_that_holds_no_certificate_is_one_line_for_each_worker(tmp_path):
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    workers = [{"url": f"https://h:{i + 1}", "ca_file": str(empty)} for i in range(2)]
    lines = messages({"worker": workers})
    assert [line.partition("' cannot be used: ")[0] for line in lines] == [
        f"x.toml: worker[{i}].ca_file: '{empty}" for i in range(2)
    ]
    assert messages({"worker": [workers[0], workers[1] | {"url": "http://h:2"}]})[1] == (
        'x.toml: worker[1].ca_file: needs a url like "https://host"'
    )
