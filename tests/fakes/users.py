"""Trees that are hard to delete, and ways to be somebody else, also where this is root."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.paths import ROOT

NOBODY = 65534


def nested(folder: Path, depth: int) -> None:
    """Make folders in one another, deeper than a path can say, with a file in the last."""
    here = os.open(folder, os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("deep", dir_fd=here)
        inside = os.open("deep", os.O_DIRECTORY, dir_fd=here)
        os.close(here)
        here = inside
    os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=here))
    os.close(here)


def closed_folders(folder: Path) -> None:
    """Make folders with each set of rights that an owner can lack, and a file in every one."""
    for mode in (0o000, 0o100, 0o400, 0o500, 0o600):
        inner = folder / f"{mode:o}" / "inner"
        inner.mkdir(parents=True)
        (inner / "file").write_bytes(b"x")
        inner.chmod(mode)
        inner.parent.chmod(mode)
    folder.chmod(0o000)


@contextmanager
def somebody_else() -> Iterator[Path]:
    """Work as another user for the length of the block, in a folder of theirs; takes root."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:  # root's own is closed
        folder = Path(name)
        folder.chmod(0o755)
        os.chown(folder, NOBODY, NOBODY)
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
        try:
            yield folder
        finally:
            os.seteuid(0)
            os.setegid(0)


def as_user(number: int = 65532) -> tuple[list[str], dict[str, str]]:
    """Return a Python that runs as an ordinary user, and its environment; skip where none can."""
    site = Path(pytest.__file__).parents[1]
    paths = map(str, (ROOT / "toolchain", ROOT, site))
    env = {"PYTHONPATH": ":".join(paths), "PATH": os.environ["PATH"]}
    user = ["setpriv", f"--reuid={number}", f"--regid={number}", "--clear-groups"]
    prefix = user if os.getuid() == 0 else []
    probe = ["-c", "import shutil, sys; assert shutil.which(sys.executable)"]
    for python in (sys.executable, f"/usr/bin/python3.{sys.version_info.minor}"):
        if subprocess.run([*prefix, python, *probe], env=env, check=False).returncode == 0:
            return [*prefix, python], env
    pytest.skip("no Python here that another user may run")
