"""The wheel is installed in one line, in a fresh container of Debian, by pip, pipx and uv."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from weightsmith import __version__

from tests.builders import engine_environment
from tests.paths import ROOT

WAYS = {
    "pip": "python3 -m venv /tmp/env && /tmp/env/bin/pip install -q {wheel}"
    " && export PATH=/tmp/env/bin:$PATH",
    "pipx": "python3 -m venv /tmp/env && /tmp/env/bin/pip install -q pipx"
    " && /tmp/env/bin/pipx install -q {wheel} && export PATH=/root/.local/bin:$PATH",
    "uv": "python3 -m venv /tmp/env && /tmp/env/bin/pip install -q uv"
    " && /tmp/env/bin/uv tool install -q {wheel} && export PATH=/root/.local/bin:$PATH",
}
pytestmark = [pytest.mark.docker, pytest.mark.full]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "uv", "build", "-q", "--wheel", "--out-dir", out, ROOT]
    subprocess.run(build, check=True)
    (found,) = out.glob("*.whl")
    return found


@pytest.mark.parametrize("way", WAYS)
def test_in_one_line(way: str, wheel: Path) -> None:
    base = engine_environment().get(
        "WEIGHTSMITH_BUILDER_BASE", "docker.io/library/python:3.12-slim"
    )
    flags = ["--net=host", f"--volume={wheel.parent}:/wheel:ro"]
    if bundle := os.environ.get("SSL_CERT_FILE"):
        flags += [f"--volume={bundle}:{bundle}:ro"]
        flags += [f"--env={name}={bundle}" for name in ("SSL_CERT_FILE", "PIP_CERT")]
    script = WAYS[way].format(wheel=f"/wheel/{wheel.name}")
    script += " && weightsmith --version && weightsmith --list | wc -l"
    done = subprocess.run(
        ["docker", "run", "--rm", *flags, base, "sh", "-euc", script],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    version, lines = done.stdout.split("\n")[:2]
    assert version == f"weightsmith {__version__}"
    assert int(lines) > 20
