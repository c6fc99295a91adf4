"""Makes an engine's files for any platform from pins, without root or a container engine.

vLLM needs a C library and Python, and not every site can pull a base image: pinned `.deb` files and
wheels need only pip and a mirror. The C library is from a newer Debian than Python, because torch's
CPU build requires that.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path

from weightsmith.core.platforms import machine_of
from weightsmith.core.ports import Progress
from weightsmith.core.resources import assembles_itself, engine_source, images
from weightsmith.outside import process
from weightsmith.outside.toolset import make_toolset
from weightsmith.outside.worker_protocol import open_log

_STEP = re.compile(r"\[(\d+)/(\d+)\]")


def make_engine_files(
    cache: Path, engine: str, platform: str, folder: Path, progress: Progress
) -> None:
    """Fill an empty folder with an engine's files for a platform: its pins decide every byte.

    They are assembled from packages, or compiled for a platform that is not this machine's. Raises
    EnvironmentFailure if packages or sources cannot be downloaded, or do not compile.
    """
    machine = machine_of(platform)
    if assembles_itself(engine):
        _assemble(cache, engine, machine, folder, progress)
        return
    tools = make_toolset(cache, engine, progress, machine=machine)
    shutil.copytree(tools / "app", folder, dirs_exist_ok=True)


def _assemble(cache: Path, engine: str, machine: str, folder: Path, progress: Progress) -> None:
    room = int(str(engine_source(engine)["room_bytes"]))
    progress.note(
        f"assembling {engine} for {machine} from its pinned packages, once on this machine: "
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
                *(sys.executable, recipe, "--out", folder, "--arch", machine),
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
