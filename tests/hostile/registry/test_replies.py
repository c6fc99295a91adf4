"""A registry or index replies nonsense, too much, or without an end."""

from __future__ import annotations

import json
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import httpcore
import httpx
import pytest
from weightsmith.core import network
from weightsmith.core.errors import Altered, EnvironmentFailure, InputRefused, WeightsmithError
from weightsmith.core.network import ReplyLimiter, paced
from weightsmith.core.ports import Silent
from weightsmith.oci.connections import ProxyTransport, unverified
from weightsmith.oci.manifests import read_json
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.oci.session import (
    Challenge,
    RegistryReply,
    RegistrySession,
    json_object,
    parse_challenge,
)
from weightsmith.oci.transfers import _bytes_kept
from weightsmith.outside.pypi import PypiReader
from weightsmith.outside.store import FileStore

from tests.fakes.serving import Replying, Serving, answering, drips_its_head, serving

# Replies that never come whole.

Answer = Callable[[socket.socket], None]


def drips_its_body(caller: socket.socket) -> None:
    caller.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        caller.sendall(b" ")
        time.sleep(0.01)


def drips_replies_before_the_last(caller: socket.socket) -> None:
    while True:
        caller.sendall(b"HTTP/1.1 102 Processing\r\n\r\n")
        time.sleep(0.01)


def floods_with_replies_before_the_last(caller: socket.socket) -> None:
    while True:
        caller.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 1000)


ENDLESS = (
    drips_its_head, drips_its_body, drips_replies_before_the_last,
    floods_with_replies_before_the_last,
)  # fmt: skip


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limits are a fraction of a second."""
    monkeypatch.setattr(network, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(network, "WINDOW", 0.1)
    monkeypatch.setattr(network, "LEAST_RATE", 1 << 20)


@pytest.mark.parametrize("answer", ENDLESS)
@pytest.mark.parametrize("through", ["directly", "a proxy"])
def test_a_reply_that_never_ends_is_given_up(answer, through, hurried):
    """Each byte comes in time, and the last never does."""
    with answering(answer) as host:
        name, proxies = host, {}
        if through == "a proxy":
            name, proxies = "r.example.com", {"http": f"http://{host}"}
        transport = ProxyTransport(unverified(), proxies)
        with (
            Registry(insecure=True, transport=transport, pause=lambda _: None) as client,
            pytest.raises(EnvironmentFailure, match=r"does not end|less than|timed out"),
        ):
            client.pull(Reference.parse(f"{name}/team/model:1"))


def test_a_reply_in_time_is_read_though_others_come_before_it(hurried):
    """Two of them, in pieces, and lines that end as httpx accepts them too."""

    def answers(caller: socket.socket) -> None:
        for part in (
            b"HTTP/1.1 100 Continue\r", b"\n\r\nHTTP/1.1 103 Early Hints\nLink: </a>\n\n",
            b"HTTP/1.1 200 OK\nContent-Length: 2\n", b"\n", b"{}",
        ):  # fmt: skip
            caller.sendall(part)

    with answering(answers) as host, paced(httpx.Client(trust_env=False)) as client:
        assert client.get(f"http://{host}").text == "{}"


def test_how_long_a_server_thinks_is_not_limited_by_the_pace(monkeypatch):
    """Half an hour until it begins; then an hour of a body at a good rate, and one that is slow."""
    now = [0.0]
    monkeypatch.setattr(network, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pace = ReplyLimiter()
    pace.sent()

    def receives(data: bytes, after: float) -> None:
        pace.left(1800)
        now[0] += after
        pace.got(data)

    receives(b"HTTP/1.1 200 OK\r\n", 1800)
    receives(b"A: b\r\n\r\n", 50)
    for _ in range(60):
        receives(bytes(60_000), 59)
    pace.sent()
    receives(b"HTTP/1.1 200 OK\r\n\r\n", 0)
    for _ in range(6):
        receives(b"x", 59.9)
    with pytest.raises(httpcore.ReadTimeout, match="less than 1 kB/s"):
        pace.left(60)


# Headers and bodies that take minutes or gigabytes to read.


@pytest.mark.parametrize("header", [
    "Bearer " + "a" * 16_000, "Bearer " + "a_" * 8_000 + ' realm="https://evil"',
    "Bearer" + " " * 16_000 + "x", "Bearer realm" + " " * 16_000, 'Bearer realm="' * 1_000,
    "bearer " * 2_000, "Basic" * 3_000,
])  # fmt: skip
def test_a_challenge_of_16_kilobytes_is_read_at_once(header):
    """Each header took seconds, for every request; what is longer than any challenge is cut."""
    found = parse_challenge([header])
    assert found is None or "evil" not in found.realm
    assert parse_challenge(['Bearer realm="https://a",' + "a" * 16_000]) == Challenge(
        "bearer", "https://a"
    )


def test_a_list_of_a_hundred_thousand_links_is_read_at_once():
    """A Link header holds "<" a hundred thousand times: no next page, and no minutes."""
    reply = RegistryReply(200, httpx.Headers({"link": "<" * 100_000}), b"", "https://r.example/")
    assert RegistrySession.next_page(None, reply) == ""


class Upload:
    """A registry that answers how far an upload came."""

    def location(self, _: RegistryReply) -> str:
        return ""

    def attempt(self, _what: str, ask, tries: int) -> RegistryReply:
        return RegistryReply(204, httpx.Headers({"range": "0-" + "9" * 60_000}), b"", "")


def test_a_range_of_sixty_thousand_digits_is_none():
    """A registry says that it has 10**60000 bytes of an upload: it is sent anew."""
    assert _bytes_kept(Upload(), RegistryReply(200, httpx.Headers(), b"", "")) is None


DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000


@pytest.mark.parametrize("body", [DEEP, b'{"n": ' + b"9" * 5_000 + b"}", b'{"a":1,"a":2}', b"\xff"])
def test_json_that_no_reader_survives_is_no_reply(body):
    """Manifests, lists, tokens and errors are nested, or say one thing twice."""
    with pytest.raises(InputRefused):
        read_json(body, "r.example/x")
    assert json_object(body) in ({}, {"a": 2})


# What an index of packages answers.


class Answering(Replying):
    """Answers every address with the class's own bytes."""

    said = b""
    packed = False

    def do_GET(self) -> None:
        self.reply(200, self.said, {"Content-Encoding": "gzip"} if self.packed else None)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PypiReader]:
    monkeypatch.delenv("WEIGHTSMITH_WHEELS", raising=False)
    with serving(Serving(Answering)) as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        yield PypiReader(FileStore(tmp_path / "store"))


