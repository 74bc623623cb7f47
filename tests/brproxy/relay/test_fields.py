"""Which header fields cross the proxy."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.relay.fields import HOP_BY_HOP, is_field, lines_named, request_fields, response_fields


@pytest.mark.parametrize("name", sorted(HOP_BY_HOP))
def test_hop_by_hop_fields_stay_here_whatever_their_case(name):
    for spelled in (name, name.title(), name.upper()):
        fields = ((b"A", b"1"), (spelled, b"x"), (b"B", b"2"))
        assert request_fields(fields).lines == b"A: 1\r\nB: 2\r\n"
        assert response_fields(fields).lines == b"A: 1\r\nB: 2\r\n"


def test_what_connection_names_stays_here_too():
    fields = (
        (b"X-One", b"1"),
        (b"Connection", b"close, x-one"),
        (b"X-Two", b"2"),
        (b"connection", b" X-TWO "),
    )
    assert request_fields((*fields, (b"X-Three", b"3"))).lines == b"X-Three: 3\r\n"


def test_fields_that_belong_to_one_side():
    fields = ((b"Host", b"h"), (b"Content-Length", b"3"), (b"Expect", b"100-continue"), (b"Trailer", b"T"))
    assert request_fields(fields).lines == b""
    assert response_fields(fields).lines == b"Host: h\r\nExpect: 100-continue\r\nTrailer: T\r\n"


RANKS = [b"x-data-parallel-rank", b"x-override-routed-dp-rank", b"x-override-disagg-prefill-dp-rank"]
SPELLED = st.sampled_from(RANKS).flatmap(
    lambda name: st.lists(st.booleans(), min_size=len(name), max_size=len(name)).map(
        lambda upper: bytes(b - 32 if up and 97 <= b <= 122 else b for b, up in zip(name, upper, strict=True))
    )
)
OTHER = st.tuples(
    st.sampled_from([b"A", b"X-Data-Parallel", b"Connection"]), st.just(b"x-data-parallel-rank")
)


@given(st.lists(st.one_of(st.tuples(SPELLED, st.binary(max_size=5)), OTHER), max_size=6))
def test_no_client_says_which_rank_however_it_spells_it(fields):
    lines = request_fields(fields).lines
    names = [line.partition(b":")[0].lower() for line in lines.split(b"\r\n")]
    assert not set(names) & set(RANKS)
    assert lines.count(b"A: ") == sum(name == b"A" for name, _ in fields), "the others pass"


def test_the_bytes_and_the_order_stay():
    fields = ((b"sEt-COOKIE", b"a=\xe4"), (b"Set-Cookie", b"b"), (b"Empty", b""))
    assert response_fields(fields).lines == b"sEt-COOKIE: a=\xe4\r\nSet-Cookie: b\r\nEmpty: \r\n"


def test_what_the_proxy_looks_at_is_known_by_its_lower_case_name():
    fields = ((b"X-A", b"1"), (b"Content-TYPE", b"a"), (b"content-type", b"b"), (b"Upgrade", b"websocket"))
    for known in (request_fields(fields).known, response_fields(fields).known):
        assert known == {b"content-type": b"b", b"upgrade": b"websocket"}


@pytest.mark.parametrize(
    ("value", "media_type"),
    [(b"application/JSON; charset=utf-8", "application/json"), (b" text/plain ", "text/plain"), (b"", "")],
)
def test_the_media_type(value, media_type):
    assert request_fields(((b"Content-Type", value),)).media_type == media_type
    assert request_fields(()).media_type == ""


@pytest.mark.parametrize(
    ("name", "value", "can_be"),
    [
        (b"Authorization", b"Bearer k", True),
        (b"x_a", b"\xc3\xbc", True),
        (b"X A", b"y", False),
        (b"X:", b"y", False),
        (b"", b"y", False),
        (b"X\r\nY", b"z", False),
        (b"X", b"", False),
        (b"X", b" y", False),
        (b"X", b"y\r\nZ: 1", False),
        (b"X", b"y\n", False),
        (b"X", b"y\x00", False),
        (b"X\n", b"y", False),
    ],
)
def test_what_can_be_a_field(name, value, can_be):
    assert is_field(name, value) is can_be


NAMES = st.sampled_from([b"a", b"A", b"ab", b"Authorization", b"authorization", b"x-a.b", b"x-a-b"])


@given(
    st.lists(NAMES, min_size=1, max_size=3),
    st.lists(st.tuples(NAMES, st.sampled_from([b"", b"a: b", b"\xff"]))),
)
def test_lines_are_found_by_name_and_nothing_else(names, fields):
    low = {name.lower() for name in names}
    lines = b"".join(b"%b: %b\r\n" % field for field in fields)
    others = b"".join(b"%b: %b\r\n" % field for field in fields if field[0].lower() not in low)
    assert lines_named(names).sub(b"", lines) == others
