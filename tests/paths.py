"""Where the repository lies: the one place of the tests that counts folders up from a file."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny"
