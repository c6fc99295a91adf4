"""Runs jobs in virtual environments of this machine: what there is without a container engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from toolchain.drivers import process
from toolchain.drivers.environment import (
    Pins,
    check_compiler,
    environment_folder,
    is_complete,
    make_environment,
)
from toolchain.drivers.hardware import cores, gpu_names
from toolchain.drivers.ownership import private_folder
from toolchain.drivers.toolset import make_toolset, toolset_folder
from toolchain.drivers.wire import Conversation, job_file, open_log
from toolchain.ports import Progress
from toolchain.resources import compiled_engines, package
from toolchain.values import Job, Json


class LocalRunner:
    """Runs each job in a subprocess of its builder's own virtual environment below `cache`.

    The subprocess has no network where the kernel lets us take it away, none of the caller's
    tokens, a memory limit, and ends with us. It is not kept from reading or writing the user's
    other files: that takes the container runner.
    """

    name = "local"

    def __init__(self, cache: Path) -> None:
        self._cache = cache

    def prepare(self, builder: str, progress: Progress) -> None:
        """Make the builder's environment and tools, if they are not there."""
        pins = _pins(builder)
        if not is_complete(environment_folder(self._cache, pins)):
            progress.note(
                f"making the builder {builder!r} ({pins.flavour}) in {self._cache}: "
                "one to three minutes, once"
            )
        make_environment(self._cache, pins, progress)
        for engine in compiled_engines(builder):
            make_toolset(self._cache, engine, progress)

    def check(self, builder: str) -> None:
        """Raise EnvironmentFailure where a package has to be compiled, and nothing here can."""
        pins = _pins(builder)
        if not is_complete(environment_folder(self._cache, pins)):
            check_compiler(pins)

    def ready(self, builder: str) -> bool:
        """Say whether environment and tools are there."""
        tools = [toolset_folder(self._cache, engine) for engine in compiled_engines(builder)]
        return is_complete(environment_folder(self._cache, _pins(builder))) and all(
            folder.is_dir() for folder in tools
        )

    def run(self, job: Job, progress: Progress) -> Mapping[str, Json]:
        """Run the job to its end; raises the job's own error, EnvironmentFailure where it died."""
        self.prepare(job.builder, progress)
        python = environment_folder(self._cache, _pins(job.builder)) / "bin" / "python"
        with private_folder(self._cache) as folder, open_log(self._cache, job.stage) as log:
            _furnish(folder)
            conversation = Conversation(job=job, progress=progress, log=log)
            (folder / "job.json").write_text(_local_job(job), encoding="utf-8")
            isolated = process.can_leave_network()
            if not isolated:
                log.write("this machine does not let us take the network away from the job\n")
            done = process.run(
                [python, "-m", "toolchain.worker", folder / "job.json"],
                cwd=folder / "tmp",
                env=self._environment(job, folder),
                on_line=conversation.hear,
                on_error_line=conversation.hear_error,
                hold_stdin=True,
                limits=process.Limits(
                    # A GPU's memory is mapped into the process, so no such limit would hold.
                    memory_bytes=0 if job.use_gpu and gpu_names() else job.memory_bytes,
                    network=not isolated,
                ),
            )
            return conversation.result(done.returncode)

    def _environment(self, job: Job, folder: Path) -> dict[str, str]:
        own = {
            **worker_environment(),
            "HOME": str(folder / "tmp"),
            "TMPDIR": str(folder / "tmp"),
            "PYTHONPATH": str(folder / "lib"),
            "PYTHONSAFEPATH": "1",
        }
        for engine in compiled_engines(job.builder):
            own["WEIGHTSMITH_TOOLS"] = str(toolset_folder(self._cache, engine))
        return process.scrubbed(own)


def _furnish(folder: Path) -> None:
    """Give the job a temporary folder, and nothing to import but our package."""
    (folder / "tmp").mkdir()
    (folder / "lib").mkdir()
    (folder / "lib" / "toolchain").symlink_to(package())


def worker_environment() -> dict[str, str]:
    """Return the variables that every worker gets, wherever it runs."""
    return {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(cores()),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONUNBUFFERED": "1",
        "LANG": "C.UTF-8",
    }


def _pins(builder: str) -> Pins:
    return Pins(name=builder, flavour="cuda" if gpu_names() else "cpu")


def _local_job(job: Job) -> str:
    inputs = {name: str(path.absolute()) for name, path in job.inputs.items()}
    return job_file(job, inputs, str(job.output.absolute()))
