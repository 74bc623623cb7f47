"""The head of a request to a worker."""

import pytest

from brproxy.relay.fields import request_fields
from brproxy.relay.request import UPGRADE, body_length, origin_form, request_head
from brproxy.types import InvalidInputError


@pytest.mark.parametrize(
    ("target", "origin"),
    [
        ("/v1/models?a=%2F", "/v1/models?a=%2F"),
        ("*", "*"),
        ("http://proxy:80/v1/x?y", "/v1/x?y"),
        ("HTTPS://proxy/", "/"),
        ("http://proxy", "/"),
        ("http://proxy?x=/v1/y", "/?x=/v1/y"),
        ("http://proxy#/v1/y", "/"),
        ("http://proxy/a#/v1/y", "/a"),
    ],
)
def test_targets(target, origin):
    assert origin_form(target) == origin


@pytest.mark.parametrize("target", ["proxy:443", "ftp://proxy/x", "v1/models", ""])
def test_a_target_that_is_no_path_is_refused(target):
    with pytest.raises(InvalidInputError, match="is no path"):
        origin_form(target)


@pytest.mark.parametrize(
    ("method", "body", "line"),
    [
        ("POST", b"abc", b"Content-Length: 3\r\n"),
        ("GET", b"abc", b"Content-Length: 3\r\n"),
        ("POST", b"", b"Content-Length: 0\r\n"),
        ("PUT", None, b"Content-Length: 0\r\n"),
        ("GET", None, b""),
        ("DELETE", None, b""),
    ],
)
def test_what_frames_a_body(method, body, line):
    assert body_length(method, body) == line


def test_a_whole_head():
    head = request_head("POST", "/v1/x", b"worker:8001", b"A: b\r\nContent-Length: 0\r\n")
    assert head == b"POST /v1/x HTTP/1.1\r\nHost: worker:8001\r\nA: b\r\nContent-Length: 0\r\n\r\n"


def test_an_upgrade_is_asked_for_again():
    fields = request_fields(((b"Connection", b"keep-alive, Upgrade"), (b"Upgrade", b"websocket")))
    assert fields.lines == b""
    assert fields.known[b"upgrade"] == b"websocket"
    assert UPGRADE == b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
