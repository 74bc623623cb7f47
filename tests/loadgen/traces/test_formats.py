"""Trace files: told by their content, read to the last digit, refused in one line."""

import json

import pytest

from loadgen.traces.trace_format import TraceError, load_trace

AZURE_2023 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    "2023-11-16 18:15:46.6805900,374,44\r\n"
    "2023-11-16 18:15:50.9951690,396,109\r\n"
    "2023-11-16 18:15:51.2224670,0,55\r\n"
)
AZURE_2024 = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n"
    "2024-05-12 00:00:01+00:00,10,5\n"
    "2024-05-12 00:00:00.001163+00:00,20,6\n"
)
MOONCAKE = "\n".join(
    json.dumps({"timestamp": t, "input_length": i, "output_length": o, "hash_ids": h})
    for t, i, o, h in (
        (0, 6758, 500, [1, 2]),
        (3000, 100, 20, [9]),
        (3500, 6758, 7, [1, 2]),
        (4000, 5, 5, []),
    )
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n"
    "45.5,GPT-4,1087,0,1087,API log\n"
    "118,ChatGPT,417,276,693,Conversation log\n"
)
SHAREGPT = json.dumps(
    [
        {
            "id": "a",
            "conversations": [{"from": "human", "value": "x" * 40}, {"from": "gpt", "value": "y" * 9}],
        },
        {"id": "b", "conversations": [{"from": "human", "value": "only a question"}]},
    ]
)


@pytest.fixture
def load(tmp_path):
    def write_and_load(text, limit=None, name="trace.dat"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_trace(path, limit)

    return write_and_load


@pytest.mark.parametrize(
    ("text", "expected_format", "rows", "skipped"),
    [
        (AZURE_2023, "azure", [(0.0, 374, 44), (4.314579, 396, 109)], 1),
        (AZURE_2024, "azure", [(0.0, 20, 6), (0.998837, 10, 5)], 0),
        (MOONCAKE, "mooncake", [(0.0, 6758, 500), (3.0, 100, 20), (3.5, 6758, 7), (4.0, 5, 5)], 0),
        (BURSTGPT, "burstgpt", [(0.0, 472, 18), (113.0, 417, 276)], 1),
        (SHAREGPT, "sharegpt", [(0.0, 10, 3)], 1),
    ],
)
def test_formats(load, text, expected_format, rows, skipped):
    trace = load(text)
    assert (trace.format, trace.rows_skipped) == (expected_format, skipped)
    assert trace.has_times == (expected_format != "sharegpt")
    requests = trace.workload.requests
    assert [(r.prompt_tokens, r.output_tokens) for r in requests] == [row[1:] for row in rows]
    assert [r.arrival_s for r in requests] == pytest.approx([row[0] for row in rows], abs=1e-6)


def test_equal_blocks_are_the_same_prompt(load):
    keys = [request.prompt_key for request in load(MOONCAKE).workload.requests]
    assert keys[0] == keys[2] != keys[1]
    assert keys[3] is None


def test_a_byte_order_mark_and_blank_lines_do_not_matter(load):
    assert len(load(b"\xef\xbb\xbf" + AZURE_2024.encode() + b"\n\n").workload.requests) == 2
    assert len(load(MOONCAKE.replace("\n", "\n\n")).workload.requests) == 4


def test_only_the_first_so_many(load):
    assert len(load(MOONCAKE, limit=2).workload.requests) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "trace.dat: is empty; a trace needs at least one request"),
        (
            "hello\n",
            "trace.dat:1: not a trace in a known format; known are azure, burstgpt, mooncake, sharegpt",
        ),
        (b"\xff\xfe\x00", "trace.dat: must be UTF-8 text"),
        (
            AZURE_2023.split("\r\n", maxsplit=1)[0] + "\n",
            "has no request with a prompt and an output; 0 rows",
        ),
        (AZURE_2024 + "yesterday,1,2\n", "trace.dat:4: TIMESTAMP must be a date and time, got 'yesterday'"),
        (AZURE_2024 + "2024-05-12 00:00:01+00:00,1\n", "trace.dat:4: must have 3 columns, has 2"),
        (AZURE_2024 + "2024-05-12 00:00:01+00:00,x,2\n", "trace.dat:4: ContextTokens must be a whole number"),
        (
            AZURE_2024 + "2024-05-12 00:00:01+00:00,1,-2\n",
            "trace.dat:4: GeneratedTokens must be a whole number",
        ),
        (BURSTGPT + "soon,ChatGPT,1,1,2,API log\n", "trace.dat:5: Timestamp must be a number of seconds"),
        (BURSTGPT + "9,ChatGPT\n", "trace.dat:5: must have the columns"),
        (
            MOONCAKE + '\n{"timestamp": 1}',
            "trace.dat:5: must be a JSON object with input_length, output_length",
        ),
        (MOONCAKE + "\n{broken", "trace.dat:5: must be a JSON object: "),
        (MOONCAKE + MOONCAKE.split("\n")[0].replace("0", '"x"', 1), "trace.dat:4: must be a JSON object: "),
        (SHAREGPT[:-1], "trace.dat:1: must be a JSON list"),
        ('[{"conversations": 5}]', "trace.dat:1: conversation 1 must have turns with a value"),
    ],
)
def test_messages(load, text, words):
    with pytest.raises(TraceError) as caught:
        load(text)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(TraceError, match=r"none.csv: cannot be read: No such file or directory"):
        load_trace(tmp_path / "none.csv")
