"""Reads a registry's small replies within limits, and the errors and pauses in them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

import httpx

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import JsonValue


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
    parts = (first.get("code"), first.get("message"), _text(first.get("detail")))
    return "; ".join(str(part) for part in parts if part)


def _text(detail: JsonValue) -> str:
    return detail if isinstance(detail, str) else json.dumps(detail)[:200] if detail else ""
