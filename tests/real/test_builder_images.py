"""The quantizers' builders as container images: built, confined, and with the same result."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny"

# An image is 1.5 GB and takes about three minutes to build, once.
pytestmark = [
    pytest.mark.real,
    pytest.mark.docker,
    pytest.mark.builders,
    pytest.mark.timeout(3600),
]


def quantize(format_: str, runner: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    out = folder / f"{format_}-{runner}"
    done = subprocess.run(
        [sys.executable, "-m", "weightsmith", "quantize", "--model", TINY / "base",
         "--format", format_, "--calibration", TINY / "calibration.jsonl",
         "--out", out, "--runner", runner, "--json"],
        env={**os.environ, "WEIGHTSMITH_STORE": str(folder / f"store-{runner}")},
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return out, json.loads(done.stdout)


@pytest.mark.parametrize("format_", ["awq", "awq-autoawq", "awq-compressed", "gptq", "fp8-static"])
def test_a_container_makes_what_an_environment_makes(format_: str, tmp_path: Path) -> None:
    """The same pins on another distribution's Python, with the same CPU and number of threads.

    Which it also makes a second time: llm-compressor's scales differed in their last bits.
    """
    here, _ = quantize(format_, "local", tmp_path)
    there, told = quantize(format_, "docker", tmp_path)

    assert told["quality"]["exceeded"] == []
    assert digests(here) == digests(there)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
