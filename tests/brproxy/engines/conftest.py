"""What tests of the engines share."""

import sys

import pytest


@pytest.fixture
def steps_of():
    """Return a function that counts the lines of Python that a call runs: its work, on any machine."""

    def count(call):
        steps = 0

        def trace(frame, event, arg):
            nonlocal steps
            steps += event == "line"
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            call()
        finally:
            sys.settrace(before)
        return steps

    return count
