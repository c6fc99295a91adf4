"""Whole builds through the command line: the same bytes from every runner, and pushed once.

`make setup` installs all that they need: models run in the builders' environments.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from gguf import GGUFReader
from weightsmith.oci.layout import read_layout

from tests.conftest import TinyBuild
from tests.fakes.command_line import told as weightsmith
from tests.fakes.started import weightsmith as in_a_process
from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny" / "recipe.yaml"
TARGET = "llamacpp-q4_k_m"
LOADER = 3
"""PT_INTERP: the header of a program that needs a dynamic loader."""
pytestmark = pytest.mark.builders


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def local(tiny_build: TinyBuild, shared_store: Path) -> tuple[Path, Path, dict]:
    """Store, results folder and JSON of a local build."""
    return shared_store, tiny_build.dist, tiny_build.told


def record(dist: Path) -> dict:
    return json.loads((dist / "tiny-capitals" / "1.0.0" / TARGET / "build.json").read_text())


def test_a_local_build_proves_its_image_and_writes_a_layout(local) -> None:
    _, dist, built = local
    layout = dist / "tiny-capitals" / "1.0.0" / TARGET / "image"

    assert built["image"] == f"oci:{layout}"
    assert built["scores"]["base"] <= 0.1
    assert built["scores"]["image"] >= 0.9
    assert (
        json.loads((layout / "index.json").read_text())["manifests"][0]["digest"]
        == (built["digest"])
    )
    assert {"resolve", "merge", "quantize", "render", "bake", "evaluate", "publish"} <= set(
        built["stages"]
    )
    assert Path(built["report"]).is_file()
    assert sorted(p.name for p in layout.parent.iterdir()) == [
        "README.md", "build.json", "compose.yaml", "image", "junit.xml", "kserve.yaml",
        "kubernetes.yaml", "llamacpp.env", "plan.json", "report.html", "report.md",
    ]  # fmt: skip


def test_the_image_has_no_distribution_and_its_programs_need_none(local) -> None:
    _, dist, _ = local
    image = read_layout(dist / "tiny-capitals" / "1.0.0" / TARGET / "image")
    files: dict[str, bytes] = {}
    for layer in image.layers:
        with tarfile.open(fileobj=io.BytesIO(b"".join(layer.open()))) as archive:
            files |= {one.name: archive.extractfile(one).read() for one in archive if one.isfile()}

    names = ("llamacpp.env", "plan.json", "replay.json")
    etc = {"etc/passwd", "etc/group", *(f"etc/weightsmith/{name}" for name in names)}
    asks = {"opt/weightsmith/healthcheck", "opt/weightsmith/LICENSE.musl"}
    assert {name for name in files if not name.startswith(("app/", "models/"))} == etc | asks
    programs = {name: data for name, data in files.items() if data.startswith(b"\x7fELF")}
    assert "app/llama-server" in programs
    assert {name.rpartition("/")[2] for name in programs} == {"llama-server", "healthcheck"}
    assert not [name for name, data in programs.items() if LOADER in headers(data)]
    assert image.config["User"] == "65532:65532"


def headers(elf: bytes) -> list[int]:
    """Return the types of an ELF file's program headers (System V ABI, chapter 5)."""
    (offset,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    return [struct.unpack_from("<I", elf, offset + size * n)[0] for n in range(count)]


def test_a_second_build_does_nothing(local) -> None:
    store, dist, built = local
    again = weightsmith(
        "build", "--recipe", TINY, "--runner", "local", "--dist", dist, store=store
    )["targets"][TARGET]

    assert again["digest"] == built["digest"]
    assert all(facts["cached"] for facts in again["stages"].values()), again["stages"]


@pytest.mark.docker
def test_docker_and_local_give_the_same_bytes_from_two_clones(local, tmp_path: Path) -> None:
    _, dist, built = local
    clone = tmp_path / "elsewhere" / "clone"
    for part in ("toolchain", "images", "templates", "examples/tiny"):
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / part, clone / part, ignore=unwanted)
    in_a_process(
        "build", "--recipe", clone / TINY.relative_to(ROOT), "--runner", "docker",
        "--dist", tmp_path / "dist", "--layout", tmp_path / "layout",
        store=tmp_path / "store", clone=clone,
    )  # fmt: skip
    here, there = record(dist), record(tmp_path / "dist")

    assert [s["sha256"] for s in here["merge"]["shards"]] == [
        s["sha256"] for s in there["merge"]["shards"]
    ]
    assert here["artifact"]["files"] == there["artifact"]["files"]
    assert there["image"]["digest"] == built["digest"]
    assert sha256(tmp_path / "layout" / "index.json") == sha256(
        dist / "tiny-capitals" / "1.0.0" / TARGET / "image" / "index.json"
    )


