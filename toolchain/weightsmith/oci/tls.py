"""Trusted certificates, and whether a registry on this machine speaks TLS."""

from __future__ import annotations

import os
import socket
import ssl
from functools import cache

import certifi

_SECONDS = 2.0


def trusted() -> ssl.SSLContext:
    """Return a context that trusts the system's CAs, or those of SSL_CERT_FILE.

    If the system has none, it trusts Mozilla's, from the certifi package. Reading them takes longer
    than a request, so clients of the same CAs share a context.
    """
    return _trusting(os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@cache
def _trusting(_file: str | None, _folder: str | None) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not context.cert_store_stats()["x509_ca"]:
        context.load_verify_locations(certifi.where())
    return context


def unverified() -> ssl.SSLContext:
    """Return a context that accepts any certificate, for `--insecure`; it reads no CAs."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def speaks_tls(host: str, port: int) -> bool:
    """Say whether a TLS handshake succeeds; nothing else is sent."""
    try:
        with (
            socket.create_connection((host, port), _SECONDS) as plain,
            unverified().wrap_socket(plain, server_hostname=host),
        ):
            return True
    except (OSError, ValueError):
        return False
