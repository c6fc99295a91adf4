"""A session with one registry: authorization, redirects, limits, retries; its small replies.

https://github.com/opencontainers/distribution-spec/blob/main/spec.md

Authorization is by Basic and Bearer challenges, with credentials from Docker's configuration.
https://distribution.github.io/distribution/spec/auth/token/ and RFC 9110 section 11
"""

from __future__ import annotations

import base64
import itertools
import json
import random
import re
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TypeAlias, TypeVar
from urllib.parse import urljoin, urlsplit

import httpx

from weightsmith.core.errors import EnvironmentFailure, InputRefused, WeightsmithError, of_limits
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import JsonValue
from weightsmith.oci.connections import speaks_tls
from weightsmith.oci.references import DOCKER_HUB, Reference, is_loopback

T = TypeVar("T")
Body: TypeAlias = Callable[[], Iterator[bytes]]
"""Yields the request's bytes from the start, for every try."""

Credentials: TypeAlias = Callable[[str], tuple[str, str] | None]
"""Registry host (`docker.io` for Docker Hub) -> user and secret, or None for anonymous."""
Helper: TypeAlias = Callable[[str, str], tuple[str, str] | None]
"""Runs `docker-credential-<first> get` for the server `second`; implemented by a driver."""

IDENTITY = "<token>"
"""User name with which helpers return an identity token instead of a password."""

_HUB_KEY = "https://index.docker.io/v1/"
# Possessive quantifiers: backtracking would take seconds for a header of 16 kB.
_PAIR = re.compile(r'(?<![a-zA-Z_])([a-zA-Z_]++)\s*+=\s*+(?:"([^"]*+)"|([^\s",]++))')
_LONGEST_CHALLENGE = 8 << 10
"""Characters of all WWW-Authenticate headers together; registries send a few hundred."""

LARGEST_REPLY = 64 << 10
LARGEST_TOKEN = 1 << 20
TRIES = 6
LONGEST_PAUSE = 60.0
"""Seconds; the longest pause before a retry, even if the registry asks for more."""
_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_NO_HEAD = frozenset({405, 501})
"""Replies of proxies that pass HEAD on to nobody; the headers of GET are the same."""
_MOST_REDIRECTS = 5
_BAD = 400
_TOKEN = re.compile(r"[\x21-\x7e]+")
_DAY = 86400.0
_EARLY = 10
"""Seconds before a token expires at which it is renewed."""


class Transient(Exception):
    """A request failed; a retry may succeed."""

    def __init__(self, why: str, pause: float | None = None) -> None:
        super().__init__(why)
        self.pause = pause


@dataclass(frozen=True, slots=True)
class RegistryReply:
    """A small reply, read into memory."""

    status: int
    headers: httpx.Headers
    body: bytes
    url: str


