"""A user's folder as the place of a stage's result."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from weightsmith.core.errors import (
    CheckFailed,
    EnvironmentFailure,
    InputRefused,
    UsageError,
    of_machine,
)
from weightsmith.steps.destinations import in_folder
from weightsmith.steps.tools import Tools

from tests.fakes.memory import memory_tools


@pytest.fixture
def tools(tmp_path: Path) -> Tools:
    return memory_tools(tmp_path / "store")


def write(*names: str) -> Any:
    def make(folder: Path) -> Mapping[str, Any]:
        for name in names:
            (folder / name).write_bytes(name.encode())
        return {"left": sorted(path.name for path in folder.iterdir() if path.name not in names)}

    return make


def no_key() -> Any:
    raise AssertionError("a user's folder needs no key")


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("resume", [False, True])
def test_leftovers_are_used_only_where_both_can_tell_what_they_are(
    tmp_path: Path, tools: Tools, resumes: bool, resume: bool
) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "old").write_text("of another run")

    with in_folder(tmp_path / "out", "x", tools, resumes=resumes) as to:
        made = to.files(no_key, write("new"), resume=resume)

    assert made.meta["left"] == (["old"] if resume and resumes else [])
    assert (tmp_path / "out" / "new").read_text() == "new"
    assert not (tmp_path / ".out.partial").exists()


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("error", [CheckFailed, InputRefused, UsageError, EnvironmentFailure])
def test_what_is_left_of_a_run_that_failed(
    tmp_path: Path, tools: Tools, error: Any, resumes: bool
) -> None:
    def run() -> None:
        with in_folder(tmp_path / "out", "x", tools, resumes=resumes) as to:
            to.files(no_key, write("new"))
            raise error("no", hint="no")

    with pytest.raises(error):
        run()

    assert not (tmp_path / "out").exists()
    kept = resumes and error is EnvironmentFailure
    assert (tmp_path / ".out.partial").exists() is kept


def test_a_full_disk_is_named_by_the_users_folder(tmp_path: Path, tools: Tools) -> None:
    """A write to an open file does not say where it was."""
    with pytest.raises(OSError, match="No space") as full, in_folder(tmp_path / "out", "x", tools):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    refused = of_machine(full.value)
    assert refused is not None
    assert str(tmp_path / "out") in refused.message


def test_a_place_where_no_folder_can_be_made_is_named(tmp_path: Path, tools: Tools) -> None:
    """`/proc` says that it does not exist."""
    with (
        pytest.raises(EnvironmentFailure, match=r"cannot make /proc/\.out\.partial") as error,
        in_folder(Path("/proc/out"), "the result", tools),
    ):
        pass
    assert "give a path for the result" in error.value.hint


def test_a_single_file_gets_the_name_and_one_of_that_name_has_the_others_beside_it(
    tmp_path: Path, tools: Tools
) -> None:
    with in_folder(tmp_path / "m.gguf", "x", tools) as to:
        to.files(no_key, write("m.gguf", "mmproj-m.gguf"))
    with in_folder(tmp_path / "parts.gguf", "x", tools) as to:
        to.files(no_key, write("parts-1.gguf", "parts-2.gguf"))

    with in_folder(tmp_path / "n.gguf", "x", tools) as to:
        to.files(no_key, write("other.gguf"))

    assert (tmp_path / "n.gguf").read_text() == "other.gguf"
    files = ["m.gguf", "mmproj-m.gguf"]
    assert [(tmp_path / name).read_text() for name in files] == files
    there = {path.name for path in tmp_path.iterdir()}
    assert there - {"store"} == {*files, "n.gguf", "parts.gguf"}
    assert (tmp_path / "parts.gguf").is_dir()


def test_a_place_that_is_taken_meanwhile_keeps_what_it_has(tmp_path: Path, tools: Tools) -> None:
    def run() -> None:
        with in_folder(tmp_path / "out", "x", tools) as to:
            to.files(no_key, write("new"))
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "mine").touch()

    with pytest.raises(UsageError, match="out"):
        run()

    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert (tmp_path / ".out.partial" / "new").exists()


@pytest.mark.parametrize("there", ["out", ".out.partial"])
def test_a_file_in_the_way_is_named(tmp_path: Path, tools: Tools, there: str) -> None:
    (tmp_path / there).write_text("x")

    with (
        pytest.raises(UsageError, match=there),
        in_folder(tmp_path / "out", "x", tools),
    ):
        pass
