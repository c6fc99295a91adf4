"""Creates a builder's virtual environment from its pinned requirements.

torch is installed as a CPU build if one can be had: from pip's configured sources, the folder of
wheels, download.pytorch.org, then PyPI, whose build has gigabytes of CUDA libraries. One that
installs but does not import, for want of a newer C library, is skipped.
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import httpx

from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.files import path_in
from weightsmith.core.network import paced
from weightsmith.core.ports import Progress
from weightsmith.core.privacy import private
from weightsmith.core.resources import images
from weightsmith.core.trees import discard
from weightsmith.core.values import Writable, key_of
from weightsmith.core.waiting import take
from weightsmith.outside import process
from weightsmith.outside.downloading import persistently
from weightsmith.outside.worker_protocol import open_log

TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Index of torch's CPU builds; PyPI has only those with 3 GB of CUDA libraries."""
_CUDA_SIZE = "about 3 GB to download, 6 GB on disk"
_COMPLETE = ".complete"


@dataclass(frozen=True, slots=True, kw_only=True)
class Pins:
    """One builder's requirements, for one flavour (`cpu` or `cuda`) and this Python."""

    name: str
    flavour: str

    @property
    def folder(self) -> Path:
        """The builder's folder; raises UsageError if there is none of that name."""
        folder = images() / "builders" / self.name
        if not (folder / "requirements.txt").is_file():
            known = sorted(p.parent.name for p in folder.parent.glob("*/requirements.txt"))
            raise UsageError(
                f"there is no builder {self.name!r}", hint=f"one of: {', '.join(known)}"
            )
        return folder

    @property
    def light(self) -> Path:
        """Everything but torch."""
        return self.folder / "requirements.txt"

    @property
    def torch(self) -> Path | None:
        """Only torch, for this flavour; None for a builder without torch."""
        files = [self.folder / f"requirements-{kind}.txt" for kind in (self.flavour, "cpu")]
        return next((file for file in files if file.is_file()), None)

    @property
    def cuda(self) -> Path | None:
        """Torch with its CUDA libraries: the builder's own, or the merge builder's same version."""
        own = self.folder / "requirements-cuda.txt"
        if own.is_file():
            return own
        shared = self.folder.with_name("merge") / own.name
        same = self.torch is not None and _torch_version(self.torch) == _torch_version(shared)
        return shared if same else None

    @property
    def sources(self) -> Path | None:
        """Packages that exist only as source, built with the setuptools in `light`."""
        file = self.folder / "requirements-source.txt"
        return file if file.is_file() else None

    @property
    def compiled(self) -> tuple[str, ...]:
        """Those of `sources` that need a C compiler: the lines of compiled.txt."""
        return tuple(_lines(self.folder / "compiled.txt"))

    @property
    def accepted(self) -> frozenset[str]:
        """What `pip check` may report for this builder: the lines of unmet.txt."""
        return frozenset(_lines(self.folder / "unmet.txt"))

    @property
    def key(self) -> str:
        """Name, and a digest of the pins, the Python version and the machine type."""
        files = (self.light, self.torch, self.sources)
        pins = [_lines(file) for file in files if file is not None]
        facts: list[Writable] = [sys.version_info[:2], platform.machine(), pins]
        return f"{self.name}-{key_of(facts).short}"


def _torch_version(file: Path) -> str:
    found = re.search(r"^torch==([\d.]+)", file.read_text("utf-8"), re.MULTILINE)
    return found[1] if found else ""


def _lines(file: Path) -> list[str]:
    """Return the lines of a file that are no comments; none of a file that is not there."""
    lines = file.read_text("utf-8").splitlines() if file.is_file() else []
    return [line for line in lines if not line.startswith("#")]


def environment_folder(cache: Path, pins: Pins) -> Path:
    """Return the path of the builder's environment, whether it exists or not."""
    return cache / "builders" / pins.key


def is_complete(folder: Path) -> bool:
    """Say whether an environment is complete."""
    return (folder / _COMPLETE).is_file()


def make_environment(cache: Path, pins: Pins, progress: Progress) -> Path:
    """Return the builder's environment, and create it if needed.

    It is created in its final folder, because its scripts contain their own path. A marker,
    written last, says that it is complete; without it, it is created again. Raises
    EnvironmentFailure if packages cannot be installed.
    """
    folder = environment_folder(cache, pins)
    private(cache, "builders")
    if is_complete(folder):
        return folder
    lock = folder.with_name(folder.name + ".lock")
    with locked(lock, f"is making the builder {pins.name!r}", progress.note):
        if is_complete(folder):
            return folder
        discard(folder)
        check_compiler(pins)
        with open_log(cache, f"builder-{pins.name}") as log:
            installer = _Installer(folder, log, progress)
            installer.create()
            installer.install(pins.light)
            _install_torch(pins, installer)
            if pins.sources is not None:
                installer.build(pins.sources)
            installer.check(pins.accepted)
        (folder / _COMPLETE).write_text("")
    return folder


