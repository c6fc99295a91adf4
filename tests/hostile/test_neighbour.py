"""The attacker is another user or process on the same machine, or on a volume that both mount."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from weightsmith.building.wiring import make_store, require_folders
from weightsmith.core import files
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.files import folder_lock, replace_file, sibling_folder, sweep, write_whole
from weightsmith.core.ports import Silent
from weightsmith.core.privacy import AnothersFolder, is_shared, private, require_own
from weightsmith.core.values import Digest, key_of
from weightsmith.fleets.ordering import _token
from weightsmith.outside.checkup import _privacy
from weightsmith.outside.ownership import private_folder
from weightsmith.outside.registries import PushedLayers
from weightsmith.outside.store import FileStore
from weightsmith.outside.worker_protocol import open_log
from weightsmith.recipe.file import read_recipe
from weightsmith.steps.lock import read_lock, write_lock

from tests.fakes.users import NOBODY, somebody_else

# Other users' files.


@pytest.mark.root
def test_another_users_results_do_not_stop_cleaning():
    """A shared store holds results of a user who gave nobody the right to delete them."""
    with somebody_else() as home:
        mine, theirs = FileStore(home), key_of("theirs")
        for key in (theirs, key_of("mine")):
            mine.produce(key, {}, lambda folder: {"n": (folder / "f").write_bytes(b"12")})
        mine.close()
        os.seteuid(0)
        for path in (home / "results" / theirs.hex, home / "locks" / theirs.hex):
            os.chown(path, 0, 0)
        (home / "results" / theirs.hex / "manifest.json").chmod(0o644)
        os.seteuid(NOBODY)
        done = FileStore(home).clean(0)
        assert (done["deleted"], done["in_use"]) == (1, 1)
        assert [path.name for path in (home / "results").iterdir()] == [theirs.hex]


# Two writers of one file: their names for what is not finished, and what they leave.

_TWO_CONTAINERS = """
import sys
from pathlib import Path
from weightsmith.core.files import write_whole
mine, path = sys.argv[1].encode() * 5000, Path(sys.argv[2])
for _ in range(400):
    write_whole(path, mine)
    seen = path.read_bytes()
    assert len(seen) == 5000 and len(set(seen)) == 1, "mixed"
