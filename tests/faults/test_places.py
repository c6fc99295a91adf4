"""Disks that are full or read-only, folders that cannot be written, a user without a home."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.workshop import Finished, Workshop, mounted, remount

pytestmark = pytest.mark.builders


@pytest.mark.root
@pytest.mark.grid(3)
@pytest.mark.parametrize("stage", ["quantize", "merge", "bake"])
def test_a_disk_that_fills_during_a_stage(
    empty: Workshop, digest: str, stage: str, reference: Finished
) -> None:
    with mounted(empty.store, "-t", "tmpfs", "-o", "size=200m"):
        for _ in range(5):
            # The reference's results, but for those from the stage on.
            shutil.copytree(reference.store, empty.store, dirs_exist_ok=True)
            empty.forget("base" if stage == "bake" else stage)
            shutil.rmtree(empty.store / "memos", ignore_errors=True)
            running = empty.start_build()
            running.wait_for(f"{stage}:")
            fill(empty.store / "filler")
            outcome = running.end()
            if outcome.code != 0:
                break
            (empty.store / "filler").unlink()  # the build was quicker than we

        outcome.refused(5, "disk", "WEIGHTSMITH_STORE")
        empty.check_whole()
        (empty.store / "filler").unlink()
        remount(empty.store, "size=400m")
        empty.check_intact(digest)
        assert not list(empty.store.glob("partial/*"))


def fill(path: Path) -> None:
    """Leave a file system no room, at once: a stage may be done in some tenths of a second."""
    with path.open("wb") as file:
        while True:
            told = os.statvfs(path)
            if told.f_bavail == 0:
                return
            with suppress(OSError):  # others take room as well
                end = os.fstat(file.fileno()).st_size
                os.posix_fallocate(file.fileno(), end, told.f_bavail * told.f_frsize)


@pytest.mark.root
@pytest.mark.grid(2)
@pytest.mark.parametrize("format_", ["q8_0", "fp8"])
def test_a_full_disk_for_a_quantized_model(empty: Workshop, format_: str) -> None:
    small = empty.folder / "small"
    model = ("--model", str(empty.tiny / "base"), "--format", format_)
    with mounted(small, "-t", "tmpfs", "-o", "size=1m"):
        words = ("quantize", *model, "--runner", "local", "--out", str(small / "out"))
        error = empty.run(*words).refused(5, "the disk is full", str(small))

        assert "File" not in error["message"]
        assert not list(small.iterdir())


@pytest.mark.root
def test_a_full_disk_for_the_results(workshop: Workshop, digest: str) -> None:
    with mounted(workshop.folder / "dist", "-t", "tmpfs", "-o", "size=4m"):
        workshop.build().refused(5, str(workshop.folder / "dist"), "disk")

        assert not (workshop.results / "image").exists()
        remount(workshop.folder / "dist", "size=200m")
        workshop.check_intact(digest)


@pytest.mark.root
def test_read_only_results(workshop: Workshop, digest: str) -> None:
    dist = workshop.folder / "dist"
    with mounted(dist, "--bind", str(workshop.tiny)):
        remount(dist, "ro,bind")

        workshop.build().refused(5, str(dist), "permissions")

    workshop.check_intact(digest)


@pytest.mark.root
def test_a_cache_that_cannot_be_written(workshop: Workshop, digest: str) -> None:
    workshop.forget("merge")
    with mounted(workshop.folder / "sealed", "-t", "tmpfs", "-o", "size=1m,ro"):
        outcome = workshop.build(env={"WEIGHTSMITH_HOME": str(workshop.folder / "sealed")})

        outcome.refused(5, str(workshop.folder / "sealed"), "WEIGHTSMITH_HOME")

    workshop.check_intact(digest)


@pytest.mark.root
def test_a_full_cache(workshop: Workshop, digest: str) -> None:
    """The image that is tried is unpacked there."""
    workshop.forget("smoke", "trial")
    with mounted(workshop.folder / "small", "-t", "tmpfs", "-o", "size=1m"):
        small = workshop.folder / "small"
        outcome = workshop.build(env={"WEIGHTSMITH_HOME": str(small)})

        outcome.refused(5, str(small), "no space", "WEIGHTSMITH_HOME")
        assert not list(small.glob("jobs/*"))

    workshop.check_intact(digest)


def test_an_unwritable_lock_of_another_user(workshop: Workshop, digest: str) -> None:
    for lock in (workshop.store / "locks").iterdir():
        lock.chmod(0o444)

    assert workshop.build().digest == digest
    assert os.access(workshop.store, os.W_OK)
