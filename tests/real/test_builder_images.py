"""The quantizers' builders as container images: built, confined, and with the same result."""

import hashlib
from pathlib import Path

import pytest

from tests.fakes.started import weightsmith
from tests.paths import TINY

# An image is 1.5 GB and takes about three minutes to build, once.
pytestmark = [
    pytest.mark.real,
    pytest.mark.docker,
    pytest.mark.builders,
    pytest.mark.timeout(3600),
]


@pytest.mark.parametrize("format_", ["awq", "awq-autoawq", "awq-compressed", "gptq", "fp8-static"])
def test_a_container_makes_what_an_environment_makes(format_: str, tmp_path: Path) -> None:
    """The same pins on another distribution's Python, with the same CPU and number of threads.

    Which it also makes a second time: llm-compressor's scales differed in their last bits.
    """
    found = {}
    for runner in ("local", "docker"):
        out, store = tmp_path / runner, tmp_path / f"store-{runner}"
        told = weightsmith(
            "quantize", "--model", TINY / "base", "--format", format_, "--out", out,
            "--calibration", TINY / "calibration.jsonl", "--runner", runner, store=store,
        )  # fmt: skip
        assert told["quality"]["exceeded"] == []
        found[runner] = {p.name: hashlib.sha256(p.read_bytes()).digest() for p in out.iterdir()}

    assert found["local"] == found["docker"]
