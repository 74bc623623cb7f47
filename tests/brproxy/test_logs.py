"""Messages that may come by the thousand: a line now and then, with the number of those left out."""

import logging
import time

from brproxy.logs import SparingLog


def test_a_line_now_and_then_that_says_how_many_were_left_out(caplog, monkeypatch):
    now_s = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    sparing = SparingLog(logging.getLogger("test"), interval_s=10.0)
    for now_s in (1000.0, 1001.0, 1009.9, 1010.0, 1020.0):
        sparing.warning("bad %s", now_s)
    assert [record.getMessage() for record in caplog.records] == [
        "bad 1000.0",
        "bad 1010.0 (and 2 more like this)",
        "bad 1020.0",
    ]


def test_a_traceback_goes_along(caplog):
    sparing = SparingLog(logging.getLogger("test"))
    sparing.log(logging.ERROR, "a bug", exc_info=ValueError("v"))
    assert caplog.records[0].levelno == logging.ERROR
    assert "ValueError: v" in caplog.text
