"""Makes the builders that the tests need, once: minutes the first time, nothing afterwards.

Apart from the tests, so that a test's time limit never has to cover downloads and compiling.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from weightsmith.building.progress import progress_for
from weightsmith.building.wiring import cache_folder
from weightsmith.core.errors import EnvironmentFailure, WeightsmithError
from weightsmith.core.ports import Progress, Runner
from weightsmith.outside.docker import DockerEngine
from weightsmith.outside.docker_containers import DockerRunner
from weightsmith.outside.local import LocalRunner
from weightsmith.outside.toolset import make_toolset

from tests import vllm_parts

BUILDERS = ("merge", "gguf")


def engine_environment() -> dict[str, str]:
    """Return the variables that tests/engine.sh names for builders on this machine."""
    script = Path(__file__).with_name("engine.sh")
    said = subprocess.run(["bash", script, "--env"], capture_output=True, text=True, check=False)
    pairs = (line.removeprefix("export ").partition("=") for line in said.stdout.splitlines())
    return {name: value for name, _, value in pairs}


def patiently(make: Callable[[], object], progress: Progress) -> None:
    """Make something of downloads; an index or mirror may have a bad minute, so in three tries."""
    for pause in (15, 60):
        try:
            return make()
        except EnvironmentFailure as error:
            progress.warn(f"{error.message}: tried again in {pause} s")
        time.sleep(pause)
    return make()


def main() -> int:
    """Prepare every builder in the local runner, and in the engine where one answers; vLLM too."""
    engine = DockerEngine()
    runners: list[Runner] = [LocalRunner(cache_folder())]
    if engine.answers():
        if "WEIGHTSMITH_BUILDER_BASE" not in os.environ:
            os.environ.update(engine_environment())
        runners.append(DockerRunner(engine, cache_folder()))
    progress = progress_for()
    for runner in runners:
        for builder in BUILDERS:
            progress.stage(f"builder {builder}", f"{runner.name} runner")
            try:
                patiently(lambda r=runner, b=builder: r.prepare(b, progress), progress)
            except WeightsmithError as error:
                print(f"error: {error.message}\n  hint: {error.hint}", file=sys.stderr)  # noqa: T201
                return error.exit_code
    try:
        patiently(partial(make_toolset, cache_folder(), "healthcheck", progress), progress)
    except WeightsmithError as error:
        print(f"error: {error.message}\n  hint: {error.hint}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    # A machine may lack the room for these, and its tests say so.
    try:
        if (reason := vllm_parts.unfit()) and not vllm_parts.there():
            progress.note(f"no vLLM: {reason}")
        else:
            patiently(lambda: vllm_parts.make(progress), progress)
    except WeightsmithError as error:
        progress.warn(f"no vLLM: {error.message}; {error.hint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
