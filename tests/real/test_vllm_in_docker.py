"""vLLM's image started by a container engine: proven there, and the image of the local runner."""

from __future__ import annotations

import json
import subprocess
import uuid
from pathlib import Path
from typing import Any

import pytest
from weightsmith.building.wiring import store_folder
from weightsmith.steps.bases import base_inputs

from tests import vllm_parts
from tests.fakes.started import weightsmith
from tests.paths import TINY

TARGET = "vllm-awq"

# The engine holds 1.9 GB for the image, and the layout beside it is as large.
pytestmark = [
    pytest.mark.real,
    pytest.mark.docker,
    pytest.mark.builders,
    pytest.mark.vllm,
    pytest.mark.timeout(3600),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with nothing but vLLM's engine: every job is done in a container."""
    folder = tmp_path_factory.mktemp("store")
    held = Path("results") / base_inputs(vllm_parts.ENGINE).key.hex
    (folder / held).parent.mkdir()
    (folder / held).symlink_to(store_folder() / held)
    return folder


def test_the_engine_starts_the_image_that_the_local_runner_makes(
    store: Path, tmp_path: Path
) -> None:
    repository = f"weightsmith-test-vllm-{uuid.uuid4().hex[:12]}"
    words = ("build", "--recipe", TINY / "recipe.yaml", "--target", TARGET,
             "--set", f"image.repository={repository}")  # fmt: skip
    there = weightsmith(
        *words, "--runner", "docker", "--dist", tmp_path / "docker", store=store
    )["targets"][TARGET]  # fmt: skip
    try:
        asked = weightsmith(
            "evaluate", "--image", there["image"], "--data", TINY / "eval-a.jsonl",
            "--runner", "docker", "--max-tokens", 32, store=store,
        )  # fmt: skip
        user = subprocess.run(
            ["docker", "image", "inspect", "--format", "{{.Config.User}}", there["image"]],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    finally:
        subprocess.run(["docker", "rmi", there["image"]], capture_output=True, check=False)
    told = record(tmp_path / "docker")
    checks = {check["name"]: check["seen"] for check in told["checks"]}

    assert there["scores"]["base"] <= 0.1
    assert there["scores"]["image"] >= there["scores"]["adapter"] - 0.05
    assert asked["score"] == pytest.approx(there["scores"]["image"], abs=1e-4)
    assert user.stdout.strip() == "65532:65532"
    assert {"user 65532:65532", "read-only root", "no internet"} <= set(
        checks["health"].replace(";", ",").split(", ")
    )
    assert {"chat", "streaming", "4 requests at once", "SIGTERM", "restart"} <= set(checks)

    # In the user's store, where the same image may have been proven already.
    weightsmith(*words, "--runner", "local", "--dist", tmp_path / "local", store=store_folder())
    here = record(tmp_path / "local")
    assert here["merge"]["shards"] == told["merge"]["shards"]
    assert here["artifact"]["files"] == told["artifact"]["files"]
    assert here["image"]["digest"] == told["image"]["digest"]


def record(dist: Path) -> dict[str, Any]:
    return json.loads(next(dist.rglob("build.json")).read_text())
