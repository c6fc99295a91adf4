"""A local builder without packages, made in a moment: enough for the `echo` job."""

import sys
import venv
from pathlib import Path
from typing import Any

from weightsmith.core.jobs import Input
from weightsmith.core.resources import optional_engines
from weightsmith.outside.environment import environment_folder
from weightsmith.outside.local import LocalRunner, _pins
from weightsmith.outside.toolset import failure_marker, toolset_folder

from tests.fakes.echo import EchoJob, let_runners_start_it


def bare_builder(cache: Path, name: str = "merge") -> Path:
    let_runners_start_it()
    folder = environment_folder(cache, _pins(name))
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    (folder / ".complete").write_text("")
    for engine in optional_engines(name):
        marker = failure_marker(toolset_folder(cache, engine))
        marker.parent.mkdir(exist_ok=True)
        marker.touch()  # it looks tried: compiling would take half a minute per test
    return cache


def bare_runner(cache: Path, **options: bool) -> LocalRunner:
    return LocalRunner(bare_builder(cache), **options)


def echo_job(folder: Path, **wishes: Any) -> EchoJob:
    """Return a job that reads one file and writes one, below a folder."""
    for name in ("in", "out"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    text = folder / "in" / "text.txt"
    text.write_text("grüße\n", encoding="utf-8")
    wishes = {"seconds": 0, "memory_bytes": 1 << 30, **wishes}
    return EchoJob(builder="merge", text=Input(path=text), output=folder / "out", **wishes)


if __name__ == "__main__":
    import json

    from weightsmith.core.errors import WeightsmithError
    from weightsmith.outside.confinement import targets

    from tests.fakes.journal import RecordingProgress

    here, progress = Path(sys.argv[1]), RecordingProgress()
    runner = bare_runner(here / "cache", allow_network="--allow-network-in-jobs" in sys.argv)
    try:
        with targets() as outside:
            answer = runner.run(echo_job(here, targets=outside), progress)
    except WeightsmithError as error:
        answer = {"exit_code": error.exit_code, "message": error.message, "hint": error.hint}
    print(json.dumps({**answer, "lines": progress.lines, "networked": runner.networked}))  # noqa: T201
