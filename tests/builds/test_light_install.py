"""`make setup` installs all that a build needs: models run in the builders' environments."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TinyBuild
from tests.paths import ROOT

pytestmark = [pytest.mark.builders, pytest.mark.full]


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that `make setup` would make: no torch."""
    folder = tmp_path_factory.mktemp("light") / "env"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    pip = (python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    subprocess.run([*pip, "--require-hashes", "-r", ROOT / "requirements.lock"], check=True)
    subprocess.run([*pip, "--no-deps", "--no-build-isolation", "-e", ROOT], check=True)
    return python


def run(python: Path, *words: object, store: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PATH"}
    }
    # PATH as a user's: the tests' environment, with its torch, is not on it.
    path = f"{python.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return subprocess.run(
        [python, "-m", "weightsmith", *map(str, words)],
        env={**environment, "PATH": path, "WEIGHTSMITH_STORE": str(store)},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_nothing_heavy_is_installed(light):
    listed = subprocess.run(
        [light, "-m", "pip", "list"], capture_output=True, text=True, check=True
    )
    names = {line.split()[0].lower() for line in listed.stdout.splitlines()[2:]}
    assert not names & {"torch", "transformers", "peft", "safetensors", "ml-dtypes"}


def test_it_builds_the_same_image(light, tiny_build: TinyBuild, tmp_path):
    done = run(
        light,
        *("build", "--recipe", "examples/tiny/recipe.yaml", "--runner", "local"),
        *("--dist", tmp_path / "dist", "--json"),
        store=tmp_path / "store",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (facts,) = json.loads(done.stdout)["targets"].values()
    assert facts["digest"] == tiny_build.told["digest"]
