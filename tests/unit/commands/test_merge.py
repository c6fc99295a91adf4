"""`invoke merge`: what becomes of its output folder."""

import fcntl
import os
from pathlib import Path

import pytest

from tests.fakes.runner import FakeRunner, RecordingProgress
from toolchain.commands.merge import Folders, merge_folders
from toolchain.drivers.store import FileStore
from toolchain.errors import UsageError
from toolchain.ports import Tools
from toolchain.recipe import Merge

TINY = Path(__file__).parents[3] / "examples" / "tiny"


def merge_into(out):
    (adapter,) = sorted((TINY / "adapters").iterdir())[:1]
    folders = Folders(base=TINY / "base", adapters=(adapter,), weights=(1.0,))
    tools = Tools(
        store=FileStore(out.parent / "store"),
        readers={},
        runner=FakeRunner(),
        engine=None,
        launcher=None,
        progress=RecordingProgress(),
        scratch=None,
        command=None,
    )
    return merge_folders(folders, out, Merge(), tools)


def test_two_merges_do_not_write_into_one_folder(tmp_path):
    beside = tmp_path / ".out.partial"
    beside.mkdir()
    handle = os.open(beside, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)

    with pytest.raises(UsageError, match=r"another merge is writing .*/out"):
        merge_into(tmp_path / "out")
    os.close(handle)
    merge_into(tmp_path / "out")

    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not beside.exists()
