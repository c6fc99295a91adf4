"""Where the repository lies: the one place of the tests that counts folders up from a file."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny"


def loaded(path: Path) -> ModuleType:
    """Import a program that lies in no package."""
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert spec
    assert spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
