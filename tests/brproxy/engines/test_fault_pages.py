"""What a server of vLLM says of a fault, read from what it sends."""

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines.fault_pages import RETRY, Report, Standing, read_instruction_id, read_status

WAITS = {"id": 1, "status": "unhealthy", "fault_info": "RuntimeError"}


def page(*engines):
    return orjson.dumps({"schema_version": 1, "total_engines": len(engines), "engines": engines})


@pytest.mark.parametrize(
    ("engines", "report"),
    [
        ([{"id": 0, "status": "healthy"}], Report(Standing.HEALTHY)),
        ([WAITS], Report(Standing.UNHEALTHY, "RuntimeError")),
        ([{"id": 2, "status": "dead"}], Report(Standing.DEAD)),
        (
            [WAITS | {"last_ft_request_id": "a1", "ft_error": "timed\n out"}],
            Report(Standing.UNHEALTHY, "RuntimeError; timed out", "a1"),
        ),
        ([{"id": 0, "status": "healthy"}, WAITS], Report(Standing.UNHEALTHY, "RuntimeError")),
        ([WAITS, {"id": 0, "status": "dead"}], Report(Standing.DEAD)),
    ],
)
def test_a_page_is_read(engines, report):
    assert read_status(page(*engines)) == report


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"engines": {}}',
        page(),
        page(7),
        page({"id": 0}),
        page({"status": "paused"}),
        page({"status": ["dead"]}),
        page(WAITS, {"status": "paused"}),
        page(*[WAITS] * 1025),
    ],
)
def test_what_is_no_such_page_says_nothing(body):
    assert read_status(body) is None


@given(st.binary() | st.text().map(lambda text: page(WAITS | {"fault_info": text, "ft_error": text})))
def test_it_never_raises_and_what_it_says_is_one_short_line(body):
    report = read_status(body)
    assert report is None or (len(report.reason) <= 402 and len(report.reason.splitlines()) <= 1)
    assert len(read_instruction_id(body)) <= 200


def test_an_instruction_is_json_and_its_id_is_read():
    assert orjson.loads(RETRY) == {"instruction": "retry", "params": {}}
    assert read_instruction_id(b'{"message": "accepted", "request_id": "a1"}') == "a1"
    assert read_instruction_id(b'{"request_id": 7}') == ""
