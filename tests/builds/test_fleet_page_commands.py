"""The commands for Ray in the page about fleets, as they stand there: six images on two nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from weightsmith.building.wiring import cache_folder

from tests.paths import ROOT

PAGE = ROOT / "docs" / "how-to" / "build-a-fleet.md"
# `ray stop` ends every Ray process that it sees, and another test's cluster may have the port: so
# the commands see their own processes alone, and have a loopback of their own.
ALONE = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--net", "bash", "-c")
BEFORE = "set -euo pipefail\nip link set lo up\n"
AFTER = "\nif pgrep -l 'raylet|gcs_server'; then echo 'Ray still runs'; exit 9; fi\n"


def commands() -> str:
    """Return the page's block that starts a cluster."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (found,) = (block for block in blocks if "ray start" in block)
    return str(found)


@pytest.mark.builders
@pytest.mark.ray
@pytest.mark.root
@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    not (shutil.which("unshare") and shutil.which("ip")), reason="no unshare or no ip"
)
def test_six_images_come_out_of_two_nodes(tmp_path: Path) -> None:
    checkout, home = tmp_path / "checkout", tmp_path / "home"
    for folder in (checkout, home):
        folder.mkdir()
    for name in ("examples", "tasks.py", "toolchain"):
        (checkout / name).symlink_to(ROOT / name)
    script = commands()
    # A short path: names of sockets have at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="wf-", dir="/tmp") as sockets:
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT / 'tests/without'}:{ROOT / 'toolchain'}:{ROOT}",
            "HOME": str(home),
            "WEIGHTSMITH_CACHE": str(cache_folder()),  # the builders that are made
            "WEIGHTSMITH_STORE": str(tmp_path / "store"),
            "DOCKER_HOST": f"unix://{tmp_path}/no-engine.sock",
            "RAY_TMPDIR": sockets,
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        done = subprocess.run(
            [*ALONE, BEFORE + script + AFTER],
            cwd=checkout, env=environment, check=False, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]

    cells = json.loads((checkout / "dist" / "fleet.json").read_text())["cells"]
    assert len({cell["digest"] for cell in cells if cell["digest"]}) == 6
    assert {cell["verdict"] for cell in cells} <= {"passed", "not proven"}
    assert (home / "fleet-cache" / "entries").is_dir()