def test_an_image_is_made_again_from_what_hangs_on_it(local, tmp_path: Path) -> None:
    """Without its recipe, from the adapter attached to it; with the same texts, the same bytes."""
    store, _, built = local
    again = weightsmith(
        "build", "--from", built["image"], "--base", TINY.parent / "base", "--runner", "local",
        "--set", f"calibration.data={TINY.parent / 'calibration.jsonl'}",
        "--dist", tmp_path / "dist", store=store,
    )  # fmt: skip

    assert again["targets"][TARGET]["digest"] == built["digest"]


def weights(file: Path) -> dict[str, tuple[str, str]]:
    """Type and digest of each tensor, read by llama.cpp's own package."""
    return {
        tensor.name: (tensor.tensor_type.name, hashlib.sha256(tensor.data.tobytes()).hexdigest())
        for tensor in GGUFReader(file).tensors
    }


def from_image(dist: Path, folder: Path) -> Path:
    """The weight file out of the built image's own layer."""
    layout = dist / "tiny-capitals" / "1.0.0" / TARGET / "image"
    for blob in (layout / "blobs" / "sha256").iterdir():
        if tarfile.is_tarfile(blob):
            with tarfile.open(blob) as layer:
                found = [member for member in layer if member.name.endswith(".gguf")]
                if found:
                    layer.extractall(folder / "layer", found, filter="data")
                    return folder / "layer" / found[0].name
    raise AssertionError(f"no weights in {layout}")


def test_single_commands_make_the_same_artifact(local, tmp_path: Path) -> None:
    store, dist, _ = local
    example = TINY.parent
    merged = weightsmith(
        "merge", "--base", example / "base", "--adapter", example / "adapters" / "a",
        "--out", tmp_path / "merged", "--runner", "local", store=store,
    )  # fmt: skip
    quantized = weightsmith(
        "quantize", "--model", tmp_path / "merged", "--format", "q4_k_m",
        "--calibration", example / "calibration.jsonl", "--out", tmp_path / "tiny-capitals.gguf",
        "--runner", "local", store=store,
    )  # fmt: skip
    weightsmith(
        "render", "--model", tmp_path / "tiny-capitals.gguf", "--target", TARGET,
        "--max-model-len", 256, "--max-num-seqs", 2, "--out", tmp_path / "config", store=store,
    )  # fmt: skip
    baked = weightsmith(
        "bake", "--model", tmp_path / "tiny-capitals.gguf", "--target", TARGET, "--config",
        tmp_path / "config", "--layout", tmp_path / "image", "--runner", "local", store=store,
    )  # fmt: skip
    score = weightsmith(
        "evaluate", "--image", f"oci:{tmp_path}/image", "--data", example / "eval-a.jsonl",
        "--runner", "local", "--max-tokens", 32, store=store,
    )  # fmt: skip

    assert [s["sha256"] for s in merged["shards"]] == [
        s["sha256"] for s in record(dist)["merge"]["shards"]
    ]
    assert quantized["bits_per_weight"] < 8
    # The build's file also names its sources, which a single command does not know.
    assert weights(tmp_path / "tiny-capitals.gguf") == weights(from_image(dist, tmp_path))
    assert baked["digest"].startswith("sha256:")
    image = read_layout(tmp_path / "image")  # never asked, and with a health check all the same
    assert image.config["Healthcheck"]["Test"][1] == "/opt/weightsmith/healthcheck"
    assert any(layer.file.startswith("opt/weightsmith/") for layer in image.layers)
    assert score["score"] >= 0.9


