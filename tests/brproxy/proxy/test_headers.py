"""Which headers cross."""

from multidict import CIMultiDict, CIMultiDictProxy

from brproxy.proxy.headers import HOP_BY_HOP, request_headers, response_headers


def proxied(*pairs):
    return CIMultiDictProxy(CIMultiDict(pairs))


def test_hop_by_hop_headers_stay_on_their_hop():
    headers = proxied(*((name.title(), "x") for name in sorted(HOP_BY_HOP)), ("Authorization", "Bearer k"))
    assert set(request_headers(headers)) == {"Authorization", "X-Request-Id"}
    assert dict(response_headers(headers, "r1")) == {"Authorization": "Bearer k", "X-Request-Id": "r1"}


def test_connection_names_more_of_them():
    headers = proxied(("Connection", "close, X-Secret"), ("X-Secret", "s"), ("X-Public", "p"))
    assert set(response_headers(headers, "r1")) == {"X-Public", "X-Request-Id"}


def test_the_upstream_connection_has_its_own_host_length_and_expectations():
    headers = proxied(("Host", "proxy"), ("Content-Length", "5"), ("Expect", "100-continue"), ("A", "1"))
    assert set(request_headers(headers)) == {"A", "X-Request-Id"}


def test_a_request_id_is_kept_or_made():
    assert request_headers(proxied(("x-request-id", "mine")))["X-Request-Id"] == "mine"
    made = {request_headers(proxied())["X-Request-Id"] for _ in range(10)}
    assert len(made) == 10
    assert response_headers(proxied(("X-Request-Id", "worker's")), "mine")["X-Request-Id"] == "worker's"


def test_repeated_headers_are_all_kept():
    headers = proxied(("Set-Cookie", "a=1"), ("Set-Cookie", "b=2"))
    assert response_headers(headers, "r").getall("Set-Cookie") == ["a=1", "b=2"]
