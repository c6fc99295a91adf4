"""The image of weightsmith itself: assembled twice alike, and a whole build inside it."""

import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from weightsmith import __version__
from weightsmith.building.wiring import cache_folder
from weightsmith.oci.image import Image
from weightsmith.oci.layout import read_all

from tests.conftest import TinyBuild
from tests.paths import ROOT

IMAGE = f"weightsmith:{__version__}"
TARGET = "llamacpp-q4_k_m"
pytestmark = [pytest.mark.docker, pytest.mark.full, pytest.mark.timeout(1800)]


def assembled(out: Path, *flags: str) -> str:
    script = ROOT / "images" / "tool" / "assemble.py"
    done = subprocess.run(
        [sys.executable, script, "--out", out, *flags], check=True, capture_output=True, text=True
    )
    return done.stdout.split()[-1]


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("tool") / "image"
    assembled(out, "--load")
    yield out
    subprocess.run(["docker", "image", "rm", "--force", IMAGE], check=False, capture_output=True)
    shutil.rmtree(out)


def run(*words: str | Path, flags: tuple[str | Path, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = ["docker", "run", "--rm", *flags, IMAGE, *words]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_it_answers_anybody_without_rights(layout: Path) -> None:
    confined = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges", "--net=none")
    for flags in (confined, (*confined, "--user=1234:99")):
        said = run("--version", flags=flags)
        assert (said.returncode, said.stdout) == (0, f"weightsmith {__version__}\n"), said.stderr
    asked = run("-c", "id -u; command -v env cat", flags=("--entrypoint=sh",))
    assert asked.stdout.split()[0] == "65532", asked.stderr


def test_both_platforms_are_the_same_each_time(layout: Path, tmp_path: Path) -> None:
    again = tmp_path / "image"
    assembled(again)
    index = (layout / "index.json").read_bytes()
    assert (again / "index.json").read_bytes() == index
    images = read_all(again)
    assert sorted(image.platform for image in images) == ["linux/amd64", "linux/arm64"]
    # ELF's e_machine of Python itself: ELF specification, figure 4-1; 62 is x86-64, 183 Arm.
    for image, machine in zip(images, (62, 183), strict=True):
        assert elf_machine(image, "usr/bin/python3") == machine
        assert image.config["User"] == "65532:65532"
    shutil.rmtree(again)


def elf_machine(image: Image, path: str) -> int:
    for layer in image.layers:
        with tarfile.open(fileobj=io.BytesIO(b"".join(layer.open()))) as archive:
            if path in archive.getnames():
                head = archive.extractfile(path).read(20)
                return int.from_bytes(head[18:20], "little")
    raise AssertionError(f"no {path}")


@pytest.mark.builders
def test_a_whole_build_in_it_gives_the_local_digest(
    layout: Path, tiny_build: TinyBuild, tmp_path: Path
) -> None:
    """As a CI job runs it: without an engine, with this machine's index and certificates."""
    for folder in ("cache", "work"):
        (tmp_path / folder).mkdir()
    shutil.copytree(ROOT / "examples" / "tiny", tmp_path / "work" / "tiny")
    # Compiled engines are the same bytes everywhere: only Python's environments are made inside.
    whole = shutil.ignore_patterns("*.work-*")
    shutil.copytree(cache_folder() / "toolsets", tmp_path / "cache" / "toolsets", ignore=whole)
    folders = (tmp_path / "cache", tmp_path / "work")
    subprocess.run(["chmod", "-R", "a+rwX", *folders], check=True)
    flags = ["--net=host", f"--volume={tmp_path}/cache:/cache", f"--volume={tmp_path}/work:/work"]
    for name in ("SSL_CERT_FILE", "PIP_FIND_LINKS", "PIP_CONSTRAINT"):
        if value := os.environ.get(name):
            flags += [f"--volume={value}:{value}:ro", f"--env={name}={value}"]
    words = ("build", "--recipe", "tiny/recipe.yaml", "--runner", "local", "--json")

    done = run(*words, flags=tuple(flags))

    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)["targets"][TARGET]
    assert told["digest"] == tiny_build.told["digest"]
    assert told["verdict"] == "passed"
