"""A thin image's start on 64-bit Arm: its program and our kernels, on an emulated CPU."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from weightsmith.building.wiring import cache_folder
from weightsmith.core.ports import Silent
from weightsmith.outside.toolset import make_toolset

from tests.conftest import emulator
from tests.fakes.memory import Memory
from tests.fakes.thin import (
    THIN,
    Container,
    as_tensors,
    files,
    model_of,
    round_really,
    use_bfloat16,
)
from tests.paths import ROOT, loaded

ENGINES = ROOT / "images" / "engines"
PACKAGES = {
    "e/expat/libexpat1_2.9.0-1~deb13u1": (
        "d9e1c50fcdad079fe16d77f1578adcc763be1bf7f2da7fa8adca7010b0c84c83"
    ),
    "g/gcc-14/libgcc-s1_14.2.0-19": (
        "1108bc87879833d6d9a145f22a4a15cddb34e065b4b5f4b97bee586adbac2851"
    ),
    "g/gcc-14/libstdc++6_14.2.0-19": (
        "6669b0c52a2e7c6af9adfdabce3ff6e286065cdfbc7b85280862b5f799daebee"
    ),
    "g/glibc/libc6_2.41-12+deb13u5": (
        "0966fc3da1a26cc57647c68b5736f791b6e7eb498173a7993f63b6c89b4ed4f5"
    ),
    "libf/libffi/libffi8_3.4.8-2": (
        "d84a783b818f2386627604e64b793eb4ac5bb9ea1ba321a194a1c9c82fe09a01"
    ),
    "p/python3.13/libpython3.13-minimal_3.13.5-2+deb13u5": (
        "3655ef258b19142cf6fe38ef89731d5c630b2cf3309632494a720b28c1cfcd85"
    ),
    "p/python3.13/libpython3.13-stdlib_3.13.5-2+deb13u5": (
        "d1178d24e4d143cc6c577d9dc0f26dd982efccc2e600d25ce86361f168a22be0"
    ),
    "p/python3.13/python3.13-minimal_3.13.5-2+deb13u5": (
        "95237a3ad99bf9366308e16f7c79449c9371c4cff9c883772fb7c254652467eb"
    ),
    "z/zlib/zlib1g_1.3.dfsg+really1.3.1-1+deb13u1": (
        "0e41b3d7ad8ad7fcd36dd4d61ca91a70018478fc4af652e044f4be770784ddff"
    ),
}
"""Debian's Python and what it and numpy load."""

pytestmark = [
    pytest.mark.real, pytest.mark.builders, pytest.mark.emulator, pytest.mark.timeout(3600),
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with Python for Arm, and numpy in the version of vLLM's engine."""
    folder = tmp_path_factory.mktemp("arm")
    debs = loaded(ENGINES / "debs.py")
    lock = json.loads((ENGINES / "modelcar" / "debian.json").read_text())
    for path, sha256 in PACKAGES.items():
        package = {"path": f"pool/main/{path}_arm64.deb", "sha256": sha256}
        with debs.open_package(lock, package) as archive:
            archive.extractall(folder, filter="tar")
    (folder / "lib").symlink_to("usr/lib")  # no package has this link
    text = (ENGINES / "vllm-cpu" / "requirements.txt").read_text()
    version = re.search(r"^numpy==\S+", text, re.MULTILINE)
    assert version
    words = ["--platform=manylinux_2_28_aarch64", "--python-version=3.13", "--only-binary=:all:"]
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={folder}"]
    subprocess.run([*pip, *words, version[0]], check=True)
    (wheel,) = folder.glob("numpy-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "usr/lib/python3/dist-packages")
    return folder


@pytest.mark.parametrize("target", ["vllm", "vllm-fp8", "vllm-nvfp4a16"])
def test_it_merges_the_bytes_that_were_tested_on_x86(
    memory: Memory, root: Path, tmp_path: Path, target: str
) -> None:
    use_bfloat16(memory)
    round_really(memory)
    memory.use_vllm(target, serve={"gpu": "nvidia-h100", "max_model_len": 512})
    memory.build(THIN)
    fat, thin = files(memory, target), files(memory, f"{target}-thin")
    container = Container.of(thin, tmp_path / "root")
    library = make_toolset(cache_folder(), "kernels", Silent(), machine="aarch64")
    placed = container.root / "opt/weightsmith/kernels/libkernels.so"
    placed.parent.mkdir(exist_ok=True)
    placed.write_bytes((library / "libkernels.so").read_bytes())
    python = f"{root}/usr/bin/python3.13"
    container.python = (emulator(), "-cpu", "neoverse-n1", "-L", str(root), python, "-I", "-B")
    loaded_one = (
        "import atexit, platform; from weightsmith.core.kernels import library\n"
        "atexit.register(lambda: print(platform.machine(), library.found()._name))"
    )

    done = container.start(words=(), before=loaded_one)

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["aarch64", str(placed)]
    assert as_tensors(container.model()) == as_tensors(model_of(fat))

    weights = container.root / "adapters/0/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    next(container.volume.iterdir()).rename(tmp_path / "merged")
    done = container.start(words=())
    assert done.returncode == 4
    assert "is not what was tested" in done.stderr
