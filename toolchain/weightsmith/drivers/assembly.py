"""Makes an engine's root file system from pinned packages, without root or a container engine."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from weightsmith.drivers import process
from weightsmith.drivers.worker_protocol import open_log
from weightsmith.ports import Progress
from weightsmith.resources import engine_source, images

_STEP = re.compile(r"\[(\d+)/(\d+)\]")


def assemble_engine(cache: Path, engine: str, folder: Path, progress: Progress) -> None:
    """Run the engine's `assemble.py` in an empty folder: the same pins give the same files.

    Raises EnvironmentFailure if packages cannot be downloaded.
    """
    room = int(str(engine_source(engine)["room_bytes"]))
    progress.note(
        f"assembling {engine} from its pinned packages, once for this machine: "
        f"{room / 1e9:.1f} GB at most, a few minutes"
    )
    recipe = images() / "engines" / engine / "assemble.py"
    wheels = os.environ.get("WEIGHTSMITH_WHEELS")
    with open_log(cache, f"engine-{engine}") as log:

        def on_line(line: str) -> None:
            log.write(line + "\n")
            if step := _STEP.match(line):
                progress.advance(int(step[1]), int(step[2]), "steps")

        process.run(
            [
                *(sys.executable, recipe, "--out", folder),
                *(("--find-links", wheels) if wheels else ()),
            ],
            env=process.scrubbed(
                network=True, prefixes=("PIP_", "XDG_", "WEIGHTSMITH_DEBIAN_MIRROR")
            ),
            on_line=on_line,
        ).require(
            f"assembling the engine {engine}",
            hint="check that Debian's mirror (WEIGHTSMITH_DEBIAN_MIRROR sets another) and the "
            f"package index can be reached; WEIGHTSMITH_WHEELS may name a folder of wheels; "
            f"log: {log.name}",
        )
