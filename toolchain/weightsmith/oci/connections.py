"""Chooses proxies and trusted certificates, and sees whether a registry here speaks TLS.

On loopback plain HTTP comes first, and TLS if the registry requires it: the first reply shows
which, and no credentials are sent before it. TLS first hangs on servers that wait for a line.

NO_PROXY is read as Docker reads it, with networks and ports, which httpx does not support:
https://pkg.go.dev/golang.org/x/net/http/httpproxy#Config
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import ssl
import threading
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from urllib.request import getproxies

import certifi
import httpx

from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.network import pace
from weightsmith.oci.references import is_loopback

_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=16)
_RULE = re.compile(r"(\[[^]]*\]|[^:]*)(?::(\d+))?")
_PORTS = {"http": 80, "https": 443}
_SECONDS = 2.0
_VARIABLES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


class ProxyTransport(httpx.BaseTransport):
    """Sends each request directly or through a proxy; proxies are opened on first use.

    Replies have the limits of `network.Pace`.
    """

    def __init__(self, verify: ssl.SSLContext, proxies: Mapping[str, str] | None = None) -> None:
        self._verify = verify
        self._proxies = getproxies() if proxies is None else proxies
        self._transports: dict[str, httpx.HTTPTransport] = {}
        self._lock = threading.Lock()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request; raises EnvironmentFailure for an unusable proxy."""
        proxy = proxy_of(request.url, self._proxies)
        with self._lock:
            try:
                if proxy not in self._transports:
                    own = self._verify if proxy.startswith("https:") else None
                    server = httpx.Proxy(proxy, ssl_context=own) if proxy else None
                    self._transports[proxy] = pace(
                        httpx.HTTPTransport(verify=self._verify, limits=_LIMITS, proxy=server)
                    )
            except (ValueError, httpx.InvalidURL, ImportError):
                # The message leaves out its URL, which may contain a password.
                raise EnvironmentFailure(
                    "the proxy that the environment sets cannot be used",
                    hint="correct HTTPS_PROXY, HTTP_PROXY or ALL_PROXY to http://HOST:PORT; for a "
                    "socks5:// one, pip install 'httpx[socks]'; or name the registry in NO_PROXY",
                ) from None
            transport = self._transports[proxy]
        return transport.handle_request(request)

    def close(self) -> None:
        """Close the connections."""
        for transport in self._transports.values():
            transport.close()


def proxy_of(url: httpx.URL, proxies: Mapping[str, str]) -> str:
    """Return the proxy for a URL, or empty for a direct connection.

    `proxies` are the environment's settings by scheme, with `no` for NO_PROXY.
    """
    named = proxies.get(url.scheme) or proxies.get("all") or ""
    port = url.port or _PORTS.get(url.scheme, 0)
    rules = re.split(r"[,\s]+", proxies.get("no", "").lower())
    if not named or is_loopback(url.host) or any(_matches(url.host, port, rule) for rule in rules):
        return ""
    return named if "://" in named else f"http://{named}"


def display_proxy(url: str) -> str:
    """Return the environment's proxy for a URL, without its credentials."""
    proxy = proxy_of(httpx.URL(url), getproxies()).rpartition("@")[2]
    return proxy.partition("://")[2] or proxy


def _matches(host: str, port: int, rule: str) -> bool:
    """Say whether a rule of NO_PROXY matches a host: `*`, a domain, an address or a network."""
    if rule == "*":
        return True
    host = host.lower()
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(rule.strip("[]"), strict=False)
    except ValueError:
        pass  # one of the two is a name, or the rule has a port
    found = _RULE.fullmatch(rule.rpartition("://")[2].removeprefix("*"))
    if not found or not found[1] or (found[2] and int(found[2]) != port):
        return False
    name = found[1].strip("[]")
    return host == name or host.endswith(name if name.startswith(".") else f".{name}")


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
