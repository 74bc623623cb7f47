"""A few thousand random responses; see fuzz.py for the command that runs a million."""

import pytest

from tests.brproxy.relay.fuzz import fuzz


@pytest.mark.parametrize("seed", [0, 1_000_000])
async def test_every_response_arrives_as_it_was_sent(seed):
    await fuzz(1500, seed)
