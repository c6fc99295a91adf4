"""A hub or mirror that lies, and a cache that somebody changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from weightsmith.core.errors import Altered, EnvironmentFailure
from weightsmith.core.ports import Silent
from weightsmith.outside.hub import HubReader
from weightsmith.outside.store import FileStore

from tests.fakes.hub import COMMIT, FakeHub


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_mirror_changes_a_file(hub: FakeHub, tmp_path: Path, name: str) -> None:
    """A mirror sends other bytes than the hub's list of the commit names; nothing of it stays."""
    reader = HubReader(FileStore(tmp_path / "store"))
    hub.sent[name] = bytes(len(hub.files[name]))
    with pytest.raises(Altered, match=name):
        reader.fetch("hf://team/model", COMMIT, "", Silent())
    assert reader.known("hf://team/model", COMMIT, "") is None
    hub.sent.clear()
    snapshot = reader.fetch("hf://team/model", COMMIT, "", Silent())
    assert snapshot.tree.path(name).read_bytes() == hub.files[name]


def test_the_cache_of_the_hub_was_changed(hub: FakeHub, tmp_path: Path) -> None:
    """Somebody writes into the hub's cache: what lies there is held against the list again."""
    reader = HubReader(FileStore(tmp_path / "store"))
    first = reader.fetch("hf://team/model", COMMIT, "", Silent())
    first.tree.path("config.json").resolve().write_bytes(b"{}")
    assert reader.known("hf://team/model", COMMIT, "") is None
    (first.tree.root.parents[1] / "trees" / f"{COMMIT}.json").unlink()
    with pytest.raises(Altered, match="config"):
        reader.fetch("hf://team/model", COMMIT, "", Silent())
    again = reader.fetch("hf://team/model", COMMIT, "", Silent())
    assert again.digest == first.digest


def test_a_hub_that_answers_nonsense(hub: FakeHub, tmp_path: Path) -> None:
    """A list of another shape than a hub's is the environment's fault, not a bug of ours."""
    hub.row = lambda name: {"type": "file", "path": name}  # type: ignore[method-assign]
    with pytest.raises(EnvironmentFailure, match="hf://team/model"):
        HubReader(FileStore(tmp_path / "store")).fetch("hf://team/model", COMMIT, "", Silent())
