"""A written file is whole, or what was there before stays."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from weightsmith.core import files
from weightsmith.core.files import marked, write_folder, write_whole


def test_a_file_is_replaced_in_a_folder_that_is_made(tmp_path: Path) -> None:
    path = tmp_path / "new" / "facts.json"
    write_whole(path, b"one")
    write_whole(path, b"two")

    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["facts.json"]


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "facts.json"
    write_whole(path, b"one")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"two")

    assert path.read_bytes() == b"one"
    assert [p.name for p in tmp_path.iterdir()] == ["facts.json"]


def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether one is written or several of a folder: those need one wait for all names."""
    events: list[tuple[str, str]] = []
    replace = Path.replace

    def synced(handle: int) -> None:
        path = Path(f"/proc/self/fd/{handle}").readlink()
        events.append(("sync", path.name if path.is_dir() else path.read_text()))

    def replaced(path: Path, target: Path) -> Path:
        events.append(("name", target.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_whole(tmp_path / "one" / "a", b"1")
    write_folder(tmp_path / "two", {"b": b"2", "c": b"3"})
    write_folder(tmp_path / "two", {"b": b"2", "c": b"4"})

    assert events == [
        *[("sync", "1"), ("name", "a"), ("sync", "one")],
        *[("sync", "2"), ("name", "b"), ("sync", "3"), ("name", "c"), ("sync", "two")],
        *[("sync", "4"), ("name", "c"), ("sync", "two")],
    ]


def test_the_mark_of_a_killed_program_goes_with_the_next_one(tmp_path: Path) -> None:
    """As of a fleet in the folder of its results; that of a living one stays."""
    code = (
        "import sys, time; from pathlib import Path; from weightsmith.core.files import marked\n"
        "with marked(Path(sys.argv[1])): print(flush=True); time.sleep(600)"
    )
    program = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE)
    assert program.stdout is not None
    program.stdout.readline()
    with marked(tmp_path):
        assert len(list(tmp_path.iterdir())) == 2
    program.send_signal(signal.SIGKILL)
    program.wait()
    program.stdout.close()
    assert len(list(tmp_path.iterdir())) == 1
    with marked(tmp_path) as name:
        assert [path.name for path in tmp_path.iterdir()] == [name]
    assert list(tmp_path.iterdir()) == []


def test_a_whole_file_system_is_synced_only_where_that_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the kernel tells nothing of lost writes, or the file system is another, it says no."""
    told = subprocess.run(
        ["stat", "-f", "-c", "%T", str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.strip()
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        if told in {"tmpfs", "ext2/ext3"}:
            assert files.sync_all(handle) == (told != "tmpfs")
        monkeypatch.setattr(files, "_SYNCED_WHOLE", frozenset[str]())
        assert not files.sync_all(handle)
        monkeypatch.undo()
        monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release="5.4.0-generic"))
        assert not files.sync_all(handle)
    finally:
        os.close(handle)
