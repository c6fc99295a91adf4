"""Assembles an image of weightsmith itself, for CI jobs that only have `docker run`.

    python images/tool/assemble.py --out FOLDER [--load]

Debian's packages bring the C library, Python 3.11 with venv and a shell (debian.json); wheels bring
weightsmith's own packages by hash (requirements-keyless.lock). The image is made for x86-64 and
64-bit Arm on either, without a container engine, and the same checkout gives the same digest.
Nothing of a package is run but Python's own compiler of .pyc files. Progress is said as `[3/5] …`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from weightsmith import __version__
from weightsmith.building.wiring import make_engine
from weightsmith.core.platforms import host_platform
from weightsmith.oci.image import Image, ImageConfig, Index, assemble
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.layout import docker_archive, write_layout
from weightsmith.oci.references import Reference

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
sys.path.insert(0, str(HERE.parent / "engines"))

import debs  # noqa: E402 - it lies beside the engines' folders

PLATFORMS = {"x86_64": "linux/amd64", "aarch64": "linux/arm64"}
PACKAGES = "usr/local/lib/python3.11/dist-packages"
"""On the path of Debian's Python as it is."""
LOADERS = {
    "x86_64": ("lib64/ld-linux-x86-64.so.2", "usr/lib/x86_64-linux-gnu"),
    "aarch64": ("lib/ld-linux-aarch64.so.1", "usr/lib/aarch64-linux-gnu"),
}
"""The path that programs name, and where Debian's packages have it."""
GLIBC = "manylinux_2_40"
"""Newest tag of wheels that uv knows and the C library in debian.json runs."""
NAME = f"weightsmith:{__version__}"
COMMAND = """#!/usr/bin/python3
from weightsmith.__main__ import main

main()
"""
USERS = """root:x:0:0:root:/:/sbin/nologin
weightsmith:x:65532:65532:weightsmith:/tmp:/sbin/nologin
"""
CONFIG = ImageConfig(
    user="65532:65532",
    entrypoint=("weightsmith",),
    cmd=("--help",),
    working_dir="/work",
    env={
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": "/tmp",
        "WEIGHTSMITH_HOME": "/cache",
        # For downloads of Python's own; a site's file may be mounted and named instead.
        "SSL_CERT_FILE": f"/{PACKAGES}/certifi/cacert.pem",
    },
    labels={
        "org.opencontainers.image.title": "weightsmith",
        "org.opencontainers.image.description": "From a base model and LoRA adapters to a "
        "ready-to-serve, verified container image.",
        "org.opencontainers.image.version": __version__,
        "org.opencontainers.image.source": "https://github.com/weightsmith/weightsmith",
        "org.opencontainers.image.licenses": "Apache-2.0",
    },
)


def main() -> None:
    """Parse the arguments, assemble for both machines, and write the layout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the image layout")
    parser.add_argument("--load", action="store_true", help="also give it to the container engine")
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=given.out.parent) as work:
        images = tuple(image_of(roots, machine) for machine, roots in made(Path(work)).items())
        say(4, "writing the layout")
        digest = write_layout(Index(images=images), given.out)
        print(f"{given.out}: {NAME}, {digest}")
        if given.load:
            (own,) = (image for image in images if image.platform == host_platform())
            say(5, "loading it into the engine")
            make_engine().load([docker_archive(own, Reference.parse(NAME))], NAME)


def say(step: int, text: str) -> None:
    """Print one line of progress."""
    print(f"[{step}/5] {text}", file=sys.stderr, flush=True)


def made(work: Path) -> dict[str, tuple[Path, ...]]:
    """Return for each machine its layers' files: the system, packages, and weightsmith."""
    subprocess.run(
        [
            *(sys.executable, "-m", "uv", "build", "-q", "--wheel", "--out-dir", work),
            *("--require-hashes", "--build-constraints", CHECKOUT / "requirements.lock", CHECKOUT),
        ],
        check=True,
    )
    (wheel,) = work.glob("*.whl")
    own = work / "own.lock"
    own.write_text(f"{wheel} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n")
    found = {}
    for machine in PLATFORMS:
        folder = work / machine
        say(1, f"Debian's packages for {machine}")
        system(folder / "system", machine)
        say(2, f"packages for {machine}")
        install(folder / "packages", machine, CHECKOUT / "requirements-keyless.lock")
        install(folder / "own", machine, own)
        command = folder / "own" / "usr/local/bin/weightsmith"
        command.parent.mkdir(parents=True)
        command.write_text(COMMAND)
        command.chmod(0o755)
        found[machine] = tuple(folder / part for part in ("system", "packages", "own"))
    say(3, "compiling Python files")
    for folders in found.values():
        compile_all(work, folders)
    return found


