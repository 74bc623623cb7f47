"""What was learnt survives a restart; a bad file does no harm."""

import logging

import pytest

from brproxy.prediction.predictor import make_predictor
from brproxy.state_file import load_state, save_state
from brproxy.types import PendingRequest


def learnt(*lengths):
    predictor = make_predictor("survival")
    for length in lengths:
        predictor.observe(PendingRequest(1), length)
    return predictor


def test_a_round_trip(tmp_path):
    path = tmp_path / "state.json"
    save_state(path, {"a": learnt(10, 20), "b": learnt(99)}, "survival")
    restored = {"a": learnt(), "c": learnt()}
    load_state(path, restored, "survival")
    assert restored["a"].mean_output_tokens == 15
    assert restored["c"].mean_output_tokens == 512, "a group that the file does not know"
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_a_file_from_before_outputs_that_were_cut_is_read(tmp_path):
    path = tmp_path / "state.json"
    path.write_bytes(b'{"format":1,"predictor":"survival","groups":{"a":{"lengths":[10,20,0]}}}')
    predictor = learnt()
    load_state(path, {"a": predictor}, "survival")
    assert predictor.mean_output_tokens == 10
    predictor.observe(PendingRequest(1), 7, ended=False)
    save_state(path, {"a": predictor}, "survival")
    again = learnt()
    load_state(path, {"a": again}, "survival")
    assert again.state() == predictor.state() == {"lengths": [10, 20, 0, -8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"format":99,"predictor":"survival","groups":{}}',
        b'{"format":1,"predictor":"exact-match","groups":{}}',
        b'{"format":1,"predictor":"survival","groups":{"a":{"lengths":"x"}}}',
        b'{"format":1,"predictor":"survival","groups":{"a":5}}',
    ],
)
def test_a_file_that_does_not_fit_is_ignored_with_a_warning(content, tmp_path, caplog):
    path = tmp_path / "state.json"
    path.write_bytes(content)
    predictor = learnt()
    with caplog.at_level(logging.WARNING):
        load_state(path, {"a": predictor}, "survival")
    assert "ignored, predictors start anew" in caplog.text
    assert predictor.mean_output_tokens == 512


def test_no_file_is_no_warning(tmp_path, caplog):
    load_state(tmp_path / "none.json", {"a": learnt()}, "survival")
    assert not caplog.text


def test_a_place_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    save_state(tmp_path / "no" / "state.json", {"a": learnt(1)}, "survival")
    assert "cannot be kept: No such file or directory" in caplog.text
