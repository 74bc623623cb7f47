"""Whose fault it is that no connection could be opened: the worker's, or a shortage of this machine's."""

import errno
import os
import resource
import socket
import ssl

import pytest

from brproxy.relay.endpoint import connect_failure
from brproxy.relay.errors import ShortageError

BOTH_LOOPS = True

OURS = {"EMFILE", "ENFILE", "ENOBUFS", "ENOMEM", "EADDRNOTAVAIL"}


@pytest.mark.parametrize("name", sorted(errno.errorcode.values()))
async def test_every_error_of_the_system_is_ours_or_theirs(name):
    number = getattr(errno, name)
    failure = connect_failure("http://w:1", OSError(number, "in the loop's own words"))
    assert isinstance(failure, ShortageError) == (name in OURS)
    assert failure.unreachable == (name not in OURS)
    assert str(failure) == f"cannot connect to http://w:1: {os.strerror(number)}"


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), False),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), False),
        (socket.gaierror(socket.EAI_MEMORY, "Memory allocation failure"), True),
        (socket.gaierror(socket.EAI_SYSTEM, "System error"), True),
        (ssl.SSLError(errno.EMFILE, "a number of TLS's own"), False),
        (OSError("Multiple exceptions: [Errno 111] refused, [Errno 99] no address"), False),
    ],
)
async def test_names_and_tls_have_numbers_of_their_own(error, ours):
    failure = connect_failure("http://w:1", error)
    assert isinstance(failure, ShortageError) == ours
    assert failure.unreachable != ours
    assert "\n" not in str(failure)


async def test_a_name_that_cannot_be_looked_up_without_files_says_nothing_about_a_worker(stack):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
    with socket.socket() as sock:
        next_file = sock.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (next_file, hard))
    error = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    assert isinstance(connect_failure("http://w:1", error), ShortageError)