def system(root: Path, machine: str) -> None:
    """Write the C library, Python and a shell, under the names that they are called by."""
    lock = json.loads((HERE / "debian.json").read_text("utf-8"))
    loader, libraries = LOADERS[machine]
    for package in debs.packages_for(lock, machine):
        only = package.get("only", ())
        wanted = (*only,) if only else (f"{libraries}/", "usr/lib/python3", "usr/share/python-whe")
        with debs.open_package(lock, package) as archive:
            debs.unpack(archive, lambda path, begins=wanted: path.startswith(begins), root)
    copied = {
        loader: f"{libraries}/{Path(loader).name}",
        "bin/sh": "usr/bin/busybox",
        "usr/bin/env": "usr/bin/busybox",
        "usr/bin/python3": "usr/bin/python3.11",
    }
    for to, source in copied.items():
        (root / to).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / source, root / to)
    for to in ("usr/bin/busybox", "usr/bin/python3.11"):
        (root / to).unlink()
    (root / "etc").mkdir()
    (root / "etc/passwd").write_text(USERS)


def install(root: Path, machine: str, lock: Path) -> None:
    """Unpack a lock's wheels for the image's Python, whatever machine and Python this is."""
    target = root / PACKAGES
    subprocess.run(
        [
            *(sys.executable, "-m", "uv", "pip", "install", "-q", "--python", sys.executable),
            *("--require-hashes", "--no-deps", "-r", lock),
            *("--target", target, "--only-binary", ":all:", "--link-mode", "copy"),
            *("--python-version", "3.11", "--python-platform", f"{machine}-{GLIBC}"),
        ],
        check=True,
    )
    # Which machine installed it, when: the same pins must give the same bytes.
    for name in ("direct_url.json", "REQUESTED", "RECORD", "INSTALLER", "uv_cache.json"):
        for file in target.glob(f"*.dist-info/{name}"):
            file.unlink()
    (target / ".lock").unlink(missing_ok=True)
    shutil.rmtree(target / "bin", ignore_errors=True)  # their first line names this machine's


def compile_all(work: Path, folders: tuple[Path, ...]) -> None:
    """Compile with the image's own Python for this machine, into the same bytes each time.

    By hash, so that no time is in the files; with one seed, since sets of constants are stored in
    their order; in one process, since marshal's references depend on what was compiled before.
    """
    machine = {name: machine for machine, name in PLATFORMS.items()}[host_platform()]
    root = work / machine / "system"
    loader, libraries = LOADERS[machine]
    for folder in folders:
        subprocess.run(
            [
                *(root / loader, "--library-path", root / libraries, root / "usr/bin/python3"),
                *("-B", "-I", "-m", "compileall", "-q", "-j", "1"),
                *("--invalidation-mode", "unchecked-hash", "-s", folder, "-p", "/"),
                folder / "usr",
            ],
            check=False,  # templates of code in some packages are no Python
            env={"PYTHONHOME": str(root / "usr"), "PYTHONHASHSEED": "0", "PATH": "/bin"},
            stdout=subprocess.DEVNULL,
        )


def image_of(folders: tuple[Path, ...], machine: str) -> Image:
    """Return one machine's image: a layer for each folder, the system's with folders to write."""
    system, *upper = (TarLayer(members=tuple(members(folder))) for folder in folders)
    layers = (replace(system, shared=("cache", "tmp", "work")), *upper)
    return assemble((), layers, config=CONFIG, platform=PLATFORMS[machine])


def members(root: Path) -> Iterator[Member]:
    """Yield the files below a folder."""
    for path in root.rglob("*"):
        if path.is_file():
            yield Member.of_file(str(path.relative_to(root)), path)


if __name__ == "__main__":
    main()
