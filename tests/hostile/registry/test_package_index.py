"""A package index answers nonsense, too much, or without an end."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from weightsmith.core import network
from weightsmith.core.errors import Altered, EnvironmentFailure, WeightsmithError
from weightsmith.core.ports import Silent
from weightsmith.outside.pypi import PypiReader
from weightsmith.outside.store import FileStore

from tests.fakes.serving import Replying, Serving, answering, drips_its_head, serving

DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000


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
