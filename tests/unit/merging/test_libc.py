"""What a merge asks of the C library: memory that is kept, files that have their place."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.merging import libc, stream

FAULTS = """
import resource, sys
import numpy as np
from weightsmith.merging.libc import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def round_():
    arrays = [np.ones(1 << 20) for _ in range(3)]
    del arrays
round_(), round_()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    round_()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way: str) -> int:
    argv = [sys.executable, "-c", FAULTS, way]
    return int(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is another one")
def test_freed_memory_is_used_again() -> None:
    # 24 MiB, ten times: 61,440 pages of 4 KiB where each is taken from the system.
    assert faults("kept") < 1000 < faults("given back")


def test_a_reserved_file_has_its_size_and_its_place(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        libc.reserve(file.fileno(), 3 << 20)
        found = os.fstat(file.fileno())

    assert found.st_size == 3 << 20
    assert found.st_blocks * 512 >= 3 << 20


def test_a_file_system_that_cannot_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        @staticmethod
        def fallocate(*_: object) -> int:
            ctypes.set_errno(errno.EOPNOTSUPP)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: Library)

    with (tmp_path / "file").open("wb") as file:
        libc.reserve(file.fileno(), 10)

    assert (tmp_path / "file").stat().st_size == 0


def test_a_full_disk_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(stream, "reserve", full)

    with pytest.raises(EnvironmentFailure, match="No space left on device"):
        stream.Writer(tmp_path / "model.safetensors", 100)

    assert not list(tmp_path.iterdir())
