"""vLLM's engine made a second time is the same, and a container engine starts images of it."""

import hashlib
import json
import subprocess
import tarfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from weightsmith.building.wiring import make_store, store_folder
from weightsmith.outside import docker_images
from weightsmith.outside.docker_images import build_command, configured_wheels
from weightsmith.steps.bases import base_inputs

from tests import vllm_parts
from tests.fakes.started import weightsmith
from tests.paths import ROOT, TINY

IMAGES = ROOT / "images"
ENGINES_OWN = {".dockerenv", "dev/console", "etc/hostname", "etc/hosts", "etc/resolv.conf"}
"""What a container engine puts into every container."""

pytestmark = [pytest.mark.real, pytest.mark.vllm, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def held() -> dict[str, str]:
    """Path -> sha256 of the store's engine."""
    entry = make_store().find(base_inputs(vllm_parts.ENGINE).key)
    assert entry is not None
    return {file.path: file.digest.removeprefix("sha256:") for file in entry.tree.files}


@pytest.mark.docker
def test_its_containerfile_gives_the_same_files(held: dict[str, str]) -> None:
    """What `assemble.py` made here, by another distribution's Python, and with an account file."""
    name = f"weightsmith-test-vllm-engine:{uuid.uuid4().hex[:12]}"
    wheels = configured_wheels()
    command = build_command(
        containerfile=IMAGES / "engines" / vllm_parts.ENGINE / "Containerfile",
        context=IMAGES,
        tag=name,
        arguments={"BASE": docker_images.base_reference("cpu")},
        secrets=docker_images._secrets(),
        contexts={"wheels": wheels[0]} if wheels else {},
    )
    subprocess.run(command, check=True)
    try:
        found = dict(files_of(name))
    finally:
        subprocess.run(["docker", "rmi", name], capture_output=True, check=False)

    assert "etc/passwd" in found
    assert differing(found, held) == ["etc/passwd"]


def differing(found: dict[str, str], known: dict[str, str]) -> list[str]:
    return sorted(path for path in {*found, *known} if found.get(path) != known.get(path))


def files_of(image: str) -> Iterator[tuple[str, str]]:
    """Yield path and sha256 of each file of an image that is not the container engine's own."""
    made = ["docker", "create", image]
    container = subprocess.run(made, capture_output=True, text=True, check=True).stdout.strip()
    try:
        with (
            subprocess.Popen(["docker", "export", container], stdout=subprocess.PIPE) as export,
            tarfile.open(fileobj=export.stdout, mode="r|") as archive,
        ):
            for member in archive:
                content = archive.extractfile(member) if member.isreg() else None
                if content is not None and member.name not in ENGINES_OWN:
                    yield member.name, hashlib.file_digest(content, "sha256").hexdigest()
    finally:
        subprocess.run(["docker", "rm", container], capture_output=True, check=True)


TARGET = "vllm-awq"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with nothing but vLLM's engine: every job is done in a container."""
    folder = tmp_path_factory.mktemp("store")
    held = Path("results") / base_inputs(vllm_parts.ENGINE).key.hex
    (folder / held).parent.mkdir()
    (folder / held).symlink_to(store_folder() / held)
    return folder


# The engine holds 1.9 GB for the image, and the layout beside it is as large.
@pytest.mark.docker
@pytest.mark.builders
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
