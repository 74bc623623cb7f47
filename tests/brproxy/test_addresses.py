"""Names that stand for several workers: who those are, and what becomes of them as addresses come and go."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.addresses import at_each, expanded, followed
from brproxy.config import parse_config
from brproxy.config_workers import Worker
from brproxy.validation import ConfigError

ADDRESSES = [f"10.0.0.{n}" for n in range(5)]
POOLS = st.lists(st.sampled_from(ADDRESSES), unique=True, max_size=5).map(sorted)


def pods(**keys):
    return Worker(url="http://pods:8000", name="p", addresses="each", **keys)


def test_each_address_is_a_worker_like_the_one_of_the_name():
    one, two = at_each(pods(slots=7, ranks="0-1"), ["10.0.0.1", "fd00::2"])
    assert (one.url, one.label, one.addresses) == ("http://10.0.0.1:8000", "p@10.0.0.1", "any")
    assert (two.url, two.slots) == ("http://[fd00::2]:8000", 7)
    assert [seat.key for seat in two.seats] == ["p@fd00::2/0", "p@fd00::2/1"]
    assert "slots" in two.model_fields_set
    assert "kv_capacity_tokens" not in two.model_fields_set, "what the file leaves out is still known"


def test_paths_and_ports_stay():
    worker = Worker(url="http://pods/base", addresses="each")
    assert [each.url for each in at_each(worker, ["10.0.0.1"])] == ["http://10.0.0.1:80/base"]


@pytest.mark.parametrize("worker", [pods(), Worker(url="http://pods:8000", name="p")])
def test_who_is_one_or_has_no_address_yet_is_itself(worker):
    addresses = [] if worker.addresses == "each" else ["10.0.0.1"]
    assert at_each(worker, addresses) == [worker]


def test_names_are_replaced_where_they_stand():
    first, last = Worker(url="http://a:1"), Worker(url="http://b:1")
    found = expanded([first, pods(), last], {"http://pods:8000": ["10.0.0.1", "10.0.0.2"]})
    assert [each.label for each in found] == ["a:1", "p@10.0.0.1", "p@10.0.0.2", "b:1"]


@given(st.lists(POOLS, min_size=1, max_size=6))
def test_whoever_has_an_address_is_there_and_no_other(pools):
    other = Worker(url="http://a:1")
    before, running = [], [other, pods()]
    for pool in pools:
        # None at all is not told: that a name has no address changes nothing.
        now = pool or before
        running = followed(running, pods(), before, now)
        before = now
        assert running[0] is other
        assert sorted(each.label for each in running[1:]) == ([f"p@{address}" for address in now] or ["p"])


def test_who_was_removed_by_hand_stays_away_as_long_as_its_address_is_there():
    one, two = at_each(pods(), ADDRESSES[:2])
    running = followed([two], pods(), ADDRESSES[:2], ADDRESSES[:3])
    assert [each.label for each in running] == [two.label, "p@10.0.0.2"]
    running = followed(running, pods(), ADDRESSES[:3], ADDRESSES[1:3])
    assert one.label in {each.label for each in followed(running, pods(), ADDRESSES[1:3], ADDRESSES[:3])}


def test_a_certificate_is_of_the_name():
    with pytest.raises(ConfigError, match=r'worker\[0\].addresses: must be "any" with an https url'):
        parse_config({"worker": [{"url": "https://pods:8000", "addresses": "each"}]}, "x")
