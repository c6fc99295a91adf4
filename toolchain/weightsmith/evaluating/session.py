"""HTTP session with one server: time limits, size limits, retries, clear errors."""

from __future__ import annotations

import copy
import re
import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from types import TracebackType
from typing import Self, TypeVar

import httpx

from weightsmith.core.errors import CheckFailed, EnvironmentFailure, WeightsmithError
from weightsmith.core.network import DeadlineTransport
from weightsmith.core.ports import Endpoint
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Json, JsonValue, key_of

_LOG_LINES = 15
_NO_ACCESS = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)
_BUSY = (
    httpx.codes.TOO_MANY_REQUESTS,
    httpx.codes.BAD_GATEWAY,
    httpx.codes.SERVICE_UNAVAILABLE,
    httpx.codes.GATEWAY_TIMEOUT,
)
_LOADER_ERRORS = {
    r"exec format error": "the image's program is for another CPU architecture: build it for this "
    "one, or start it on a matching machine",
    r"exec .*: no such file or directory": "the image lacks its program, or the program's loader "
    "or interpreter: build it again on a base that has them",
    r"error while loading shared libraries|Error loading shared library": "the image lacks a "
    "shared library: build it again on a base that has it",
}
"""Pattern of a loader's error -> hint."""
_LISTS = ("logprobs", "top_logprobs")
"""Fields that ask for log-probabilities."""
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionLimits:
    """Limits of a request, in seconds and bytes."""

    request_seconds: float = 120.0
    """From sending a request to the last byte of its response."""
    tries: int = 3
    pause_seconds: float = 1.0
    """Before the second try; doubled for each further one."""
    answer_bytes: int = 4 << 20


class TryAgain(Exception):
    """A failure that a retry may avoid."""


class TooSlow(TryAgain):
    """A timeout: retried only once, because it takes long."""


class Busy(TryAgain):
    """The server, or a proxy before it, has no room now: no question's fault."""


class Unreachable(TryAgain):
    """No server listens at the address."""


class Refused(Exception):
    """A failure that a retry cannot avoid."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


class TooLarge(Refused):
    """A response beyond the limit of its size."""


class NoAnswer(CheckFailed):
    """A running server gave a question no answer: it hung, failed or cut its response (exit 4).

    It may well answer another one. `reason` is without the server's address and log.
    """

    def __init__(self, message: str, *, hint: str, reason: str) -> None:
        super().__init__(message, hint=hint)
        self.reason = reason


class Unanswered(NoAnswer):
    """A question that the server refuses, or answers at too great a length or without a text."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Status and whole body of a response."""

    status: int
    text: str


