"""One of three workers dies, in processes of their own; kills.py is the command for many streams."""

import pytest

from tests.brproxy.proxy.kills import HOWS, Load, kills


@pytest.mark.parametrize("how", HOWS)
async def test_one_of_three_workers_dies(how):
    # No time counts, but that of checks: those of the others must not fail on a machine that is busy.
    case = await kills(how, Load(streams=30, requests=15), timeout_s=2.0, limit_s=120.0)
    assert not case.faults
    # Each part of the load was there: it is a test of something.
    assert case.on_victims(case.begun)
    assert case.on_victims(case.held)