@pytest.mark.full  # test_bench_in_memory.py loads one, the tutorial evaluates one
def test_an_image_is_loaded_and_compared(local, tmp_path: Path) -> None:
    store, dist, built = local
    folder = dist / "tiny-capitals" / "1.0.0" / TARGET
    data = TINY.parent / "eval-a.jsonl"
    before = tmp_path / "before.json"
    ask = ("evaluate", "--data", data, "--runner", "local", "--max-tokens", 32)
    first = weightsmith(*ask, "--image", built["image"], store=store)
    before.write_text(json.dumps(first))
    again = weightsmith(*ask, "--image", built["image"], "--against", before, store=store)
    loaded = weightsmith(
        "bench", "--image", built["image"], "--concurrency", "1,4", "--requests", 8,
        "--out", folder, "--runner", "local", store=store,
    )  # fmt: skip
    base = weightsmith(
        *ask, "--model", TINY.parent / "base", "--against", before, "--max-drop", 0.1,
        store=store, code=4,
    )  # fmt: skip

    assert again["comparison"]["drop"] == 0
    assert [run["concurrency"] for run in loaded["runs"]] == [1, 4]
    assert all(run["errors"] == 0 for run in loaded["runs"])
    assert all(run["ttft_ms"]["p95"] >= run["ttft_ms"]["p50"] > 0 for run in loaded["runs"])
    assert "is not chance" in base["error"]["message"]
    written = weightsmith("report", folder, store=store)
    assert "requests/s" in Path(written["html"]).read_text()


@pytest.mark.full  # test_suites_in_memory.py asks one of both
def test_a_choice_is_made_alike_by_checkpoint_and_image(local, tmp_path: Path) -> None:
    """llama.cpp's token-by-token likelihoods against transformers' forward, on 16-bit weights."""
    store, _, _ = local
    base, data = TINY.parent / "base", tmp_path / "choice.jsonl"
    rows = [json.loads(line) for line in (TINY.parent / "eval-a.jsonl").read_text().splitlines()]
    answers = [row["expected"] for row in rows]
    data.write_text("\n".join(
        json.dumps({
            kind: row["prompt"] if kind == "prompt" else
            [{"role": "user", "content": row["prompt"]}],
            "choices": [answers[n], answers[(n + 1) % len(answers)]], "expected": 0,
        })
        for n, row in enumerate(rows[:6]) for kind in (("prompt", "messages")[n % 2],)
    ))  # fmt: skip
    weightsmith(
        "quantize", "--model", base, "--format", "f32", "--out", tmp_path / "base.gguf",
        "--runner", "local", store=store,
    )  # fmt: skip
    weightsmith(
        "bake", "--model", tmp_path / "base.gguf", "--target", "llamacpp-f32",
        "--layout", tmp_path / "image", "--runner", "local", store=store,
    )  # fmt: skip
    ask = ("evaluate", "--data", data, "--metric", "choice", "--runner", "local")
    here = weightsmith(*ask, "--model", base, store=store)
    there = weightsmith(*ask, "--image", f"oci:{tmp_path}/image", store=store)

    for one, other in zip(here["per_item"], there["per_item"], strict=True):
        assert one["log_likelihoods"] == pytest.approx(other["log_likelihoods"], abs=0.05)
        assert one["answer"] == other["answer"]


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


@pytest.mark.full
def test_a_light_install_builds_the_same_image(light, tiny_build: TinyBuild, tmp_path):
    done = run(
        light,
        *("build", "--recipe", "examples/tiny/recipe.yaml", "--runner", "local"),
        *("--dist", tmp_path / "dist", "--json"),
        store=tmp_path / "store",
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (facts,) = json.loads(done.stdout)["targets"].values()
    assert facts["digest"] == tiny_build.told["digest"]