class ServerSession:
    """Sends requests to one endpoint, from any number of threads.

    `key` is sent as a bearer token; `trusted` are certificate authorities, by default those of the
    certifi package. Failures raise CheckFailed with the server's last log lines (NoAnswer if
    others may be answered), or EnvironmentFailure if no server listens.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        limits: SessionLimits | None = None,
        *,
        key: str = "",
        trusted: ssl.SSLContext | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.limits = limits or SessionLimits()
        # No compression: a small response must not decompress to a large one.
        headers = {"Accept-Encoding": "identity", "User-Agent": "weightsmith"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        self._transport = DeadlineTransport(trusted)
        self._http = httpx.Client(
            transport=self._transport,
            headers=headers,
            timeout=httpx.Timeout(self.limits.request_seconds, connect=10.0),
            trust_env=False,
        )
        self._fields: Mapping[str, JsonValue] = {}
        self._shared: dict[str, _SharedRequest] = {}
        self._urls: dict[str, httpx.URL] = {}

    def adding(self, fields: Mapping[str, JsonValue]) -> Self:
        """Return a session that adds these fields to each request's body."""
        other = copy.copy(self)
        other._fields = {**self._fields, **fields}
        return other

    def share(self, requests: Iterable[tuple[str, Mapping[str, JsonValue]]]) -> None:
        """Send each of these once from now on: later ones get the first one's response.

        They ask for log-probabilities, which changes no answer, so they also stand for the same
        request without, as long as the server takes them.
        """
        self._shared |= {_plain(path, body): _SharedRequest(body) for path, body in requests}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the connections."""
        self._http.close()

    def get(self, path: str) -> Mapping[str, Json]:
        """Return the JSON object of a GET."""
        return self._retried(path, lambda: _object(self._once("GET", path, None)))

    def try_get(self, path: str) -> Answer:
        """Return status and text of a GET for any status, to find out what a server supports."""
        return self._retried(path, lambda: self._once("GET", path, None))

    def post(self, path: str, body: JsonValue, *, most: int = 0) -> Mapping[str, Json]:
        """Return the JSON object in the response to a POST.

        `most` overrides the limit of the response's size in bytes.
        """
        if self._shared and isinstance(body, Mapping):
            place = _plain(path, {**body, **self._fields})
            if (shared := self._shared.get(place)) is not None:
                with suppress(Unanswered):
                    shared.response = shared.response or self._posted(path, shared.body, most)
                    return shared.response
                del self._shared[place]
        return self._posted(path, body, most)

    def _posted(self, path: str, body: JsonValue, most: int) -> Mapping[str, Json]:
        return self._retried(path, lambda: _object(self._once("POST", path, body, most)))

    def try_post(self, path: str, body: JsonValue) -> Answer:
        """Return status and text of a POST for any status, to find out what a server supports.

        Raises CheckFailed only if there is no complete response.
        """
        return self._retried(path, lambda: self._once("POST", path, body))

    def try_once(self, path: str, body: JsonValue, sent: Callable[[], None]) -> Answer:
        """Return status and text of a POST for any status; raise TryAgain without a response.

        Calls `sent` when the whole request is on its way.
        """

        def trace(event: str, _: object) -> None:
            if event == "http11.send_request_body.complete":
                sent()

        with self._opened("POST", path, body, trace) as response:
            return Answer(response.status_code, self._read(response))

    @contextmanager
    def events(self, path: str, body: JsonValue) -> Iterator[Iterator[str]]:
        """Yield the data of each server-sent event of a POST as it arrives; without retries.

        Raises TryAgain or Refused.
        """
        with self._opened("POST", path, body) as response:
            if response.status_code != httpx.codes.OK:
                raise Refused(
                    f"HTTP {response.status_code}: {excerpt(self._read(response))}",
                    response.status_code,
                )
            yield self._data(response)

    def failed(self, path: str, what: str) -> WeightsmithError:
        """Return the error for a request that failed."""
        return CheckFailed(
            f"{self.endpoint.shown}{path}: {what}{self.log()}",
            hint="check the server's log, or send the request with curl",
        )

    def unanswered(self, path: str, what: str) -> Unanswered:
        """Return the error for a question that is at fault itself: others may be answered."""
        failed = self.failed(path, what)
        return Unanswered(failed.message, hint=failed.hint, reason=what)

    def log(self) -> str:
        """Return the server's last log lines after a newline; '' if there are none."""
        lines = self.endpoint.logs(_LOG_LINES).strip()
        return f"\n{lines}" if lines else ""

    def _retried(self, path: str, ask: Callable[[], _Result]) -> _Result:
        pause = self.limits.pause_seconds
        for attempt in range(1, self.limits.tries + 1):
            try:
                return ask()
            except Refused as refusal:
                if refusal.status in _NO_ACCESS:
                    raise EnvironmentFailure(
                        f"{self.endpoint.shown}{path}: {refusal}",
                        hint="set WEIGHTSMITH_API_KEY to a key that the server accepts",
                    ) from None
                if _of_question(refusal):
                    raise self.unanswered(path, str(refusal)) from None
                raise self.failed(path, str(refusal)) from None
            except TryAgain as failure:
                if not self.endpoint.alive():
                    raise died(self.endpoint, f"during a request to {path}") from None
                slow = isinstance(failure, TooSlow)
                if attempt == (min(2, self.limits.tries) if slow else self.limits.tries):
                    if isinstance(failure, Unreachable):
                        raise EnvironmentFailure(
                            f"cannot connect to {self.endpoint.shown}: {failure}{self.log()}",
                            hint="set SSL_CERT_FILE to your CA's certificates"
                            if "CERTIFICATE_VERIFY_FAILED" in str(failure)
                            else "start the server, or correct the URL",
                        ) from None
                    failed = self.failed(path, f"{failure} ({attempt} tries)")
                    if isinstance(failure, Busy):
                        raise failed from None
                    raise NoAnswer(failed.message, hint=failed.hint, reason=str(failure)) from None
            time.sleep(pause)
            pause *= 2
        raise AssertionError("a request is tried at least once")

    def _once(self, method: str, path: str, body: JsonValue, most: int = 0) -> Answer:
        with self._opened(method, path, body) as response:
            return Answer(response.status_code, self._read(response, most))

    @contextmanager
    def _opened(
        self,
        method: str,
        path: str,
        body: JsonValue,
        trace: Callable[[str, object], None] | None = None,
    ) -> Iterator[httpx.Response]:
        extensions = {"trace": trace} if trace else {}
        seconds = self.limits.request_seconds
        if path not in self._urls:  # parsing takes a fifth of a request's time
            self._urls[path] = httpx.URL(f"{self.endpoint.url.rstrip('/')}{path}")
        if self._fields and isinstance(body, Mapping):
            body = {**body, **self._fields}
        try:
            with (
                self._transport.within(seconds),
                self._http.stream(
                    method, self._urls[path], json=body, extensions=extensions
                ) as response,
            ):
                yield response
        except httpx.TimeoutException:
            raise TooSlow(f"no response within {seconds:g} s") from None
        except httpx.ConnectError as error:
            raise Unreachable(str(error)) from None
        except httpx.HTTPError as error:
            raise TryAgain(excerpt(f"{type(error).__name__}: {error}")) from None

    def _read(self, response: httpx.Response, most: int = 0) -> str:
        return b"".join(self._parts(response, most)).decode("utf-8", "replace")

    def _parts(self, response: httpx.Response, most: int = 0) -> Iterator[bytes]:
        most = most or self.limits.answer_bytes
        size = 0
        for part in response.iter_raw():
            size += len(part)
            if size > most:
                raise TooLarge(f"the response is larger than {most} bytes")
            yield part

    def _data(self, response: httpx.Response) -> Iterator[str]:
        """Yield the data of server-sent events (HTML standard, 9.2.6)."""
        data, rest = list[str](), b""
        for part in chain(self._parts(response), (b"\n\n",)):
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                text = line.decode("utf-8", "replace").rstrip("\r")
                if text.startswith("data:"):
                    data.append(text[5:].removeprefix(" "))
                elif not text and data:
                    yield "\n".join(data)
                    data = []


