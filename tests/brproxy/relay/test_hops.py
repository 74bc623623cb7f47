"""What workers are told of the hops before them."""

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.relay.fields import not_to_workers, request_fields
from brproxy.relay.hops import Hops

ADDRESSES = st.ip_addresses().map(str)
MEMBERS = st.one_of(ADDRESSES, st.sampled_from(["unknown", "10.0.0.1:80", '"[2001:db8::1]:9"', "_x"]))
VALUES = st.one_of(
    st.lists(MEMBERS, max_size=4).map(", ".join),
    st.text("1.:, \t", max_size=9).map(lambda text: text.strip(" \t")),
)


def spelled(name):
    """Return the name in any case."""
    return st.lists(st.booleans(), min_size=len(name), max_size=len(name)).map(
        lambda ups: "".join(c.upper() if up else c.lower() for c, up in zip(name, ups, strict=True))
    )


NAMES = st.sampled_from(
    ["X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "Via", "Forwarded", "X-A", "Connection"]
).flatmap(spelled)
FIELDS = st.lists(st.tuples(NAMES, VALUES), max_size=6).map(
    lambda pairs: [(name.encode(), value.encode()) for name, value in pairs if name.lower() != "connection"]
)


def sent(fields, hops, host="192.0.2.7", *, is_tls=False, version=b"1.1"):
    """Return what a worker gets, as a list of (lower-case name, value)."""
    crossing = request_fields(fields, not_to_workers(hops.names))
    lines = crossing.lines + hops.of(host, is_tls=is_tls).behind(crossing.known, version)
    return [
        (name.lower(), value) for name, _, value in (line.partition(b": ") for line in lines.splitlines())
    ]


def members(fields, name):
    listed = b",".join(value for found, value in fields if found.lower() == name).split(b",")
    return [member.strip() for member in listed if member.strip()]


@given(FIELDS, ADDRESSES, st.booleans(), st.sampled_from([b"1.0", b"1.1"]))
def test_appended_behind_what_the_client_says_in_one_field(fields, host, is_tls, version):
    got = sent(fields, Hops("append", via=True), host, is_tls=is_tls, version=version)
    assert members(got, b"x-forwarded-for")[:-1] == members(fields, b"x-forwarded-for")
    assert members(got, b"via") == [*members(fields, b"via"), b"%b brproxy" % version]
    named = [value for name, value in fields if name.lower() == b"x-forwarded-proto"]
    scheme = b",".join(named) or (b"https" if is_tls else b"http")
    assert [value for name, value in got if name == b"x-forwarded-proto"] == [scheme]
    for name in (b"x-forwarded-for", b"via"):
        assert [found for found, _ in got].count(name) == 1
    for name in (b"x-a", b"x-forwarded-host", b"forwarded"):
        assert [v for n, v in got if n == name] == [v for n, v in fields if n.lower() == name]


@given(FIELDS, ADDRESSES)
def test_replaced_whatever_the_client_says(fields, host):
    got = sent(fields, Hops("replace", via=False), host)
    assert len(members(got, b"x-forwarded-for")) == len(members(got, b"x-forwarded-proto")) == 1
    assert not {name for name, _ in got} & {b"x-forwarded-host", b"forwarded"}
    assert members(got, b"via") == members(fields, b"via")


@given(FIELDS)
def test_off_lets_all_pass_as_it_came(fields):
    assert sent(fields, Hops("off", via=False)) == [(name.lower(), value) for name, value in fields]


@given(FIELDS, st.sampled_from(["append", "replace", "off"]), st.booleans())
def test_the_lines_that_are_prepared_are_those_of_a_request_without_hops(fields, mode, via):
    hops = Hops(mode, via=via)
    hop = hops.of("192.0.2.7", is_tls=False)
    known = request_fields(fields, not_to_workers(hops.names)).known
    if hop.names.isdisjoint(known):
        assert hop.behind(known, b"1.1") == hop.lines


@given(st.ip_addresses())
def test_an_address_has_no_brackets_and_no_port(address):
    (value,) = members(sent([], Hops("append", via=False), str(address)), b"x-forwarded-for")
    told = ipaddress.ip_address(value.decode())
    assert told == (getattr(address, "ipv4_mapped", None) or address)


@pytest.mark.parametrize(
    ("host", "told"),
    [("fe80::1%eth0", b"fe80::1"), ("::ffff:10.0.0.1", b"10.0.0.1"), (None, b"unknown"), ("a b", b"unknown")],
)
def test_other_spellings_of_an_address(host, told):
    assert members(sent([], Hops("append", via=False), host), b"x-forwarded-for") == [told]


def test_what_connection_names_ends_here_and_ours_does_not():
    fields = [
        (b"Connection", b"close, X-Forwarded-For, via"),
        (b"X-Forwarded-For", b"1.1.1.1"),
        (b"Via", b"x"),
    ]
    got = sent(fields, Hops("append", via=True))
    assert members(got, b"x-forwarded-for") == [b"192.0.2.7"]
    assert members(got, b"via") == [b"1.1 brproxy"]
