"""vLLM's engine assembled a second time is the engine that the store holds, byte for byte."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests import vllm_parts
from toolchain.stages.base import base_inputs
from toolchain.wiring import make_store

ASSEMBLE = Path(__file__).parents[2] / "images" / "engines" / vllm_parts.ENGINE / "assemble.py"

pytestmark = [pytest.mark.real, pytest.mark.vllm, pytest.mark.timeout(3600)]


def test_the_same_pins_give_the_same_files(tmp_path: Path) -> None:
    entry = make_store().find(base_inputs(vllm_parts.ENGINE).key)
    assert entry is not None
    subprocess.run([sys.executable, ASSEMBLE, "--out", tmp_path / "root"], check=True)

    known = {file.path: file.digest.removeprefix("sha256:") for file in entry.tree.files}
    found = {
        path.relative_to(tmp_path / "root").as_posix(): sha256(path)
        for path in (tmp_path / "root").rglob("*")
        if path.is_file()
    }
    assert sorted(found) == sorted(known)
    assert [path for path in known if found[path] != known[path]] == []


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
