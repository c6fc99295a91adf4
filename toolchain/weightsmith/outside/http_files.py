"""Reads files over HTTP: in ranges, behind redirects that may go only so far.

The user's word is the first address. A server may send us elsewhere (to the store of a release,
say), but not from HTTPS to HTTP, not to another scheme, and not from a public address to one of
this machine or its network, where metadata services and others trust whoever can reach them.
Names and passwords are those of ~/.netrc, and are sent to the first address alone.
"""

from __future__ import annotations

import ipaddress
import netrc
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from urllib.parse import urlsplit

import httpx

from weightsmith.core.errors import EnvironmentFailure, InputRefused, WeightsmithError
from weightsmith.core.network import ForbiddenAddress, paced, pinned_to
from weightsmith.oci.connections import trusted
from weightsmith.oci.references import is_loopback
from weightsmith.outside.remote import Broken

CHUNK = 1 << 20
_MOST_REDIRECTS = 10
_AS_IT_IS = {"Accept-Encoding": "identity"}
"""No compression: the client would unpack a kilobyte of gzip to a megabyte."""
_REDIRECTS = (301, 302, 303, 307, 308)
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_OK, _PARTIAL, _UNAUTHORIZED, _FORBIDDEN, _ABSENT, _GONE, _NO_RANGE = (
    200,
    206,
    401,
    403,
    404,
    410,
    416,
)
_NO_HEAD = (403, 405, 501)
_METADATA = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200")))
"""Of clouds' metadata services, which are not on a link-local address."""

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class HttpFiles:
    """Files of one source, by their addresses."""

    def __init__(
        self, what: str, headers: Mapping[str, str] | None = None, *, login: str = ""
    ) -> None:
        """Keep what errors call it; `headers` are sent only where the user's address leads.

        `login` says how to log in; without it, by ~/.netrc.
        """
        self._what = what
        self._headers = headers or {}
        self._how = login

    def size(self, url: str) -> int:
        """Return a file's size in bytes, -1 if its server does not say it.

        Raises InputRefused if it does not exist or access is denied, EnvironmentFailure for other
        refusals, Broken if it may be tried again.
        """
        with self._asked("HEAD", url, {}) as answer:
            if answer.status_code in _NO_HEAD:
                return -1
            self._check(url, answer)
            said = answer.headers.get("Content-Length", "")
            return int(said) if said.isdecimal() and len(said) < 16 else -1

    def read(self, url: str, start: int = 0, end: int = -1) -> Iterator[bytes]:
        """Yield a file's bytes from an offset on, to `end` if its server can; raises as `size`."""
        last = str(end - 1) if end >= 0 else ""
        ranged = {"Range": f"bytes={start}-{last}"} if start or last else {}
        with self._asked("GET", url, ranged) as answer:
            if start and answer.status_code == _NO_RANGE:
                return  # nothing is left
            self._check(url, answer)
            skip = start
            if answer.status_code == _PARTIAL:
                begins = answer.headers.get("Content-Range", "").removeprefix("bytes ")
                if begins.partition("-")[0] != str(start):
                    raise Broken("the server sent another part than the one asked for")
                skip = 0
            for chunk in answer.iter_raw(CHUNK):
                rest = chunk[skip:] if skip else chunk
                skip -= len(chunk) - len(rest)
                if rest:
                    yield rest

    def text(self, url: str, largest: int) -> bytes:
        """Return a small file; raises InputRefused for a larger one, and as `size` does."""
        data = bytearray()
        for chunk in self.read(url):
            data += chunk
            if len(data) > largest:
                raise InputRefused(
                    f"{self._what}: {shown(url)} has more than {largest} bytes",
                    hint="check the address",
                )
        return bytes(data)

    @contextmanager
    def _asked(self, method: str, url: str, headers: Mapping[str, str]) -> Iterator[httpx.Response]:
        """Send a request and follow its redirects; the reply's body is not read yet."""
        first, sent = url, {**_AS_IT_IS, **headers}
        try:
            for _ in range(_MOST_REDIRECTS):
                own = _origin(url) == _origin(first)
                extra = {**self._headers, **self._login(url)} if own else {}
                client = self._client if own else self._elsewhere(first)
                with client.stream(
                    method, url, headers={**sent, **extra}, timeout=httpx.Timeout(60)
                ) as answer:
                    if answer.status_code not in _REDIRECTS:
                        yield answer
                        return
                    there = answer.headers.get("Location", "")
                url = self._next(first, url, there)
        except (httpx.TransportError, httpx.StreamError) as error:
            raise Broken(_cause(error)) from None
        except ForbiddenAddress:
            raise self._led_away("an address of this machine or its network") from None
        except (httpx.InvalidURL, UnicodeError) as error:
            raise EnvironmentFailure(
                f"{self._what}: not an address that can be reached: {type(error).__name__}",
                hint="check the address",
            ) from None
        raise EnvironmentFailure(
            f"{self._what}: more than {_MOST_REDIRECTS} redirects", hint="check the address"
        )

    def _next(self, first: str, url: str, there: str) -> str:
        try:
            target = str(httpx.URL(url).join(there))
            before, after = urlsplit(first), urlsplit(target)
            host = after.hostname or ""
        except (httpx.InvalidURL, ValueError):
            raise self._led_away("an address that cannot be read") from None
        local = before.scheme == "http"  # only on this machine, see recipe/sources.py
        plain = local and after.scheme == "http" and is_loopback(host)
        if not host or after.username or (after.scheme != "https" and not plain):
            kind = f"{after.scheme}://{host}" if host else f"{after.scheme}:"
            raise self._led_away(f"{kind}, which is not HTTPS" if not after.username else kind)
        # Behind a proxy it is not us who connect, so an address is looked at here too.
        with suppress(ValueError):
            ipaddress.ip_address(host.partition("%")[0])
            if not _may_reach(host, self._home(first)):
                raise self._led_away("an address of this machine or its network")
        return target

    def _home(self, first: str) -> tuple[_Address, ...]:
        if "_found" not in self.__dict__:
            self.__dict__["_found"] = _addresses(urlsplit(first).hostname or "")
        found: tuple[_Address, ...] = self.__dict__["_found"]
        return found

    def _led_away(self, where: str) -> WeightsmithError:
        return InputRefused(
            f"{self._what}: its server redirects to {where[:200]}",
            hint="do not follow it: give the address where the file is",
        )

    def _check(self, url: str, answer: httpx.Response) -> None:
        status, place = answer.status_code, shown(url)
        if status in (_OK, _PARTIAL):
            return
        if status in _TRANSIENT:
            raise Broken(f"HTTP status {status}")
        if status in (_ABSENT, _GONE):
            raise InputRefused(f"{self._what}: {place} does not exist", hint="check the address")
        if status in (_UNAUTHORIZED, _FORBIDDEN):
            raise InputRefused(
                f"{self._what}: access to {place} is denied (HTTP status {status})",
                hint=self._how_to_log_in(place),
            )
        raise EnvironmentFailure(
            f"{self._what}: {place} answered with HTTP status {status}", hint="try again later"
        )

    def _how_to_log_in(self, place: str) -> str:
        host = urlsplit(place).hostname
        return self._how or f"put into ~/.netrc: machine {host} login NAME password SECRET"

    def _login(self, url: str) -> Mapping[str, str]:
        if self._how:
            return {}
        host = urlsplit(url).hostname or ""
        try:
            found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
        except (FileNotFoundError, PermissionError):
            return {}
        except (netrc.NetrcParseError, OSError, ValueError):
            raise EnvironmentFailure(
                "~/.netrc cannot be read", hint="correct it, or unset NETRC"
            ) from None
        if not found:
            return {}
        auth = httpx.BasicAuth(found[0], found[2] or "")
        return {
            "Authorization": next(auth.auth_flow(httpx.Request("GET", url))).headers[
                "Authorization"
            ]
        }

    @cached_property
    def _client(self) -> httpx.Client:
        return _client()

    def _elsewhere(self, first: str) -> httpx.Client:
        """Return the client for where redirects lead, which reaches only what they may."""
        found = self.__dict__.get("_other")
        if found is None:
            home = self._home(first)
            found = self.__dict__["_other"] = pinned_to(
                _client(), lambda address: _may_reach(address, home)
            )
        return found