def check_compiler(pins: Pins) -> None:
    """Raise EnvironmentFailure if the builder needs a C compiler and there is none."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    # setuptools calls the compiler that Python was built with.
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    lacking = [] if shutil.which(compiler) else [f"no C compiler `{compiler}`"]
    lacking += [] if header.is_file() else [f"no {header}"]
    if pins.compiled and lacking:
        raise EnvironmentFailure(
            f"the builder {pins.name!r} must compile {', '.join(pins.compiled)}, but there is "
            f"{' and '.join(lacking)}",
            hint="install them (Debian and Ubuntu: apt-get install gcc python3-dev), or use the "
            "docker runner",
        )


def make_bare_environment(
    folder: Path, requirements: Path, log: TextIO, progress: Progress
) -> Path:
    """Create an environment for one of our tools at `folder`; return its Python."""
    installer = _Installer(folder, log, progress)
    installer.create()
    installer.install(requirements)
    return installer.python


def _install_torch(pins: Pins, installer: _Installer) -> None:
    """Install torch from pip's configured sources, else torch's index, else PyPI."""
    if pins.torch is None:
        return
    chosen = pins.cuda
    if pins.torch != chosen:
        if installer.try_torch(pins.torch):
            return
        if _answers(TORCH_CPU_INDEX) and installer.try_torch(
            pins.torch, "--extra-index-url", TORCH_CPU_INDEX
        ):
            return
        if chosen is not None:
            installer.progress.warn(
                f"no working CPU build of torch in {TORCH_CPU_INDEX}, pip's configuration or "
                f"WEIGHTSMITH_WHEELS: installing PyPI's with CUDA libraries ({_CUDA_SIZE})"
            )
    installer.install(chosen or pins.torch)


def _answers(url: str) -> bool:
    try:
        with paced(httpx.Client(follow_redirects=True, timeout=3)) as client:
            return client.head(f"{url}/torch/").is_success
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, ImportError):
        return False


@dataclass(frozen=True, slots=True)
class _Installer:
    """pip in one environment; its output goes to the log, its steps to `progress`."""

    folder: Path
    log: TextIO
    progress: Progress

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def create(self) -> None:
        # The base interpreter: else the environment would break when ours is deleted.
        base = getattr(sys, "_base_executable", sys.executable)
        process.run(
            [base, "-m", "venv", self.folder], env=process.scrubbed(), on_line=self._keep
        ).require(
            "making a virtual environment",
            hint="install Python's venv module (Debian and Ubuntu: apt-get install python3-venv)",
        )

    def install(self, requirements: Path, *options: str) -> None:
        self._pip(requirements, options).require(
            f"installing {requirements.parent.name}/{requirements.name}",
            hint="check that the package index can be reached (pip's configuration and the proxy "
            "variables are used); WEIGHTSMITH_WHEELS may name a folder of wheels; "
            f"log: {self.log.name}",
        )

    def try_torch(self, requirements: Path, *options: str) -> bool:
        """Install and import torch: a build for a newer C library installs but does not import."""
        if self._pip(requirements, ["--force-reinstall", *options]).returncode != 0:
            return False
        load: list[str | Path] = [self.python, "-c", "import torch"]
        return process.run(load, env=process.scrubbed(), on_line=self._keep).returncode == 0

    def build(self, requirements: Path) -> None:
        only = ["--only-binary", ":none:", "--no-build-isolation"]
        self._pip(requirements, only).require(
            f"building {requirements.parent.name}/{requirements.name}",
            hint="a package written in C needs a C compiler and Python's headers (Debian and "
            "Ubuntu: "
            f"apt-get install gcc python3-dev); log: {self.log.name}",
        )

    def check(self, accepted: frozenset[str]) -> None:
        asked = process.run(
            [self.python, "-m", "pip", "check"], env=self._env(), on_line=self._keep
        )
        if {line for line in asked.tail if line.strip()} - accepted:
            asked.require(
                "pip check of the new environment",
                hint=f"the builder's requirements are not compatible; log: {self.log.name}",
            )

    def _pip(self, requirements: Path, options: Sequence[str]) -> process.Completed:
        words = requirements.read_text("utf-8").splitlines()
        total = sum(1 for word in words if re.match(r"[A-Za-z0-9]", word))
        wheels = path_in("WEIGHTSMITH_WHEELS")
        command: list[str | Path] = [
            *(self.python, "-m", "pip", "install", "--require-hashes", "--no-deps"),
            *("--only-binary", ":all:", "--no-input", "--progress-bar", "off"),
            *(("--find-links", wheels) if wheels else ()),
            *options,
            *("-r", requirements),
        ]

        def install() -> process.Completed:
            seen = 0

            def on_line(line: str) -> None:
                nonlocal seen
                self._keep(line)
                if line.startswith("Collecting "):
                    seen += 1
                    self.progress.advance(min(seen, total), total, "packages")

            return process.run(command, env=self._env(), on_line=on_line)

        return persistently(install, self.progress)

    def _env(self) -> dict[str, str]:
        return process.scrubbed(network=True, prefixes=("PIP_", "XDG_"))

    def _keep(self, line: str) -> None:
        self.log.write(line + "\n")


@contextmanager
def locked(path: Path, what: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Hold a file's lock while the block runs; `what` says what its holder is doing."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        take(handle, fcntl.LOCK_EX, lambda who: tell(f"{who} {what}: waiting for it ({path})"))
        yield
    finally:
        os.close(handle)