"""


@pytest.mark.root
@pytest.mark.skipif(not shutil.which("unshare"), reason="no unshare")
def test_two_containers_on_one_volume_lose_and_mix_nothing(tmp_path):
    """Each writes the same file 400 times in a process namespace of its own, as process 1."""
    words = ["unshare", "--pid", "--fork", sys.executable, "-c", _TWO_CONTAINERS]
    writers = [subprocess.Popen([*words, letter, tmp_path / "lock"]) for letter in "ab"]
    assert [writer.wait(300) for writer in writers] == [0, 0]
    assert [left.name for left in tmp_path.iterdir()] == ["lock"]


def test_two_builds_at_once_keep_each_others_pins(tmp_path):
    """Another build of the recipe pins its bases between our reading and our writing the lock."""
    (tmp_path / "recipe.yaml").write_text("name: x\nbase: {source: hf://a/b}\n")
    file = read_recipe(tmp_path / "recipe.yaml")

    def pin(name: str) -> None:
        for number in range(100):
            before = read_lock(file)
            row = {"linux/amd64": str(Digest.of(b""))}
            after = replace(before, bases={**before.bases, f"{name}{number}": row})
            write_lock(before, after, Silent())

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(pin, "ab"))
    assert len(read_lock(file).bases) == 200
    assert sorted(left.name for left in tmp_path.iterdir()) == ["recipe.lock", "recipe.yaml"]


LEFT = f".weightsmith-{files._kernel()}89abcdef"
"""What a writer on this machine calls what is not finished."""


def test_what_another_machine_is_writing_is_left_alone(tmp_path):
    """Locks of folders do not leave a machine on network file systems: theirs look free to us."""
    theirs, forgotten = (tmp_path / f".weightsmith-{n * 16}" for n in "01")
    for folder in (theirs, forgotten):
        (folder / "model").mkdir(parents=True)
    os.utime(forgotten, (1e9, 1e9))

    write_whole(tmp_path / "file", b"")

    assert theirs.is_dir()
    assert not forgotten.exists()


def test_what_a_killed_writer_left_goes_with_the_next_write(tmp_path):
    """A writer was killed with its file half-written; one that is alive keeps its own."""
    (tmp_path / LEFT).write_bytes(b"half")
    (tmp_path / ".weightsmith-notes").write_bytes(b"not ours")
    seen = []

    def chunks() -> Iterator[bytes]:
        yield b"whole"
        write_whole(tmp_path / "other", b"")
        seen.extend(path.name for path in tmp_path.iterdir())

    replace_file(tmp_path / "file", chunks())
    assert len([name for name in seen if name.startswith(".weightsmith-")]) == 2
    assert (tmp_path / "file").read_bytes() == b"whole"
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"file", "other", ".weightsmith-notes"}


_KILLED = """
import os, signal, sys
from pathlib import Path
from weightsmith.fleets.ordering import _token
with _token(Path(sys.argv[1])):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_fleet_left_in_its_results_goes_with_the_next(tmp_path):
    """By this file, nodes know that they see the folder; that of a living fleet stays."""
    subprocess.run([sys.executable, "-c", _KILLED, tmp_path], check=False)
    assert len([*tmp_path.iterdir()]) == 1

    with _token(tmp_path) as alive:
        write_whole(tmp_path / "fleet.json", b"{}")
        assert {path.name for path in tmp_path.iterdir()} == {alive, "fleet.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["fleet.json"]


def test_what_a_killed_container_left_in_the_cache_is_deleted(tmp_path):
    """A job's folder of a container that is gone; its process number may be anybody's here."""
    with private_folder(tmp_path) as alive:
        dead = tmp_path / "jobs" / LEFT
        (dead / "root").mkdir(parents=True)
        with private_folder(tmp_path):
            assert not dead.exists()
            assert alive.is_dir()


def test_a_link_with_the_name_of_something_unfinished_is_not_followed(tmp_path):
    """A neighbour lays links where we sweep: what they lead to stays."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_bytes(b"")
    swept = tmp_path / "swept"
    swept.mkdir()
    (swept / LEFT).symlink_to(kept)
    (swept / f"{LEFT[:-1]}0").symlink_to(kept / "file")
    os.mkfifo(swept / f"{LEFT[:-1]}1")
    sweep(swept)
    assert (kept / "file").exists()
    with sibling_folder(swept / "out") as made:
        assert made.stat().st_mode & 0o777 == 0o700


def test_a_file_system_without_locks_loses_nothing(tmp_path, monkeypatch):
    """A network volume refuses every lock: files are replaced as ever, and nothing is swept."""

    def refuse(_handle: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    (tmp_path / LEFT).write_bytes(b"perhaps somebody's")
    write_whole(tmp_path / "file", b"1")
    write_whole(tmp_path / "file", b"2")
    assert (tmp_path / "file").read_bytes() == b"2"
    assert (tmp_path / LEFT).exists()


def test_who_waits_for_a_folder_that_is_renamed_meanwhile_gets_no_other(tmp_path):
    """Another merge finishes into the folder that we are about to write to."""
    folder = tmp_path / "folder"
    folder.mkdir()
    with folder_lock(folder):
        with pytest.raises(BlockingIOError), folder_lock(folder, wait=False):
            pass
        folder.rename(tmp_path / "done")
    with pytest.raises(FileNotFoundError), folder_lock(folder):
        pass


# Other users' eyes: cache and store are their owner's alone.


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def use(home: Path) -> None:
    """Do what makes each kind of folder: a result, a memo, a job, a log, a push."""
    with umask(0o000):
        store = FileStore(home / "cache" / "store")
        result = store.produce(key_of(1), {}, lambda data: {"n": (data / "f").write_bytes(b"w")})
        assert (result.tree.root / "f").stat().st_mode & 0o777 == 0o644, "as the layers have it"
        store.memo("question", lambda: "answer")
        store.close()
        with private_folder(home / "cache"), open_log(home / "cache", "job") as log:
            log.write("answer")
        PushedLayers(home / "cache").record("registry", "repository", [Digest.of(b"")])


def open_places(folder: Path) -> set[str]:
    """Return the folders below that others may enter, and logs that they may read."""
    places = [folder, *folder.rglob("*")]
    places = [path for path in places if path.is_dir() or path.suffix == ".log"]
    inner = [path for path in places if "results" not in path.parts]  # behind a closed one
    return {str(path) for path in inner if path.stat().st_mode & 0o077}


@pytest.mark.parametrize(
    "left_open", [(), ("cache/store/results", "cache/store/locks", "cache/logs", "cache/jobs")]
)
def test_whatever_the_umask_others_do_not_see_the_cache(tmp_path, left_open):
    """The home is open to everybody, as on many machines, and the umask forbids nothing.

    Or cache and store are there, with the rights that an earlier version left them.
    """
    for name in left_open:
        (tmp_path / name).mkdir(parents=True)
        for folder in (tmp_path / "cache", tmp_path / name):
            folder.chmod(0o755)
    use(tmp_path)
    assert open_places(tmp_path / "cache") == set()
    assert (tmp_path / "cache" / "store" / "results").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_holds_other_things_stays_open_itself(tmp_path):
    """WEIGHTSMITH_HOME names a folder such as /var/cache: only what is ours in it is closed."""
    (tmp_path / "cache" / "apt").mkdir(parents=True)
    for path in (tmp_path / "cache", tmp_path / "cache" / "apt"):
        path.chmod(0o755)
    use(tmp_path)
    cache = tmp_path / "cache"
    assert open_places(cache) == {str(cache), str(cache / "apt")}


def test_a_store_that_a_group_shares_on_purpose_stays_shared(tmp_path):
    """The owner gave it to a group (chmod g+rws): members build in it, and doctor says so."""
    store = tmp_path / "cache" / "store"
    store.mkdir(parents=True)
    store.chmod(0o2770)
    (tmp_path / "cache").chmod(0o755)
    use(tmp_path)
    assert store.stat().st_mode & 0o7777 == 0o2770
    assert (store / "results").stat().st_mode & 0o070 == 0o070
    assert "shared with a group" in _privacy(store, store).found


ANOTHERS = ("", "results", "digests", "locks")
"""A store, and folders in it; the rest is one's own."""


@pytest.mark.root
@pytest.mark.parametrize("name", ANOTHERS)
@pytest.mark.parametrize("mode", [0o700, 0o755, 0o2777])
def test_a_store_that_belongs_to_another_user_is_not_used(tmp_path, name, mode, monkeypatch):
    """They laid it where we will look: nothing in it is believed, and nothing is written to it."""
    store = tmp_path / "store"
    store.mkdir(mode=0o700)
    place = store / name
    place.mkdir(exist_ok=True)
    os.chown(place, NOBODY, NOBODY)
    place.chmod(mode)
    monkeypatch.setenv("WEIGHTSMITH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(store))

    for use_it in (make_store, require_folders, lambda: FileStore(store).require_room(1, "it")):
        with pytest.raises(EnvironmentFailure, match=rf"{place}: it belongs to another user"):
            use_it()
    said = _privacy(tmp_path / "cache", store)
    assert not said.ok
    assert str(place) in said.found


@pytest.mark.root
def test_what_root_prepared_or_a_group_shares_is_used():
    """As a user: a store in an image is root's, and one with g+rws is for the group's members."""
    with somebody_else() as home:
        for owner, group, mode in ((0, 0, 0o755), (1, NOBODY, 0o2775)):
            os.seteuid(0)
            store = home / f"store-{owner}"
            (store / "results").mkdir(parents=True)
            for folder in (store, store / "results"):
                os.chown(folder, owner, group)
                folder.chmod(mode)
            os.seteuid(NOBODY)
            assert require_own(store).anothers == {}
        assert is_shared(home / "store-1")
        os.seteuid(0)
        os.chown(home / "store-1", 1, 1)
        os.seteuid(NOBODY)
        assert not is_shared(home / "store-1")
        with pytest.raises(AnothersFolder):
            require_own(home / "store-1")


def test_a_file_system_that_gives_all_files_one_owner_is_used(tmp_path, monkeypatch):
    """What we make there is not ours by name, as on NFS that maps users; so is what was made."""
    monkeypatch.setattr(os, "geteuid", lambda: tmp_path.stat().st_uid + 1)
    assert private(tmp_path / "store", "results").is_dir()
    assert private(tmp_path / "store", "results").is_dir()


def test_doctor_names_what_others_may_read(tmp_path):
    """Nothing ran since the folders were made open: doctor says which, and changes nothing."""
    (tmp_path / "logs").mkdir(mode=0o755)
    tmp_path.chmod(0o755)
    said = _privacy(tmp_path, tmp_path / "store")
    assert str(tmp_path / "logs") in said.found
    assert not said.ok
    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o755
