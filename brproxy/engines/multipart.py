"""The model that a form names, found in its body as it passes. Pure, bounded, and never raises.

An audio upload names its model in a field that may stand behind megabytes of file. The parser is
python-multipart's; what is kept of a form are a header and a field of a few bytes.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

VALUE_BYTES_MAX = 256
"""Most that a model's name has; a longer field is none."""

PARTS_MAX = 1024
"""Parts that are looked at: forms have some ten, and each costs some 20 µs."""

_HEADER_BYTES_MAX: Final = 1 << 12
_PIECE_BYTES: Final = 1 << 14
_HEADERS_MAX: Final = 16
_BOUNDARY_BYTES_MAX: Final = 70  # RFC 2046, section 5.1.1
# A parameter's name begins behind a delimiter: "filename" is another one.
_NAMES_MODEL = re.compile(rb"content-disposition:.*[;\s]name=model\s*(?:;|$)", re.IGNORECASE | re.DOTALL)
_QUOTED = re.compile(rb'"(?:[^"\\]|\\.)*+"', re.DOTALL)


def _names_model(header: bytes) -> bool:
    """Tell whether a part's header says that this is the field."""
    # What stands in quotes is one value: a file may have any name.
    plain = _QUOTED.sub(lambda quoted: b"model" if quoted[0] == b'"model"' else b"-", header)
    return _NAMES_MODEL.match(plain) is not None


class FormScanner:
    """Fed with a multipart body in pieces of any size; finds its field ``model``.

    ``model`` is "" until the field has come as a whole. ``is_done``: nothing that comes can change it, as it
    is known, the form is over or has more parts than are looked at, or it is no form. Call ``close`` when no
    more comes.
    """

    __slots__ = ("_beginning", "_header", "_parser", "_parts", "_value", "is_done", "model")

    def __init__(self) -> None:
        self.model = ""
        self.is_done = False
        self._beginning = b""
        self._parser: MultipartParser | None = None
        self._parts = 0
        self._header = bytearray()
        self._value: bytearray | None = None

    def feed(self, data: bytes) -> None:
        """Take in the next bytes of the body."""
        if self.is_done:
            return
        if self._parser is None:
            # Line ends may come first, as engines' parsers take them.
            data = (self._beginning + data).lstrip(b"\r\n")
            self._parser = self._begin(data)
        if self._parser is not None:
            self._parse(self._parser, data)

    def _parse(self, parser: MultipartParser, data: bytes) -> None:
        try:
            # In pieces: once a form is done the rest of it is not parsed.
            for start in range(0, len(data), _PIECE_BYTES):
                parser.write(data[start : start + _PIECE_BYTES])
                if self.is_done:
                    break
        except FormParserError:
            self.is_done = True
        if self.is_done:
            self.close()

    def close(self) -> None:
        """Let go of the parser, which holds this: what refers to itself waits for the garbage collector."""
        self.is_done = True
        self._parser = None

    def _begin(self, data: bytes) -> MultipartParser | None:
        """Return a parser for the boundary that the first line is, where every client sends it."""
        line_ends = data.find(b"\r\n", 0, _BOUNDARY_BYTES_MAX + 4)
        if line_ends < 0 and len(data) < _BOUNDARY_BYTES_MAX + 4:
            self._beginning = data
            return None
        self._beginning = b""
        if line_ends < 3 or not data.startswith(b"--"):
            self.is_done = True
            return None
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._on_part_begin,
            "on_part_data": self._on_part_data,
            "on_part_end": self._on_part_end,
            "on_header_begin": self._header.clear,
            "on_header_field": self._on_header_name,
            "on_header_value": self._on_header_value,
            "on_header_end": self._on_header_end,
            "on_end": self._on_end,
        }
        return MultipartParser(
            data[2:line_ends], callbacks, max_header_count=_HEADERS_MAX, max_header_size=_HEADER_BYTES_MAX
        )

    def _on_part_begin(self) -> None:
        self._parts += 1
        self._value = None

    def _on_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        if b":" not in self._header:
            self._header += b":;"
        self._header += data[start:end]

    def _on_header_end(self) -> None:
        if _names_model(bytes(self._header)):
            self._value = bytearray()

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._value is None or self.model:
            return
        self._value += data[start : min(end, start + VALUE_BYTES_MAX + 1)]
        if len(self._value) > VALUE_BYTES_MAX:
            self._value = None

    def _on_part_end(self) -> None:
        if self._value is not None and not self.model:
            self.model = self._value.decode("utf-8", "replace").strip()
        self.is_done = bool(self.model) or self._parts >= PARTS_MAX

    def _on_end(self) -> None:
        self.is_done = True
