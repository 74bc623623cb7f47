"""A view whose arrays do not belong together is refused."""

import numpy as np
import pytest

from brproxy.routing.view import ClusterView, RoundState
from brproxy.types import InvalidInputError

ARRAYS = {
    name: np.zeros(2, dtype=np.int64)
    for name in ("kv_tokens", "requests", "slots", "slots_free", "kv_capacity", "kv_free")
} | {
    "prompt_tokens": np.zeros(3, dtype=np.int64),
    "passed_over": np.zeros(3, dtype=np.int64),
    "forecast": np.zeros((2, 1)),
}


def test_shapes_that_belong_together():
    view = ClusterView(**ARRAYS)
    assert (view.workers, view.waiting) == (2, 3)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("requests", np.zeros(3, dtype=np.int64), r"must have shape \(2,\)"),
        ("kv_free", np.zeros(1, dtype=np.int64), r"must have shape \(2,\)"),
        ("slots_free", np.zeros((2, 1), dtype=np.int64), r"must have shape \(2,\)"),
        ("passed_over", np.zeros(2, dtype=np.int64), "must have the same shape"),
        ("waited", np.zeros(2), "waited and prompt_tokens must have the same shape"),
        ("forecast", np.zeros((3, 1)), r"forecast must have shape \(2, H\+1\), got \(3, 1\)"),
        ("forecast", np.zeros((2, 0)), "forecast must have shape"),
        ("kv_tokens", np.zeros(0, dtype=np.int64), "at least one worker"),
    ],
)
def test_shapes_that_do_not(name, array, message):
    with pytest.raises(InvalidInputError, match=message):
        ClusterView(**(ARRAYS | {name: array}))


def test_a_state_of_a_view_gives_the_view_again():
    view = ClusterView.of(
        RoundState([5, 6], [1, 2], [4, 4], [3, 0], [100, 90], [95, 84], [5, 0]), [7, 8, 9], [0, 1, 0]
    )
    again = ClusterView.of(RoundState.of(view), view.prompt_tokens, view.passed_over)
    for name in ARRAYS:
        assert (getattr(view, name) == getattr(again, name)).all()
    assert view.forecast.tolist() == [[5.0], [6.0]]
    assert view.prompt_tokens.tolist() == [7, 8, 9]
