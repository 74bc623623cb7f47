"""Reloads and a rolling replacement under running streams, in small; reloads.py is the same as a command."""

import pytest

from tests.brproxy.proxy.reloads import WORKERS, run


@pytest.mark.parametrize("seed", range(2))
async def test_no_stream_is_cut_and_no_request_fails(seed):
    figures = await run(40, 12, gap_s=0.02, pause_s=0.01, seed=seed)
    assert figures.wrong == []
    assert (figures.reloads, figures.replaced) == (40, WORKERS)
    assert figures.changes > 40
    assert figures.went_on, "else nothing was shown"
    assert figures.whole >= 12
