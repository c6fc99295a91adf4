"""Other projects' readers of our forms, each in an environment of its own, made once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from weightsmith.building.wiring import cache_folder
from weightsmith.core.files import sibling_folder


def reader(package: str, *needs: str) -> Path:
    """Return a Python with one pinned package, and of its dependencies only what is named."""
    folder = cache_folder() / "readers" / package
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with sibling_folder(folder) as partial:
            subprocess.run([sys.executable, "-m", "venv", partial], check=True)
            pip = [partial / "bin" / "python", "-m", "pip", "install", "--quiet"]
            subprocess.run([*pip, "--no-deps", package], check=True)
            subprocess.run([*pip, *needs], check=True)
            partial.rename(folder)
    return folder / "bin" / "python"
