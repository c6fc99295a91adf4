"""The hub reader against a small local server of the hub's API."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from weightsmith.core.errors import Altered, EnvironmentFailure, InputRefused
from weightsmith.core.ports import Silent
from weightsmith.outside import checkup
from weightsmith.outside.hub import HubReader
from weightsmith.outside.store import FileStore

from tests.fakes.hub import COMMIT, FILES, FakeHub, fake_hub


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(tmp_path / "cache", monkeypatch) as state:
        yield state


@pytest.fixture
def reader(tmp_path: Path) -> HubReader:
    return HubReader(FileStore(tmp_path / "store"))


def test_an_unpinned_repository_is_resolved_to_its_commit(hub: FakeHub, reader: HubReader) -> None:
    snapshot = reader.fetch("hf://team/model", "", "", Silent())

    assert snapshot.pin == f"hf://team/model@{COMMIT}"
    assert not snapshot.pinned
    names = {file.path for file in snapshot.tree.files}
    assert {"config.json", "model.safetensors"} <= names
    assert "pytorch_model.bin" not in names
    assert snapshot.tree.path("model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_pinned_one_comes_from_the_cache_without_the_hub(hub: FakeHub, reader: HubReader) -> None:
    assert reader.known("hf://team/model", COMMIT, "") is None
    first = reader.fetch("hf://team/model", COMMIT, "", Silent())
    assert first.pinned
    hub.server.shutdown()
    again = reader.known("hf://team/model", COMMIT, "")

    assert again is not None
    assert again.digest == first.digest
    assert hub.fetched.count("model.safetensors") == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hf://team/absent", "team/absent"),
        ("hf://team/secret", "gated"),
        ("hf://team/model@nothing", "nothing"),
        ("hf://not/a/repository", "not/a/repository"),
    ],
)
def test_what_is_not_ours_to_read_is_refused(hub, reader, source: str, message: str) -> None:
    with pytest.raises(InputRefused, match=message) as caught:
        reader.fetch(source, "", "", Silent())
    assert caught.value.hint


@pytest.mark.parametrize("revision", [COMMIT, ""])
def test_a_hub_that_is_down_is_an_environment_failure(
    hub: FakeHub, reader: HubReader, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    hub.server.shutdown()
    hub.server.server_close()
    monkeypatch.setattr(time, "sleep", lambda _: None)  # half a minute between the client's tries
    with pytest.raises(EnvironmentFailure, match="could not be reached") as caught:
        reader.fetch("hf://team/model", revision, "", Silent())
    assert "HF_ENDPOINT" in caught.value.hint


def test_what_is_in_the_cache_is_taken_where_the_hub_is_down(
    hub: FakeHub, reader: HubReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = reader.fetch("hf://team/model", COMMIT, "", Silent())
    hub.listing = False
    assert reader.fetch("hf://team/model", COMMIT, "", Silent()).digest == first.digest
    hub.server.shutdown()
    hub.server.server_close()
    monkeypatch.setattr(time, "sleep", lambda _: None)
    assert reader.fetch("hf://team/model", COMMIT, "", Silent()).digest == first.digest


def test_the_digest_is_that_of_the_wanted_files_whatever_else_the_cache_holds(
    hub: FakeHub, reader: HubReader
) -> None:
    first = reader.fetch("hf://team/model", COMMIT, "", Silent())
    hub.files["vocab.tiktoken"] = b"not asked for"
    (first.tree.root / "vocab.tiktoken").write_bytes(b"by another program")
    assert reader.fetch("hf://team/model", COMMIT, "", Silent()).digest == first.digest
    known = reader.known("hf://team/model", COMMIT, "")
    assert known is not None
    assert known.digest == first.digest


@pytest.mark.parametrize("offline", [False, True])
def test_weights_that_the_user_converted_beside_a_pickle_are_taken(
    hub: FakeHub, reader: HubReader, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    """As our own error says to: the commit has a pickle only, and the folder the safe file too."""
    del hub.files["model.safetensors"]
    root = reader.fetch("hf://team/model", COMMIT, "", Silent()).tree.root
    (root / "model.safetensors").write_bytes(b"converted")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    again = reader.fetch("hf://team/model", COMMIT, "", Silent())
    assert again.tree.path("model.safetensors").read_bytes() == b"converted"
    assert reader.known("hf://team/model", COMMIT, "") is not None


@pytest.mark.parametrize("offline", [False, True])
def test_a_file_that_the_user_edited_or_that_cannot_be_fetched_again_is_not_deleted(
    hub: FakeHub, reader: HubReader, monkeypatch: pytest.MonkeyPatch, offline: bool
) -> None:
    """Offline, an altered blob of a cache that others share stays for them to look at."""
    root = reader.fetch("hf://team/model", COMMIT, "", Silent()).tree.root
    file = root / "config.json"
    if offline:
        file.resolve().write_bytes(b"{}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    else:
        file.unlink()
        file.write_bytes(b"{}")
    with pytest.raises(Altered, match="config") as caught:
        reader.fetch("hf://team/model", COMMIT, "", Silent())
    assert file.read_bytes() == b"{}"
    assert f"it was not deleted: delete {file} yourself" in caught.value.hint


def test_doctor_says_that_there_is_a_token_and_not_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("HF_TOKEN", "hf_s3cret")
    found = checkup._hub()
    monkeypatch.delenv("HF_TOKEN")
    lacking = checkup._hub()

    assert found.ok
    assert "s3cret" not in found.found + found.todo
    assert not lacking.ok
    assert "HF_TOKEN" in lacking.todo
