"""Where workers listen: every text is an origin that resolvers take, or an error in one line."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from brproxy.config import parse_config
from brproxy.origins import read_origin, read_worker_url
from brproxy.types import InvalidInputError
from brproxy.validation import ConfigError

SCHEMES = st.sampled_from(["http://", "https://", "HTTP://", "ftp://", "", "http:/"])
LABELS = st.one_of(
    st.sampled_from(
        ["worker", "a_b", "b\u00fccher", "\u4f8b\u3048", "xn--bcher-kva", "-a", "a-", "", "a" * 63, "a" * 64]
    ),
    st.text(min_size=1, max_size=8),
)
HOSTS = st.one_of(
    st.lists(LABELS, min_size=1, max_size=5).map(".".join),
    st.sampled_from(["[::1]", "[fe80::1%eth0]", "[::g]", "[", "[]", "127.0.0.1", "999.1.1.1", "u:p@h", "@h"]),
)
PORTS = st.one_of(
    st.sampled_from(["", ":", ":80", ":0", ":65535", ":65536", ":-1", ":x", ":8\u0660"]),
    st.integers(0, 1 << 64).map(lambda port: f":{port}"),
)
ENDS = st.sampled_from(["", "/", "/v1", "?", "?x=1", "#f", "/?a", " ", "\n"])


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("http://w:8000", ("http", "w", 8000, "w:8000", "http://w:8000")),
        ("http://W/", ("http", "w", 80, "w", "http://w")),
        ("https://w", ("https", "w", 443, "w", "https://w")),
        ("https://dp_0.a-b.:80", ("https", "dp_0.a-b.", 80, "dp_0.a-b.:80", "https://dp_0.a-b.:80")),
        ("http://[::1]:80", ("http", "::1", 80, "[::1]:80", "http://[::1]:80")),
        ("http://[fe80::1%eth0]", ("http", "fe80::1%eth0", 80, "[fe80::1]", "http://[fe80::1%eth0]")),
        ("http://b\u00fccher:1", ("http", "xn--bcher-kva", 1, "xn--bcher-kva:1", "http://xn--bcher-kva:1")),
        ("http://stra\u00dfe", ("http", "xn--strae-oqa", 80, "xn--strae-oqa", "http://xn--strae-oqa")),
    ],
)
def test_what_an_origin_means(url, origin):
    assert read_origin(url) == origin
    assert read_origin(read_origin(url).url) == origin


@pytest.mark.parametrize(
    ("host", "wrong"),
    [
        ("a" * 64, "the host's part 'aaaaaaaaaaaaaaaa'... has 64 characters; DNS allows 63"),
        ("\u00fc" * 60, "is no name that DNS can have"),
        ("a..b", "the host 'a..b' has the part ''; letters, digits, - and _ are allowed"),
        ("a b", "has the part 'a b'"),
        ("\u2019x", "is no name that DNS can have"),
        (".".join(["a" * 60] * 5), "the host has 304 characters; DNS allows 253"),
        ("[::g]", 'must be like "http://host:port"'),
    ],
)
def test_a_host_that_cannot_be_is_an_error_of_the_configuration(host, wrong):
    with pytest.raises(ConfigError) as caught:
        parse_config({"worker": [{"url": f"http://{host}:80"}]}, "x.toml")
    told = str(caught.value)
    assert told.startswith("x.toml: worker[0].url: ")
    assert wrong in told
    assert "\n" not in told


@given(SCHEMES, HOSTS, PORTS, ENDS)
@example("http://", "a\u3002b", "", "")
@example("http://", "h\u2100", "", "")
def test_every_text_is_an_origin_that_resolvers_take_or_an_error_in_one_line(scheme, host, port, end):
    url = scheme + host + port + end
    try:
        origin = read_origin(url)
    except InvalidInputError as error:
        told = str(error)
        origin = None
    if origin is None:
        assert "\n" not in told
        return
    # What getaddrinfo does with a name before it asks anybody, and what a Host field may hold.
    origin.host.encode("idna")
    assert origin.authority.isascii()
    assert not set(origin.authority) & set(" \r\n\t/@?#%")
    assert 0 < origin.port < 65536
    assert read_origin(origin.url) == origin


@pytest.mark.parametrize(
    ("url", "base", "written"),
    [
        ("http://w:8000", "", "http://w:8000"),
        ("http://W:8000/", "", "http://w:8000"),
        ("https://w/base", "/base", "https://w/base"),
        ("https://w/a/b%20c//", "/a/b%20c", "https://w/a/b%20c"),
        ("http://[::1]:80/A", "/A", "http://[::1]:80/A"),
    ],
)
def test_what_the_url_of_a_worker_means(url, base, written):
    worker = read_worker_url(url)
    assert (worker.base, str(worker)) == (base, written)
    assert worker.origin == read_origin(url.partition("://")[0] + "://" + url.split("/")[2])
    assert read_worker_url(str(worker)) == worker


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://w/a//b", "with a plain path and no query"),
        ("http://w//b", "with a plain path and no query"),
        ("http://w/a/../b", "with a plain path and no query"),
        ("http://w/.", "with a plain path and no query"),
        ("http://w/a?b", "with a plain path and no query"),
        ("http://w/a#b", "with a plain path and no query"),
        ("http://w/a b", "with a plain path and no query"),
        ("http://w/%zz", "with a plain path and no query"),
        ("http://w/a\r\nX: y", "with a plain path and no query"),
        ("http://w?a/b", "without path, query or user"),
        ("http://u@w/b", "without path, query or user"),
        ("http://w/v1", 'must not end in "/v1"'),
        ("http://w/base/v1/", 'must not end in "/v1"'),
        ("http://w/" + "a" * 1024, "has a path of 1025 characters; at most 1024"),
        ("w/base", 'must be like "http://host:port"'),
    ],
)
def test_urls_that_no_worker_has(url, told):
    with pytest.raises(InvalidInputError) as caught:
        read_worker_url(url)
    assert told in str(caught.value)


@given(SCHEMES, HOSTS, PORTS, ENDS, st.text("/ab.%2?#:\\ \t\r\n\u00fc", max_size=8))
def test_every_text_is_the_url_of_a_worker_or_an_error_in_one_line(scheme, host, port, end, path):
    told = ""
    try:
        worker = read_worker_url(scheme + host + port + end + path)
    except InvalidInputError as error:
        told = str(error)
    assert "\n" not in told
    if told:
        return
    assert not worker.base or worker.base.startswith("/")
    assert worker.base.isascii()
    assert worker.base.isprintable()
    assert not set(worker.base) & set(" ?#\\")
    assert "//" not in worker.base
    assert read_worker_url(str(worker)) == worker
