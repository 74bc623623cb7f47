"""What a TLS connection to a worker takes from files."""

from __future__ import annotations

import ssl
from typing import NamedTuple

from brproxy.types import InvalidInputError


class TlsFiles(NamedTuple):
    """PEM files: whom to trust ("": whom the system trusts), and the proxy's own certificate and its key.

    Without ``key`` the certificate's file has it too.
    """

    authorities: str = ""
    certificate: str = ""
    key: str = ""


class TlsFileError(InvalidInputError):
    """A file cannot be used; ``name`` is that of its field in TlsFiles."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """Return a context that verifies certificates and host names; raises TlsFileError."""
    try:
        context = ssl.create_default_context(cafile=files.authorities or None)
    except OSError as error:
        reason = _reason(error)
        raise TlsFileError("authorities", f"{files.authorities!r} cannot be used: {reason}") from error
    if files.certificate:
        try:
            # With a word in place of the question that would be asked for an encrypted key, on the terminal.
            context.load_cert_chain(files.certificate, files.key or None, password=lambda: "")
        except OSError as error:
            text = f"{files.certificate!r} or its key cannot be used: {_reason(error)}"
            raise TlsFileError("certificate", text) from error
    return context


def _reason(error: OSError) -> str:
    return " ".join(str(error.strerror or error).split())
