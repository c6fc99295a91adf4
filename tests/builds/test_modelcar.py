"""A modelcar without a base of the user's: started as KServe starts it."""

from __future__ import annotations

import subprocess
import uuid
from pathlib import Path

import pytest
from weightsmith.oci.layout import read_layout
from weightsmith.oci.unpack import unpack

from tests.conftest import emulator
from tests.fakes.command_line import told as weightsmith
from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny"
KSERVE = "ln -s /proc/$$/root/models /tmp/models && ls /tmp/models/ && test -r /models/config.json"
"""What KServe's injector has a modelcar run, but for the end, where it sleeps."""


def baked(folder: Path, *words: str | Path) -> None:
    """Bake a modelcar of the tiny model."""
    bake = ("bake", "--model", TINY / "base", "--target", "vllm", "--kind", "modelcar")
    weightsmith(*bake, *words, store=folder / "store")


@pytest.mark.emulator
@pytest.mark.builders
def test_a_modelcar_for_arm_has_a_shell_for_arm(tmp_path: Path) -> None:
    baked(tmp_path, "--platform", "linux/arm64", "--layout", tmp_path / "layout")
    image = read_layout(tmp_path / "layout", platform="linux/arm64")
    unpack(image, tmp_path / "root")
    said = subprocess.run(
        [emulator(), tmp_path / "root" / "bin" / "sh", "-c", "test -r $0 && uname -m",
         tmp_path / "root" / "models" / "config.json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout == "aarch64\n"


@pytest.mark.docker
@pytest.mark.builders
def test_a_modelcar_has_the_shell_that_kserve_starts(tmp_path: Path) -> None:
    name = f"weightsmith-test-modelcar:{uuid.uuid4().hex[:12]}"
    baked(tmp_path, "--load", name)
    try:
        said = subprocess.run(
            ["docker", "run", "--rm", "--network=none", "--tmpfs=/tmp", name, "sh", "-c", KSERVE],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    finally:
        subprocess.run(["docker", "rmi", name], capture_output=True, check=False)

    assert {"config.json", "model.safetensors.index.json"} <= set(said.stdout.split())
