"""`invoke merge`: what becomes of its output folder."""

import fcntl
import hashlib
import json
import os
from dataclasses import replace

import pytest
from safetensors.torch import load
from weightsmith.api.commands.merge import merge_folders
from weightsmith.api.commands.requests import MergeCommand
from weightsmith.core.errors import UsageError
from weightsmith.core.merge_options import Merge
from weightsmith.outside.folders import FolderReader

from tests.fakes.memory import memory_tools
from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny"


def asked(**more):
    return MergeCommand(
        **{"base": str(TINY / "base"), "adapters": (str(TINY / "adapters" / "a"),), **more}
    )


def merge_into(out):
    return merge_folders(asked(out=out), memory_tools(out.parent))


def test_two_merges_do_not_write_into_one_folder(tmp_path):
    beside = tmp_path / ".out.partial"
    beside.mkdir()
    handle = os.open(beside, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)

    with pytest.raises(UsageError, match="out"):
        merge_into(tmp_path / "out")
    os.close(handle)
    merge_into(tmp_path / "out")

    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not beside.exists()


def test_a_missing_slash_is_named(tmp_path):
    for source in ({"base": "hf:/acme/bot"}, {"adapters": ("hf:/acme/bot",)}):
        with pytest.raises(UsageError, match="hf:// needs two slashes"):
            merge_folders(asked(out=tmp_path / "out", **source), memory_tools(tmp_path / "m"))


def test_a_combined_adapter_is_told_by_its_files(tmp_path):
    result = merge_folders(asked(keep_adapter=tmp_path / "kept"), memory_tools(tmp_path / "m"))

    files = {row["path"]: row["sha256"] for row in result["files"]}
    path = tmp_path / "kept" / "adapter_model.safetensors"
    assert files[path.name] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("options", [{"density": 0.5}, {"method": "svd", "density": 0.3}])
def test_options_that_do_not_fit_leave_nothing(tmp_path, options):
    out = tmp_path / "new" / "out"

    with pytest.raises(UsageError):
        merge_folders(asked(out=out, options=Merge(**options)), memory_tools(tmp_path / "m"))

    assert not out.parent.exists()


class Index(FolderReader):
    """A package index with a model and an adapter."""

    scheme = "pypi"

    def fetch(self, source, revision, sha256, progress):
        place = {"pypi://tiny==1.0": "base", "pypi://tiny-lora==1.0": "adapters/a"}[source]
        return super().fetch(str(TINY / place), revision, sha256, progress)


def test_a_base_of_an_index_without_adapters_is_written_as_it_is(tmp_path):
    """The checkpoint that an adapter is trained on."""
    tools = memory_tools(tmp_path)
    tools = replace(tools, readers={**tools.readers, "pypi": Index(tools.store)})
    only = asked(base="pypi://tiny==1.0", adapters=(), out=tmp_path / "out")

    result = merge_folders(only, tools)

    assert result["tensors"]["merged"] == 0
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for path in (TINY / "base").iterdir():
        if path.suffix == ".safetensors":
            ours, theirs = load(written[path.name]), load(path.read_bytes())
            assert ours.keys() == theirs.keys()
            assert all(ours[name].equal(theirs[name]) for name in theirs)
        elif path.name == "config.json":
            assert json.loads(written[path.name]) == json.loads(path.read_text())
        else:
            assert written[path.name] == path.read_bytes()


def test_adapters_of_other_sources_are_fetched_and_merged_as_folders_are(tmp_path):
    tools = memory_tools(tmp_path)
    tools = replace(tools, readers={**tools.readers, "pypi": Index(tools.store)})
    folders = (str(TINY / "adapters" / "a"), str(TINY / "adapters" / "b"))
    mixed = ("pypi://tiny-lora==1.0", folders[1])

    made = [
        merge_folders(asked(adapters=adapters, out=tmp_path / f"{number}"), tools)["files"]
        for number, adapters in enumerate((folders, mixed))
    ]

    assert made[0] == made[1]
    with pytest.raises(UsageError, match=r"adapter: .*source.*\.\."):
        merge_folders(asked(adapters=("s3://a/../b",), out=tmp_path / "other"), tools)
