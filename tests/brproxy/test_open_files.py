"""How many files the process may have open, and requests with them."""

import resource

import pytest

from brproxy.open_files import raise_open_files_limit, requests_for_open_files


@pytest.fixture
def limit():
    """Return a function that sets this process's own limit; the hard one stays."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda files: resource.setrlimit(resource.RLIMIT_NOFILE, (files, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_is_raised_to_what_the_system_allows(limit):
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit(300)
    assert raise_open_files_limit() == hard
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    assert raise_open_files_limit() == hard, "a second time changes nothing"


def test_a_system_that_does_not_allow_it_is_no_reason_to_stop(limit, monkeypatch, caplog):
    limit(300)

    def refuse(*_):
        raise ValueError("not allowed to raise maximum limit")

    with monkeypatch.context() as patched:
        patched.setattr(resource, "setrlimit", refuse)
        assert raise_open_files_limit() == 300
    assert "the limit of 300 open files stays as it is: not allowed" in caplog.text


def test_no_more_requests_than_there_are_files_for(limit):
    limit(1256)
    assert requests_for_open_files() == 500
    limit(100)
    assert requests_for_open_files() == 1, "never none"