def row(**changed: object) -> bytes:
    """Return a listing of one wheel, some of its row changed."""
    fields = {"filename": "m-1-py3-none-any.whl", "url": "x.whl", "hashes": {"sha256": "0" * 64}}
    return json.dumps({"files": [fields | changed]}).encode()


LISTINGS = {
    "nested": DEEP,
    "a list": b"[]",
    "files are a number": b'{"files": 7}',
    "rows are numbers": b'{"files": [7]}',
    "an empty row": b'{"files": [{}]}',
    "no name": row(filename=None),
    "no digest": row(hashes={"md5": "0"}),
    "a digest that is none": row(hashes={"sha256": ["x"]}),
    "an address that is none": row(url="http://[::1"),
    "a size that is none": row(size="x"),
    "a size of half the world": row(size=10**40),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", LISTINGS)
def test_a_listing_of_another_shape_ends_without_a_trace(reader, monkeypatch, case):
    """An index answers with JSON that is no listing: an error that says so, whatever it is."""
    monkeypatch.setattr(Answering, "said", LISTINGS[case])
    with pytest.raises(WeightsmithError) as caught:
        reader.fetch("pypi://m==1", "", "", Silent())
    assert caught.value.exit_code in (3, 5)


@pytest.mark.slow
def test_a_listing_that_unfolds_into_gigabytes_is_not_unfolded(reader, monkeypatch):
    """A megabyte of gzip is a gigabyte of listing: it was never asked for, and is not unfolded."""
    unfolding = zlib.compressobj(9, zlib.DEFLATED, 31)
    data = b"".join(unfolding.compress(bytes(1 << 20)) for _ in range(64)) + unfolding.flush()
    monkeypatch.setattr(Answering, "said", data)
    monkeypatch.setattr(Answering, "packed", True)
    monkeypatch.setattr(httpx._decoders.GZipDecoder, "decode", lambda *_: pytest.fail("unfolded"))
    with pytest.raises(EnvironmentFailure, match="pypi://m"):
        reader.fetch("pypi://m==1", "", "", Silent())


def test_a_wheel_that_never_ends_is_cut_off(reader, monkeypatch):
    """An index sends far more than the size that it told: no more than that is written."""
    monkeypatch.setattr(Answering, "said", row(size=100))
    sizes: list[int] = []
    monkeypatch.setattr(Silent, "advance", lambda _self, done, *_: sizes.append(done))
    with pytest.raises(Altered, match="0" * 64):
        reader.fetch("pypi://m==1", "", "0" * 64, Silent())
    assert not sizes


def test_a_listing_whose_head_never_ends_is_given_up(reader, monkeypatch):
    """Each byte comes in time, and the last never does."""
    monkeypatch.setattr(network, "HEAD_SECONDS", 0.1)
    with answering(drips_its_head) as host:
        monkeypatch.setenv("PIP_INDEX_URL", f"http://{host}/simple")
        with pytest.raises(EnvironmentFailure, match="package index"):
            reader.fetch("pypi://m==1", "", "", Silent())
