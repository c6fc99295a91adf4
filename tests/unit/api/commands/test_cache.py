"""`cache push`, `pull`, `prune`, `stat`, on a folder that two users share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from weightsmith.api.commands.cache import run_cache
from weightsmith.api.commands.requests import CacheCommand
from weightsmith.cache import uploads
from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.ports import Silent
from weightsmith.core.values import key_of
from weightsmith.outside.store import FileStore


def made(store: Path, count: int = 3) -> FileStore:
    """A store with some results of two files."""
    found = FileStore(store)

    def make(folder: Path) -> dict[str, object]:
        (folder / "sub").mkdir()
        (folder / "sub" / "model.safetensors").write_bytes(bytes(3000))
        (folder / "config.json").write_text("{}")
        (folder / "run").write_text("#!/bin/sh")
        (folder / "run").chmod(0o755)
        return {"count": count}

    for number in range(count):
        found.produce(key_of(note(number)), note(number), make)
    found.close()
    return found


def note(number: int) -> dict[str, object]:
    return {"stage": "merge", "inputs": {"n": number}}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Mapping[str, Any]]:
    """Do one action of the command, as a user with a store of their own."""
    monkeypatch.setenv("WEIGHTSMITH_HOME", str(tmp_path / "private"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    def action(name: str, user: str = "one", keep: int = 0) -> Mapping[str, Any]:
        monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / user))
        asked = CacheCommand(action=name, cache=str(tmp_path / "shared"), keep=str(keep))
        return run_cache(asked, Silent())[0]

    return action


Run = Callable[..., Mapping[str, Any]]


def test_results_go_from_store_to_store(tmp_path: Path, run: Run) -> None:
    made(tmp_path / "one")
    assert run("push")["pushed"] == 3
    again = run("push")
    assert (again["pushed"], again["held"]) == (0, 3)
    assert run("stat")["stages"]["merge"]["results"] == 3

    assert run("pull", user="two")["pulled"] == 3
    assert run("pull", user="two")["held"] == 3
    theirs = {key: entry for key, _, entry in FileStore(tmp_path / "two").results()}
    for key, _, entry in FileStore(tmp_path / "one").results():
        assert theirs[key].tree.files == entry.tree.files
        assert theirs[key].meta == entry.meta
        assert theirs[key].tree.path("run").stat().st_mode & 0o777 == 0o755


def test_the_cache_is_pruned_to_a_size(tmp_path: Path, run: Run) -> None:
    made(tmp_path / "one")
    run("push")
    size = run("stat")["bytes"]
    assert run("prune", keep=size)["deleted"] == 0
    assert run("prune", keep=size - 1)["deleted"] == 1
    assert run("pull", user="two")["pulled"] == 2

    pruned = run("prune")
    assert (pruned["deleted"], pruned["bytes_after"]) == (2, 0)
    assert run("stat")["results"] == 0
    assert not [path for path in (tmp_path / "shared").rglob("*") if path.is_file()]


def test_a_cache_that_cannot_be_used_is_an_error_here(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "_PAUSE_SECONDS", 0.0)
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "blobs").write_text("")
    made(tmp_path / "one")
    with pytest.raises(EnvironmentFailure, match="cannot be used"):
        run("push")


def test_a_folder_that_is_not_there_is_no_empty_cache(tmp_path: Path, run: Run) -> None:
    """Whoever mistypes its name is told; `pull` before the first push gets nothing."""
    for action in ("stat", "prune"):
        with pytest.raises(EnvironmentFailure, match="there is no such folder") as caught:
            run(action)
        assert "correct --cache" in caught.value.hint
    assert run("pull")["pulled"] == 0
    assert not (tmp_path / "shared").exists()


def test_actions_are_checked() -> None:
    with pytest.raises(UsageError, match="unknown"):
        run_cache(CacheCommand(action="clear"), Silent())


def test_to_describe_a_cache_is_not_to_use_it(tmp_path: Path, run: Run) -> None:
    made(tmp_path / "one")
    run("push")
    entries = [*(tmp_path / "shared" / "entries").glob("*.json")]
    for path in entries:
        os.utime(path, (1000, 1000))

    assert run("stat")["oldest_days"] > 1
    assert {path.stat().st_mtime for path in entries} == {1000}


@pytest.mark.parametrize("list_of_blobs", ["no list\n", None])
def test_an_entry_whose_blobs_are_not_known_does_not_keep_others_from_cleaning(
    tmp_path: Path, run: Run, list_of_blobs: str | None
) -> None:
    made(tmp_path / "one")
    run("push")
    broken = tmp_path / "shared" / "entries" / f"{key_of(note(0)).hex}.blobs"
    if list_of_blobs is None:
        broken.unlink()
    else:
        broken.write_text(list_of_blobs)

    assert run("prune", keep=1 << 30)["deleted"] == 0
    assert run("stat")["results"] == 2
    assert run("push")["pushed"] == 1


def test_what_does_not_say_what_it_was_made_of_stays_here(tmp_path: Path, run: Run) -> None:
    store = made(tmp_path / "one", count=1)
    store.produce(key_of("x"), note(1), lambda folder: {"n": (folder / "f").write_bytes(b"1")})
    store.close()

    done = run("push")
    assert (done["pushed"], done["left_out"]) == (1, 1)
