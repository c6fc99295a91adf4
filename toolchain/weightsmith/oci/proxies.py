"""Chooses the proxy for a host by HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY.

NO_PROXY is read as Docker reads it, with networks and ports, which httpx does not support:
https://pkg.go.dev/golang.org/x/net/http/httpproxy#Config
"""

from __future__ import annotations

import ipaddress
import re
import ssl
import threading
from collections.abc import Mapping
from urllib.request import getproxies

import httpx

from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.network import pace
from weightsmith.oci.references import is_loopback

_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=16)
_RULE = re.compile(r"(\[[^]]*\]|[^:]*)(?::(\d+))?")
_PORTS = {"http": 80, "https": 443}


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
        return self._transport_for(proxy_of(request.url, self._proxies)).handle_request(request)

    def close(self) -> None:
        """Close the connections."""
        for transport in self._transports.values():
            transport.close()

    def _transport_for(self, proxy: str) -> httpx.HTTPTransport:
        with self._lock:
            if proxy not in self._transports:
                self._transports[proxy] = self._open(proxy)
            return self._transports[proxy]

    def _open(self, proxy: str) -> httpx.HTTPTransport:
        try:
            verify = self._verify if proxy.startswith("https:") else None
            server = httpx.Proxy(proxy, ssl_context=verify) if proxy else None
            return pace(httpx.HTTPTransport(verify=self._verify, limits=_LIMITS, proxy=server))
        except (ValueError, httpx.InvalidURL, ImportError):
            # The message leaves out its URL, which may contain a password.
            raise EnvironmentFailure(
                "the proxy that the environment sets cannot be used",
                hint="correct HTTPS_PROXY, HTTP_PROXY or ALL_PROXY to http://HOST:PORT; for a "
                "socks5:// one, pip install 'httpx[socks]'; or name the registry in NO_PROXY",
            ) from None


def proxy_of(url: httpx.URL, proxies: Mapping[str, str]) -> str:
    """Return the proxy for a URL, or empty for a direct connection.

    `proxies` are the environment's settings by scheme, with `no` for NO_PROXY.
    """
    named = proxies.get(url.scheme) or proxies.get("all") or ""
    port = url.port or _PORTS.get(url.scheme, 0)
    if not named or is_loopback(url.host) or _is_excluded(url.host, port, proxies.get("no", "")):
        return ""
    return named if "://" in named else f"http://{named}"


def display_proxy(url: str) -> str:
    """Return the environment's proxy for a URL, without its credentials."""
    proxy = proxy_of(httpx.URL(url), getproxies())
    return proxy.rpartition("@")[2].partition("://")[2] or proxy.rpartition("@")[2]


def _is_excluded(host: str, port: int, rules: str) -> bool:
    return any(_matches(host.lower(), port, rule) for rule in re.split(r"[,\s]+", rules.lower()))


def _matches(host: str, port: int, rule: str) -> bool:
    """Say whether a rule of NO_PROXY matches a host: `*`, a domain, an address or a network."""
    if rule == "*":
        return True
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(rule.strip("[]"), strict=False)
    except ValueError:
        pass  # one of the two is a name, or the rule has a port
    found = _RULE.fullmatch(rule.rpartition("://")[2].removeprefix("*"))
    if not found or not found[1] or (found[2] and int(found[2]) != port):
        return False
    name = found[1].strip("[]")
    return host == name or host.endswith(name if name.startswith(".") else f".{name}")
