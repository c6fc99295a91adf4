"""A Python that an ordinary user runs, also where the tests' user is root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.paths import ROOT


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