class RegistrySession:
    """Sends requests to one registry, for one repository and the scopes that the work needs."""

    def __init__(
        self,
        client: httpx.Client,
        reference: Reference,
        *,
        actions: str,
        also: tuple[str, ...] = (),
        credentials: Credentials,
        insecure: bool = False,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        host = "registry-1.docker.io" if reference.registry == DOCKER_HUB else reference.registry
        scheme = "http" if insecure or reference.is_loopback else "https"
        self._may_switch = scheme == "http"
        """Plain HTTP is allowed; the first reply shows whether the registry speaks it."""
        self._is_loopback, self._insecure = reference.is_loopback, insecure
        self.registry = reference.registry
        self.root = f"{scheme}://{host}"
        self.base = f"{self.root}/v2/{reference.repository}/"
        # Without a repository, it is the list of them.
        name = reference.repository and f"repository:{reference.repository}"
        self._scopes = [f"{name or 'registry:catalog'}:{actions}"]
        self._scopes += [f"repository:{name}:pull" for name in also]
        self._client = client
        self._credentials = credentials
        self._pause = pause
        self._lock = threading.Lock()
        self._header = ""
        self._ends = float("inf")
        self._challenges: list[str] = []
        self._secrets: set[str] = set()

    def call(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body | bytes | None = None,
        limit: int = LARGEST_REPLY,
        wait: float = 60,
    ) -> RegistryReply:
        """Send one request and read at most `limit` bytes; raises Transient if a retry may help."""
        with self.stream(method, url, headers=headers, body=body, wait=wait) as response:
            # Of HEAD too, whose body is empty: only a reply that was read keeps its connection.
            data = read_limited(response, limit, self.registry)
            reply = RegistryReply(response.status_code, response.headers, data, str(response.url))
        if method == "HEAD" and reply.status in _NO_HEAD:
            with self.stream("GET", url, headers=headers, wait=wait) as response:
                reply = RegistryReply(
                    response.status_code, response.headers, b"", str(response.url)
                )
        self._check_transient(reply)
        return reply

    @contextmanager
    def stream(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        body: Body | bytes | None = None,
        wait: float = 60,
    ) -> Iterator[httpx.Response]:
        """Send one request, with authorization and redirects; Transient if it breaks off."""
        try:
            response = self._ask(method, urljoin(self.base, url), headers or {}, body, wait)
            try:
                yield response
            finally:
                response.close()
        except (httpx.TransportError, httpx.InvalidURL) as error:
            raise self._broken(error) from None

    def attempt(self, what: str, action: Callable[[], T], tries: int = TRIES) -> T:
        """Run `action` until it does not raise Transient; EnvironmentFailure after `tries`."""
        for failures in itertools.count(1):
            try:
                return action()
            except Transient as trouble:
                self.wait_after(what, trouble, failures, tries)
        raise AssertionError("unreachable")

    def wait_after(self, what: str, trouble: Transient, failures: int, tries: int = TRIES) -> None:
        """Pause before the next try: exponentially, or as the registry asks; or give up."""
        if failures >= tries:
            raise EnvironmentFailure(
                f"{what}: {trouble}",
                hint="check that the registry runs, has disk space and is reachable, "
                "then run it again: uploaded layers are not sent again",
            ) from None
        # Jitter, so that many clients do not retry at the same moment.
        wished = 0.5 * 2 ** (failures - 1) * random.uniform(0.5, 1)  # noqa: S311 - no secret here
        self._pause(min(LONGEST_PAUSE, max(trouble.pause or 0.0, wished)))

    def check(self, what: str, response: httpx.Response) -> None:
        """Raise the error for a failed reply whose body has not been read."""
        data = read_limited(response, LARGEST_REPLY, self.registry)
        reply = RegistryReply(response.status_code, response.headers, data, str(response.url))
        self._check_transient(reply)
        raise self.refusal(what, reply)

    def _check_transient(self, reply: RegistryReply) -> None:
        if reply.status in _TRANSIENT and not is_full(reply):
            raise Transient(self.explain(reply), retry_after(reply.headers))

    def refusal(self, what: str, reply: RegistryReply) -> WeightsmithError:
        """Return the error for a status that a retry does not change."""
        text = f"{what}: {self.explain(reply)}"
        if reply.status in (401, 403):
            return EnvironmentFailure(
                text, hint=f"run `docker login {self.registry}`, or ask for access"
            )
        if reply.status == 404:
            return InputRefused(
                text,
                hint="check the name; some registries require the repository to be created first",
            )
        if reply.status == 413 or is_full(reply):
            return EnvironmentFailure(
                text, hint="the registry is full or has a size limit; check its settings"
            )
        return EnvironmentFailure(text, hint="see the registry's log for the reason")

    def explain(self, reply: RegistryReply) -> str:
        """Describe the reply in one line, without secrets."""
        text = stated_error(reply.body)
        for secret in self._secrets:
            text = text.replace(secret, "***") if secret else text
        text = "".join(c for c in text if c.isprintable())[:200]
        return f"{self.registry} answered HTTP {reply.status}" + (f" ({text})" if text else "")

    def _ask(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        body: Body | bytes | None,
        wait: float,
    ) -> httpx.Response:
        renewed = False
        for _ in range(_MOST_REDIRECTS + 2):
            own = _origin(url) == _origin(self.root)
            used = ""
            if own:
                with self._lock:
                    used, late = self._header, time.monotonic() > self._ends
                if late:
                    self._renew(self._challenges, used)
                used = self._header
            try:
                request = self._client.build_request(
                    method,
                    url,
                    headers={"Accept-Encoding": "identity", **headers, **_auth(used)},
                    content=body() if callable(body) else body,
                    timeout=httpx.Timeout(30, read=wait, write=300, pool=None),
                )
                response = self._client.send(request, stream=True, follow_redirects=False)
            except httpx.TransportError:
                if not (own and self._switch()):
                    raise
                url = f"https{url.removeprefix('http')}"
                continue
            if response.status_code == _BAD and own and self._switch():
                response.close()
                url = f"https{url.removeprefix('http')}"
                continue
            self._may_switch = False
            if response.status_code == 401 and own and not renewed:
                renewed = True
                if not self._renew(response.headers.get_list("www-authenticate"), used):
                    return response
                response.close()
            elif response.status_code in _REDIRECTS and "location" in response.headers:
                response.close()
                url = self.follow(url, response.headers["location"])
            else:
                return response
        raise EnvironmentFailure(f"{self.registry} redirects in a loop", hint="check its settings")

    def _switch(self) -> bool:
        """Switch to HTTPS if plain HTTP was tried first and the registry speaks only TLS."""
        with self._lock:
            parts = urlsplit(self.root)
            if not self._may_switch or parts.scheme != "http":
                return False
            self._may_switch = False
            if not speaks_tls(parts.hostname or "", parts.port or 443):
                return False
            self.root = f"https{self.root.removeprefix('http')}"
            self.base = f"https{self.base.removeprefix('http')}"
            return True

    def follow(self, url: str, location: str, what: str = "redirects to") -> str:
        """Return the absolute URL of a redirect; plain HTTP only if nobody in between can listen.

        That is: on this machine, for a registry on this machine, or with `insecure`. Raises
        EnvironmentFailure; `what` describes what the registry does with the URL.
        """
        try:
            target = urljoin(url, location)
            _origin(target)
            (urlsplit(target).hostname or "").encode("idna")  # as the resolver does
        except ValueError:
            raise EnvironmentFailure(
                f"{self.registry} {what} an invalid URL",
                hint="correct the registry's public address",
            ) from None
        parts = urlsplit(target)
        plain = self._insecure or (self._is_loopback and is_loopback(parts.hostname or ""))
        if parts.scheme not in (("https", "http") if plain else ("https",)):
            raise EnvironmentFailure(
                f"{self.registry} {what} a URL without HTTPS"
                f" ({parts.scheme}://{parts.hostname or ''})",
                hint="correct the registry's public address; if you trust the network in between, "
                "pass --insecure",
            )
        return target

    def location(self, reply: RegistryReply) -> str:
        """Return the URL of an upload session; raises EnvironmentFailure if the reply has none."""
        if not reply.headers.get("location"):
            raise EnvironmentFailure(
                f"{self.registry} opened an upload without a Location header",
                hint="check whether a proxy in between drops the header",
            )
        return self.follow(reply.url, reply.headers["location"])

    def next_page(self, reply: RegistryReply) -> str:
        """Return the URL of a list's next page (RFC 8288), or empty."""
        # Possessive: the search would take minutes for a hundred thousand "<".
        found = re.search(r'<([^<>]++)>\s*+;\s*+rel="?next"?', reply.headers.get("link", ""))
        return self.follow(reply.url, found[1]) if found else ""

    def _renew(self, challenges: list[str], used: str) -> bool:
        """Get a new Authorization header unless another thread just did; False if impossible."""
        with self._lock:
            if self._header != used:
                return True
            challenge = parse_challenge(challenges)
            pair = self._credentials(self.registry)
            if pair:
                self._secrets.update({pair[1], basic(pair)[6:]})
            if challenge is None or (challenge.kind == "basic" and not pair):
                return False
            self._challenges = challenges
            if challenge.kind == "basic" and pair:
                self._header = basic(pair)
                return self._header != used
            self._token(challenge.realm, challenge.service, pair)
            return True

    def _token(self, realm: str, service: str, pair: tuple[str, str] | None) -> None:
        url = self.follow(self.root, realm, "names as its token service")
        fields: dict[str, str | list[str]] = {"service": service, "scope": self._scopes}
        headers = {"Accept-Encoding": "identity"}
        method = "GET"
        if pair and pair[0] == IDENTITY:
            method = "POST"
            fields |= {
                "grant_type": "refresh_token",
                "refresh_token": pair[1],
                "client_id": "weightsmith",
                "scope": " ".join(self._scopes),
            }
        elif pair:
            headers |= _auth(basic(pair))
        given = {"data": fields} if method == "POST" else {"params": fields}

        def once() -> RegistryReply:
            try:
                with self._client.stream(method, url, headers=headers, **given) as response:  # type: ignore[arg-type]
                    body = read_limited(response, LARGEST_TOKEN, self.registry)
                    reply = RegistryReply(response.status_code, response.headers, body, "")
            except httpx.TransportError as error:
                raise self._broken(error) from None
            self._check_transient(reply)
            return reply

        what = f"cannot get a token for {self.registry}"
        reply = self.attempt(what, once)
        if reply.status != 200:
            raise self.refusal(what, reply)
        answer = json_object(reply.body)
        token = answer.get("token") or answer.get("access_token")
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise EnvironmentFailure(
                f"the token service of {self.registry} returned no token",
                hint="check whether a login page or proxy is in between",
            )
        seconds, lasts = answer.get("expires_in"), 60.0  # the token specification's default
        if isinstance(seconds, int | float) and seconds > 0:
            lasts = float(min(seconds, _DAY))
        self._secrets.add(token)
        self._header = f"Bearer {token}"
        self._ends = time.monotonic() + max(lasts - _EARLY, lasts / 2)

    def _broken(self, error: Exception) -> Exception:
        if too_many := of_limits(error):
            return too_many
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            return EnvironmentFailure(
                f"the certificate of {self.registry} cannot be verified",
                hint="set SSL_CERT_FILE to your CA's certificates, or pass --insecure",
            )
        why = re.sub(r"\[Errno -?\d+\] ", "", str(error)) or type(error).__name__
        return Transient(f"{self.registry} does not answer ({why[:100]})")


def _auth(header: str) -> dict[str, str]:
    return {"Authorization": header} if header else {}


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def read_limited(response: httpx.Response, limit: int, registry: str) -> bytes:
    """Read a reply of at most `limit` bytes; a longer error reply is cut."""
    data = bytearray()
    for chunk in response.iter_raw():
        data += chunk
        if len(data) > limit and response.is_error:
            return bytes(data[:limit])
        if len(data) > limit:
            raise InputRefused(
                f"{registry} sent an unexpectedly large reply: more than {limit} bytes",
                hint="check that this is a registry's address, and not a proxy's web page",
            )
    return bytes(data)


def retry_after(headers: httpx.Headers) -> float | None:
    """Return Retry-After in seconds, whether given as a number or as a date (RFC 9110)."""
    text = headers.get("retry-after", "")
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def is_full(reply: RegistryReply) -> bool:
    """Say whether the registry's disk is full."""
    # docker-registry reports errno 28 of its own file system, with status 500.
    full = b"no space left" in reply.body or b'"Err":28' in reply.body
    return reply.status == 507 or (reply.status == 500 and full)


def json_object(body: bytes) -> Mapping[str, JsonValue]:
    """Return the JSON object in a body, or an empty one."""
    try:
        value = parse(body)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def stated_error(body: bytes) -> str:
    """Return the first error of the specification's error body in one line, or empty."""
    errors = json_object(body).get("errors")
    first = errors[0] if isinstance(errors, list) and errors else {}
    if not isinstance(first, dict):
        return ""
    detail = first.get("detail")
    if detail and not isinstance(detail, str):
        detail = json.dumps(detail)[:200]
    parts = (first.get("code"), first.get("message"), detail)
    return "; ".join(str(part) for part in parts if part)


def anonymous(_host: str) -> None:
    """Return no credentials: anonymous access."""


@dataclass(frozen=True, slots=True)
class Challenge:
    """What a 401 reply asks for: `basic`, or `bearer` with the token service's URL."""

    kind: str
    realm: str = ""
    service: str = ""


def parse_challenge(headers: list[str]) -> Challenge | None:
    """Parse WWW-Authenticate headers; Bearer before Basic, None for unsupported schemes."""
    text = ", ".join(headers)[:_LONGEST_CHALLENGE]
    bearer = re.search(r"(?i)\bbearer\s++(.*)", text)
    if bearer:
        pairs = {key.lower(): quoted or bare for key, quoted, bare in _PAIR.findall(bearer[1])}
        if pairs.get("realm"):
            return Challenge("bearer", pairs["realm"], pairs.get("service", ""))
    return Challenge("basic") if re.search(r"(?i)\bbasic\b", text) else None


def basic(pair: tuple[str, str]) -> str:
    """Return the Authorization header of a user and a password."""
    return "Basic " + base64.b64encode(":".join(pair).encode()).decode()


def credentials_in(config: Mapping[str, JsonValue], helper: Helper | None = None) -> Credentials:
    """Return a lookup in a parsed `~/.docker/config.json`, in Docker's own order.

    A host's helper (`credHelpers`), then the store (`credsStore`), then `auths`.
    https://docs.docker.com/reference/cli/docker/login/
    """

    def find(host: str) -> tuple[str, str] | None:
        keys = [_HUB_KEY, "index.docker.io", host] if host == DOCKER_HUB else [host]
        helpers = _matching(config.get("credHelpers"), keys)
        program = next(helpers, config.get("credsStore"))
        if program and helper and (found := helper(str(program), keys[0])):
            return found
        entry = next((one for one in _matching(config.get("auths"), keys) if one), None)
        return _stored(entry, host) if entry else None

    return find


def _matching(table: JsonValue, keys: Sequence[str]) -> Iterator[JsonValue]:
    """Yield a table's values for these keys, then for URLs with these hosts, as Docker does."""
    rows = table if isinstance(table, dict) else {}
    yield from (rows[key] for key in keys if key in rows)
    for name, value in rows.items():
        if name not in keys and re.sub(r"^https?://", "", name).partition("/")[0] in keys:
            yield value


def _stored(entry: JsonValue, host: str) -> tuple[str, str] | None:
    if not isinstance(entry, dict):
        raise _damaged(host)
    if entry.get("identitytoken"):
        return IDENTITY, str(entry["identitytoken"])
    if entry.get("username") and not entry.get("auth"):  # beside it, Docker ignores them
        return str(entry["username"]), str(entry.get("password", ""))
    try:
        user, colon, secret = (
            base64.b64decode("".join((entry.get("auth") or "").split()), validate=True)
            .decode()
            .partition(":")
        )
    except (ValueError, TypeError, AttributeError):
        raise _damaged(host) from None
    return (user, secret) if colon else None


def _damaged(host: str) -> InputRefused:
    return InputRefused(
        f"the entry for {host} in Docker's config.json is damaged",
        hint=f"run `docker login {host}` again",
    )
