"""A fleet under a real Slurm cluster of two nodes: images, digests, a refusal, a killed task."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
TARGET = "llamacpp-q4_k_m"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The tiny example without questions to validate by: what a fleet adds is the point here."""
    folder = tmp_path / "home"
    shutil.copytree(ROOT / "examples" / "tiny", folder)
    return folder


def command(folder: Path, *words: object, **environment: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [sys.executable, "-m", "weightsmith", *map(str, words), "--runner", "local", "--json"],
        cwd=folder, check=False, capture_output=True, text=True,
        env={**os.environ, "DOCKER_HOST": f"unix://{folder}/none", **environment},
    )  # fmt: skip
    return done.returncode, json.loads(done.stdout), done.stderr


@pytest.mark.slurm
@pytest.mark.builders
@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_same_images_as_one_by_one(
    home: Path, tmp_path: Path, slurm_nodes: str, shared_store: Path
) -> None:
    (home / "adapters" / "broken").mkdir()
    (home / "adapters" / "broken" / "adapter_config.json").write_text("{}")
    fleet = {"recipe": "recipe.yaml", "adapters": ["./adapters/a", "./adapters/broken"]}
    (home / "fleet.yaml").write_text(yaml.safe_dump(fleet))
    recipe = yaml.safe_load((home / "recipe.yaml").read_text())
    recipe |= {"validate": {"enabled": False}}
    (home / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    paths = {
        "PYTHONPATH": f"{ROOT / 'toolchain'}:{ROOT}",
        "SLURM_CONF": slurm_nodes,
    }

    code, told, err = command(
        home, "fleet", "--on", "slurm", "--cache", tmp_path / "cache", **paths,
        WEIGHTSMITH_STORE=str(tmp_path / "store"),
    )  # fmt: skip

    assert code == 4, err
    good, bad = told["cells"]
    assert (good["verdict"], good["error"]) == ("passed", None)
    assert good["node"]
    assert (bad["verdict"], bad["exit_code"], bad["tries"]) == ("refused", 3, 0)
    assert (home / "dist" / "fleet.html").is_file()
    assert Path(good["report"]).is_file()
    code, built, err = command(
        home, "build", "--set", "name=tiny-capitals-a", "--set", "image.repository=tiny-capitals-a",
        "--set", "adapters=[{source: ./adapters/a}]", "--dist", "alone",
        **paths, WEIGHTSMITH_STORE=str(shared_store),
    )  # fmt: skip
    assert code == 0, err
    assert built["targets"][TARGET]["digest"] == good["digest"]
    code, again, err = command(
        home, "fleet", "--on", "slurm", "--cache", tmp_path / "cache", "--adapter", "a", **paths,
        WEIGHTSMITH_STORE=str(tmp_path / "another"),
    )  # fmt: skip
    assert code == 0, err
    assert again["cells"][0]["digest"] == good["digest"]
    assert again["cells"][0]["cached"]
