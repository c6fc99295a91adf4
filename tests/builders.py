"""Makes the builders that the tests need, once: minutes the first time, nothing afterwards.

Apart from the tests, so that a test's time limit never has to cover downloads and compiling.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests import vllm_parts
from toolchain.cli.progress import progress_for
from toolchain.drivers.docker import DockerEngine, DockerRunner
from toolchain.drivers.local import LocalRunner
from toolchain.errors import WeightsmithError
from toolchain.ports import Runner
from toolchain.wiring import cache_folder

BUILDERS = ("merge", "gguf")


def engine_environment() -> dict[str, str]:
    """Return the variables that tests/engine.sh names for builders on this machine."""
    script = Path(__file__).with_name("engine.sh")
    said = subprocess.run(["bash", script, "--env"], capture_output=True, text=True, check=False)
    pairs = (line.removeprefix("export ").partition("=") for line in said.stdout.splitlines())
    return {name: value for name, _, value in pairs}


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
                runner.prepare(builder, progress)
            except WeightsmithError as error:
                print(f"error: {error.message}\n  hint: {error.hint}", file=sys.stderr)  # noqa: T201
                return error.exit_code
    # A machine may lack the room for these, and its tests say so.
    try:
        if (reason := vllm_parts.unfit()) and not vllm_parts.there():
            progress.note(f"no vLLM: {reason}")
        else:
            vllm_parts.make(progress)
    except WeightsmithError as error:
        progress.warn(f"no vLLM: {error.message}; {error.hint}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
