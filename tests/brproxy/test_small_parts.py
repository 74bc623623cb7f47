"""Clocks and registries."""

import pytest

from brproxy.clock import MonotonicClock, VirtualClock
from brproxy.registry import Registry, UnknownNameError
from brproxy.types import InvalidInputError


def test_virtual_time_only_goes_forward():
    clock = VirtualClock(5.0)
    clock.advance_to(7.5)
    assert clock.now_s() == 7.5
    with pytest.raises(InvalidInputError, match=r"cannot go back from 7.5 s to 7.0 s"):
        clock.advance_to(7.0)


def test_monotonic_time_goes_on():
    clock = MonotonicClock()
    assert clock.now_s() <= clock.now_s()


def test_registry():
    registry = Registry("colour", "brproxy.routing.policies")
    registry.register("red")(int)
    assert registry.get("red") is int
    assert registry.names() == ("red",)
    with pytest.raises(ValueError, match="colour 'red' is registered twice"):
        registry.register("red")(str)
    with pytest.raises(UnknownNameError, match="unknown colour 'blue'; allowed: red"):
        registry.get("blue")