def shown(url: str) -> str:
    """Return an address without user, query and fragment, which may be secrets."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _client() -> httpx.Client:
    try:
        return paced(httpx.Client(verify=trusted(), follow_redirects=False))
    except (ValueError, httpx.InvalidURL, ImportError):
        raise EnvironmentFailure(
            "the proxy that the environment sets cannot be used for downloads",
            hint="correct HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY (names and addresses, no "
            "IPv6 networks); a socks5:// proxy needs pip install 'httpx[socks]'",
        ) from None


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _cause(error: Exception) -> str:
    words = " ".join(str(error).split())
    # The text of an error of TLS or of a name is of this machine; others may hold an address.
    return f"{type(error).__name__}: {words[:120]}" if "://" not in words else type(error).__name__


def _addresses(host: str) -> tuple[_Address, ...]:
    """Return a host's addresses; none if it has none here, as behind a proxy."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return ()
    return tuple(ipaddress.ip_address(str(row[4][0]).partition("%")[0]) for row in found)


def _may_reach(text: str, home: tuple[_Address, ...]) -> bool:
    """Say whether a redirect may lead to an address from a source at `home`."""
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    address = mapped or address
    if address.is_link_local or address.is_unspecified or address in _METADATA:
        return False
    if address.is_loopback:
        return bool(home) and all(one.is_loopback for one in home)
    return address.is_global or (bool(home) and not any(one.is_global for one in home))
