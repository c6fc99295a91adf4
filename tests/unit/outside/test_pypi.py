"""The wheel reader against a small local package index."""

import hashlib
import io
import json
import os
import time
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
from weightsmith.core.errors import Altered, EnvironmentFailure, InputRefused
from weightsmith.core.ports import Silent
from weightsmith.outside import process
from weightsmith.outside.downloading import PipSettings
from weightsmith.outside.pypi import PypiReader, _client
from weightsmith.outside.store import FileStore

from tests.fakes.serving import serving


def wheel_with(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


WHEEL = wheel_with(
    {
        "my_model/__init__.py": b"raise SystemExit",
        "my_model/model.gguf": b"GGUF" + b"x" * 1000,
        "my_model-1.0.dist-info/METADATA": b"Name: my-model",
        "other/readme.txt": b"not beside the weights",
    }
)
SHA256 = hashlib.sha256(WHEEL).hexdigest()


class Index(BaseHTTPRequestHandler):
    """Serves the simple API (PEP 691) of one package, and its wheel."""

    wheel = WHEEL
    cuts: ClassVar[int] = 0
    """Downloads of the wheel that are still to break off."""

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        body, status = b"", 404
        if self.path == "/simple/my-model/":
            name = "my_model-1.0-py3-none-any.whl"
            row = {
                "filename": name, "url": f"../../{name}", "hashes": {"sha256": SHA256},
                "size": len(WHEEL),
            }  # fmt: skip
            body, status = json.dumps({"files": [row]}).encode(), 200
        elif self.path.endswith(".whl"):
            body, status = self.wheel, 200
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.path.endswith(".whl") and Index.cuts:
            Index.cuts -= 1
            body = body[:100]
        self.wfile.write(body)


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.delenv("WEIGHTSMITH_WHEELS", raising=False)
    monkeypatch.setattr(Index, "wheel", WHEEL)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    with serving(server) as url:
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        yield server


@pytest.fixture
def asking_pip(tmp_path: Path) -> PypiReader:
    """One that starts pip for its settings: a third of a second."""
    return PypiReader(FileStore(tmp_path / "store"))


@pytest.fixture
def reader(asking_pip: PypiReader, monkeypatch: pytest.MonkeyPatch) -> PypiReader:
    """One that is told what pip would say."""
    said = property(lambda _: {":env:.index-url": os.environ["PIP_INDEX_URL"]})
    monkeypatch.setattr(PipSettings, "_listed", said)
    return asking_pip


def test_model_files_alone_are_taken_from_the_pinned_wheel(index, reader: PypiReader) -> None:
    snapshot = reader.fetch("pypi://my-model==1.0", "", SHA256, Silent())

    assert [file.path for file in snapshot.tree.files] == ["model.gguf"]
    assert snapshot.pin == f"pypi://my-model==1.0#sha256={SHA256}"
    assert snapshot.pinned


def test_the_index_is_that_of_pips_own_file(
    index, asking_pip: PypiReader, tmp_path: Path, monkeypatch
) -> None:
    file = tmp_path / "pip.conf"
    file.write_text(f"[global]\nindex-url = {os.environ['PIP_INDEX_URL']}\n")
    monkeypatch.delenv("PIP_INDEX_URL")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))

    snapshot = asking_pip.fetch("pypi://my-model==1.0", "", SHA256, Silent())
    assert snapshot.tree.has("model.gguf")


def test_an_unpinned_wheel_is_pinned_by_the_index_and_pip_asked_once(
    index, asking_pip: PypiReader, monkeypatch
) -> None:
    """The listing is read twice and the wheel once; starting pip takes a third of a second."""
    asked, run = [], process.run
    monkeypatch.setattr(process, "run", lambda *a, **k: asked.append(a) or run(*a, **k))
    snapshot = asking_pip.fetch("pypi://my-model==1.0", "", "", Silent())

    assert not snapshot.pinned
    assert snapshot.pin.endswith(SHA256)
    assert len(asked) == 1


def test_a_known_wheel_needs_no_index(index, reader: PypiReader) -> None:
    assert reader.known("pypi://my-model==1.0", "", SHA256) is None
    first = reader.fetch("pypi://my-model==1.0", "", SHA256, Silent())
    index.shutdown()
    again = reader.known("pypi://my-model==1.0", "", SHA256)

    assert again is not None
    assert again.digest == first.digest


def test_a_replaced_wheel_is_refused(index, reader: PypiReader, monkeypatch) -> None:
    monkeypatch.setattr(Index, "wheel", WHEEL + b"tampered")
    with pytest.raises(Altered, match="sha256 is"):
        reader.fetch("pypi://my-model==1.0", "", SHA256, Silent())
    with pytest.raises(InputRefused, match="no wheel with sha256"):
        reader.fetch("pypi://my-model==1.0", "", "0" * 64, Silent())


@pytest.mark.parametrize("cuts", [2, 3])
def test_a_download_that_breaks_off_is_tried_three_times(
    index, reader: PypiReader, monkeypatch: pytest.MonkeyPatch, cuts: int
) -> None:
    monkeypatch.setattr(Index, "cuts", cuts)
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)

    with nullcontext() if cuts == 2 else pytest.raises(EnvironmentFailure, match="broke off"):
        snapshot = reader.fetch("pypi://my-model==1.0", "", SHA256, Silent())
        assert snapshot.tree.has("model.gguf")

    assert [pause for pause in pauses if pause > 1] == [5, 20]


def test_a_folder_of_wheels_is_asked_first(reader: PypiReader, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "my_model-1.0-py3-none-any.whl").write_bytes(WHEEL)
    monkeypatch.setenv("WEIGHTSMITH_WHEELS", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")

    assert reader.fetch("pypi://my-model==1.0", "", SHA256, Silent()).tree.has("model.gguf")


@pytest.mark.parametrize("source", ["pypi://my-model", "pypi://../x==1", "pypi://my-model==1.0 x"])
def test_malformed_sources_and_absent_packages_are_refused(
    index, reader: PypiReader, source: str
) -> None:
    with pytest.raises(InputRefused, match="not a pypi:// source"):
        reader.fetch(source, "", SHA256, Silent())
    with pytest.raises(InputRefused, match="no such package"):
        reader.fetch("pypi://absent==1.0", "", SHA256, Silent())


def test_an_index_that_is_down_is_an_environment_failure(index, reader: PypiReader) -> None:
    index.shutdown()
    index.server_close()
    with pytest.raises(EnvironmentFailure, match="cannot read the package index") as caught:
        reader.fetch("pypi://my-model==1.0", "", SHA256, Silent())
    assert "WEIGHTSMITH_WHEELS" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "value"),
    [("ALL_PROXY", "socks5://127.0.0.1:9"), ("ALL_PROXY", "ftp://x"), ("NO_PROXY", "fd00::/8")],
)
def test_proxies_that_cannot_be_used(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    for other in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(other, raising=False)
        monkeypatch.delenv(other.lower(), raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv(name, value)
    with pytest.raises(EnvironmentFailure, match="proxy"):
        _client(PipSettings())
