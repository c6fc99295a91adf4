"""Replies that take minutes to come, or minutes or gigabytes to read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import httpx
import pytest
from weightsmith import time_limits
from weightsmith.errors import InputRefused
from weightsmith.oci import downloads
from weightsmith.oci.auth import Challenge, parse_challenge
from weightsmith.oci.manifests import read_json
from weightsmith.oci.paging import next_page
from weightsmith.oci.replies import Reply, Transient, json_object, read_limited
from weightsmith.oci.sending import _kept
from weightsmith.values import Blob, Digest


def test_a_registry_that_drips_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reply and a blob come at a byte a minute, without an end: another try, then the end."""
    looks = itertools.count(0.0, 60.0)
    monkeypatch.setattr(time_limits, "time", SimpleNamespace(monotonic=lambda: next(looks)))
    session = SimpleNamespace(stream=lambda *_, **__: nullcontext(dripping()))

    with pytest.raises(Transient, match=r"r\.example\.com"):
        read_limited(dripping(), 1 << 20, "r.example.com")
    wanted = Blob(digest=Digest.of(b"x"), size=1 << 40, media_type="x")
    with pytest.raises(Transient):
        list(downloads._from(session, wanted, 0))


def dripping() -> httpx.Response:
    class Drops(httpx.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            return itertools.repeat(b"x")

    return httpx.Response(200, stream=Drops())


# Headers and bodies that take minutes or gigabytes to read.


@pytest.mark.parametrize("header", [
    "Bearer " + "a" * 16_000, "Bearer " + "a_" * 8_000 + ' realm="https://evil"',
    "Bearer" + " " * 16_000 + "x", "Bearer realm" + " " * 16_000, 'Bearer realm="' * 1_000,
    "bearer " * 2_000, "Basic" * 3_000,
])  # fmt: skip
def test_a_challenge_of_16_kilobytes_is_read_at_once(header: str) -> None:
    """Each header took seconds, for every request; what is longer than any challenge is cut."""
    found = parse_challenge([header])
    assert found is None or "evil" not in found.realm
    assert parse_challenge(['Bearer realm="https://a",' + "a" * 16_000]) == Challenge(
        "bearer", "https://a"
    )


def test_a_list_of_a_hundred_thousand_links_is_read_at_once() -> None:
    """A Link header holds "<" a hundred thousand times: no next page, and no minutes."""
    reply = Reply(200, httpx.Headers({"link": "<" * 100_000}), b"", "https://r.example/")
    assert next_page(None, reply) == ""  # type: ignore[arg-type]


class Upload:
    """A registry that answers how far an upload came."""

    def location(self, _: Reply) -> str:
        return ""

    def attempt(self, _what: str, ask, tries: int) -> Reply:
        return Reply(204, httpx.Headers({"range": "0-" + "9" * 60_000}), b"", "")


def test_a_range_of_sixty_thousand_digits_is_none() -> None:
    """A registry says that it has 10**60000 bytes of an upload: it is sent anew."""
    assert _kept(Upload(), Reply(200, httpx.Headers(), b"", "")) is None  # type: ignore[arg-type]


DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000


@pytest.mark.parametrize("body", [DEEP, b'{"n": ' + b"9" * 5_000 + b"}", b'{"a":1,"a":2}', b"\xff"])
def test_json_that_no_reader_survives_is_no_reply(body: bytes) -> None:
    """Manifests, lists, tokens and errors are nested, or say one thing twice."""
    with pytest.raises(InputRefused):
        read_json(body, "r.example/x")
    assert json_object(body) in ({}, {"a": 2})