@dataclass(slots=True)
class _SharedRequest:
    body: Mapping[str, JsonValue]
    response: Mapping[str, Json] = field(default_factory=dict)


def _plain(path: str, body: Mapping[str, JsonValue]) -> str:
    """Return what a request asks, whether it wants log-probabilities or not."""
    return key_of([path, {k: v for k, v in body.items() if k not in _LISTS}])


def died(endpoint: Endpoint, when: str) -> WeightsmithError:
    """Return the error for a stopped server, with its last log lines."""
    lines = endpoint.logs(_LOG_LINES).strip()
    hint = next(
        (hint for pattern, hint in _LOADER_ERRORS.items() if re.search(pattern, lines)),
        "see its last log lines; a common cause is too little memory",
    )
    return CheckFailed(f"the server stopped {when}" + (f"\n{lines}" if lines else ""), hint=hint)


def excerpt(text: str) -> str:
    """Return a text on one line, at most 200 characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= 200 else flat[:199] + "…"


def _of_question(refusal: Refused) -> bool:
    """Return whether it is the question, and not the address or the server, that is at fault."""
    refused = 400 <= refusal.status < 500 and refusal.status != httpx.codes.NOT_FOUND
    return refused or refusal.status == httpx.codes.OK or isinstance(refusal, TooLarge)


def _object(answer: Answer) -> Mapping[str, Json]:
    status, text = answer.status, answer.text
    if status in _BUSY:
        raise Busy(f"HTTP {status}: {excerpt(text)}")
    if status >= httpx.codes.INTERNAL_SERVER_ERROR:
        raise TryAgain(f"HTTP {status}: {excerpt(text)}")
    if status != httpx.codes.OK:
        raise Refused(f"HTTP {status}: {excerpt(text)}", status)
    try:
        value = parse(text)
    except ValueError:
        raise TryAgain(f"truncated or invalid JSON: {excerpt(text)}") from None
    if not isinstance(value, dict):
        raise Refused(f"the response is not a JSON object: {excerpt(text)}", status)
    return value
