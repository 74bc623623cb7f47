"""The model's name in a form, wherever it is and however the form comes."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brproxy.engines import multipart
from brproxy.engines.dialect import make_dialect
from brproxy.engines.multipart import FormScanner

MIB = 1 << 20


def part(name, value, *more, header=b"Content-Disposition"):
    lines = b"".join(line + b"\r\n" for line in more)
    return b'--b0\r\n%b: form-data; name="%b"\r\n%b\r\n%b\r\n' % (header, name, lines, value)


def file_part(value, filename=b"a.wav"):
    return (
        b'--b0\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\n'
        b"Content-Type: audio/wav\r\n\r\n%b\r\n" % (filename, value)
    )


END = b"--b0--\r\n"


def scanned(body, sizes=(1 << 30,)):
    scanner = FormScanner()
    start = turn = 0
    while start < len(body):
        size = sizes[turn % len(sizes)]
        scanner.feed(body[start : start + size])
        start += size
        turn += 1
    return scanner


fields = st.lists(
    st.tuples(
        st.sampled_from([b"file", b"language", b"prompt", b"xmodel", b"model2"]), st.binary(max_size=40)
    ),
    max_size=4,
)
sizes = st.lists(st.integers(1, 50), min_size=1, max_size=5)


@given(fields, fields, st.text("abc/-é", min_size=1, max_size=20), sizes)
def test_the_model_is_found_in_pieces_of_any_size(before, after, model, sizes):
    # What clients send holds no line that looks like the boundary.
    parts = [part(name, value.replace(b"--b0", b"")) for name, value in before]
    parts.append(part(b"model", model.encode()))
    parts += [part(name, value.replace(b"--b0", b"")) for name, value in after]
    assert scanned(b"".join(parts) + END, sizes).model == model


@pytest.mark.parametrize(
    ("head", "model"),
    [
        (b'Content-Disposition: form-data; name="model"', "m"),
        (b"content-disposition:form-data;name=model", "m"),
        (b'Content-Disposition: form-data; name="model"; charset=x', "m"),
        (b'Content-Type: text/plain\r\nContent-Disposition: form-data; name="model"', "m"),
        (b'Content-Disposition: form-data; name="file"; filename="model"', ""),
        (b'Content-Disposition: form-data; filename=model; name="file"', ""),
        (b'Content-Disposition: form-data; name="models"', ""),
        (b'X-Other: form-data; name="model"', ""),
        (b'Content-Disposition: form-data; name="file"; filename="a; name=model; b.wav"', ""),
        (b'Content-Disposition: form-data; name="file"; filename="a\\"; name=model; b.wav"', ""),
        (b'Content-Disposition: form-data; filename="a\\\\"; name="model"', "m"),
    ],
)
def test_what_names_the_field(head, model):
    assert scanned(b"--b0\r\n" + head + b"\r\n\r\nm\r\n" + END).model == model


@given(st.text('";\\ =', max_size=6), st.text('";\\ =', max_size=6), sizes)
def test_no_file_is_called_like_the_field(before, after, sizes):
    name = f"{before}name=model{after}".replace("\\", "\\\\").replace('"', '\\"').encode()
    assert scanned(file_part(b"x", name) + part(b"model", b"m") + END, sizes).model == "m"


@given(st.text("\r\n", max_size=5), sizes)
def test_line_ends_before_the_form(line_ends, sizes):
    assert scanned(line_ends.encode() + part(b"model", b"m") + END, sizes).model == "m"


def test_the_model_behind_a_large_file():
    body = file_part(b"\r\n--b" * MIB) + part(b"model", b"whisper-1") + END
    facts = make_dialect("openai").read_request(
        "/v1/audio/transcriptions", "POST", "multipart/form-data", body
    )
    assert (facts.model, facts.sequences, facts.teaches, facts.malformed) == ("whisper-1", 1, False, "")


def test_a_name_that_is_too_long_is_none():
    assert scanned(part(b"model", b"m" * 256) + END, [7]).model == "m" * 256
    assert scanned(part(b"model", b"m" * 257) + END, [7]).model == ""


@given(st.binary(max_size=200), sizes)
def test_whatever_comes_is_read_without_an_error(junk, sizes):
    for beginning in (b"", b"--b0\r\n", part(b"a", b"b"), file_part(b"x")):
        scanned(beginning + junk, sizes)


def test_what_is_done_is_not_read_on():
    scanner = scanned(part(b"model", b"m"))
    assert not scanner.is_done, "the value may go on"
    scanner.feed(END)
    assert (scanner.is_done, scanner.model) == (True, "m")
    scanner.feed(part(b"model", b"other") + END)
    assert scanner.model == "m"
    assert scanned(
        b"no form at all, but a long line without any end of it, which cannot be a boundary"
    ).is_done


@pytest.mark.parametrize(
    "body",
    [
        file_part(b"\r" * MIB),
        file_part(b"\r\n--b" * (MIB // 5)),
        b"--b0\r\n" + b"a" * MIB,
        b"--b0\r\n" + b"a: b\r\n" * (MIB // 6),
        b"--b0\r\nContent-Disposition: " + b"x" * MIB,
        part(b"x", b"") * (MIB // 60),
        b"-" * MIB,
        b"\r\n" * MIB,
    ],
    ids=range(8),
)
def test_no_form_buys_memory_or_steps(body, steps_of):
    scanner = scanned(body, [1 << 16])
    assert scanner.model == ""
    assert scanner._parts <= multipart.PARTS_MAX + (1 << 14) // 55
    tracemalloc.start()
    scanned(body, [1 << 16])
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < MIB
    # At worst, all of the parts that are looked at: some hundred lines for each.
    assert steps_of(lambda: scanned(body, [1 << 16])) < 2 * MIB
