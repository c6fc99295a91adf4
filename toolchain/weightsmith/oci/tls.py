"""Trusted certificates, and whether a registry on this machine speaks TLS.

On loopback plain HTTP comes first, and TLS if the registry requires it: the first reply shows
which, and no credentials are sent before it. TLS first hangs on servers that wait for a line.
"""

from __future__ import annotations

import os
import socket
import ssl
from functools import cache
from pathlib import Path

import certifi

from weightsmith.core.errors import EnvironmentFailure

_SECONDS = 2.0
_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def trusted() -> ssl.SSLContext:
    """Return a context that trusts the system's CAs, or those of SSL_CERT_FILE and SSL_CERT_DIR.

    Without these, it trusts the CAs of REQUESTS_CA_BUNDLE or CURL_CA_BUNDLE, a file or a folder. If
    the system has none, it trusts Mozilla's, from the certifi package. Reading them takes longer
    than a request, so clients of the same CAs share a context. Raises EnvironmentFailure for a
    bundle without certificates; one that does not exist counts for nothing, as with OpenSSL.
    """
    file, folder, *bundles = map(os.environ.get, _VARIABLES)
    there = (bundle for bundle in bundles if bundle and Path(bundle).exists())
    bundle = next(there, "") if not (file or folder) else ""
    try:
        return _trusting(file, folder, bundle)
    except OSError as error:  # an SSLError is one
        raise EnvironmentFailure(
            f"{bundle or file}: the certificates cannot be read: {error.strerror or error}",
            hint=f"correct {' or '.join(_VARIABLES[2:] if bundle else _VARIABLES[:2])}",
        ) from None


@cache
def _trusting(_file: str | None, _folder: str | None, bundle: str) -> ssl.SSLContext:
    is_folder = Path(bundle).is_dir()
    context = ssl.create_default_context(
        cafile=(bundle or None) if not is_folder else None,
        capath=(bundle or None) if is_folder else None,
    )
    if bundle:
        return context
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
