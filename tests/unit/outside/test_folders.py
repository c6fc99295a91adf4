"""A folder as a source: hashed when it is fetched, not when somebody only asks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from weightsmith.core.ports import Silent
from weightsmith.outside import folders
from weightsmith.outside.folders import FolderReader
from weightsmith.outside.store import FileStore


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """100 GB of nothing, and a small file."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    for n in range(4):
        with (made / f"{n}.safetensors").open("wb") as file:
            file.truncate(25 * 10**9)
    return made


def test_asking_reads_no_large_file(folder: Path, tmp_path: Path) -> None:
    reader = FolderReader(FileStore(tmp_path / "store"))
    found = reader.known(str(folder), "", "")
    assert found is not None
    assert found.tree.size == 100 * 10**9 + 2
    assert len({file.digest for file in found.tree.files}) == 5
    os.utime(folder / "0.safetensors", (1, 1))
    assert reader.known(str(folder), "", "") != found


def test_what_was_fetched_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model").mkdir()
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(bytes(1 << 20))
    os.utime(weights, (1, 1))
    monkeypatch.setattr("weightsmith.outside.store._SETTLED_NS", -(10**12))
    monkeypatch.setattr(folders, "_SOON", 1)
    reader = FolderReader(FileStore(tmp_path / "store"))
    place = str(tmp_path / "model")
    before = reader.known(place, "", "")
    fetched = reader.fetch(place, "", "", Silent())
    assert before is not None
    assert before.digest != fetched.digest
    assert reader.known(place, "", "") == fetched
