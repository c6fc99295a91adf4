"""Runs jobs in virtual environments on this machine, without a container engine.

The `auto` runner takes the engine if it can make the builder, else this machine. Both give the same
bytes, so a build may mix them, with a warning: failing would make a registry mirror a condition of
the first image.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure, UsageError
from weightsmith.core.jobs import Job, write_job
from weightsmith.core.ports import Progress, Runner
from weightsmith.core.resources import compiled_engines, package
from weightsmith.core.values import JsonValue
from weightsmith.outside import process, toolset
from weightsmith.outside.confinement import confinement, interpreter, job_sandbox
from weightsmith.outside.environment import (
    Pins,
    check_compiler,
    environment_folder,
    is_complete,
    make_environment,
)
from weightsmith.outside.hardware import (
    DISTRIBUTION_FOLDERS,
    cores,
    driver_libraries,
    gpu_names,
)
from weightsmith.outside.lines import RESULT
from weightsmith.outside.memory_watchdog import lies_in_memory
from weightsmith.outside.ownership import private_folder
from weightsmith.outside.worker_protocol import Conversation, open_log

_RESERVED, _RESERVED_PER_CORE = 768 << 20, 128 << 20
"""Bytes that the kernel counts towards RLIMIT_DATA but no page is behind: stacks of threads and
glibc's arenas, 64 MiB and a stack of 8 MiB for each thread. Measured with torch on two cores:
660 MiB of 1,460."""
_MAPPINGS = 3
"""How often a job maps an input at a time: base and adapter are views of the same files."""
WAYS_OUT = (
    "use the docker runner; or have the kernel give ordinary users namespaces (Ubuntu: sysctl "
    "kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile with `userns`; "
    "elsewhere: sysctl user.max_user_namespaces) or system call filters; or give "
    "--allow-network-in-jobs"
)
"""Hint if jobs cannot be isolated from the network."""


class LocalRunner:
    """Runs each job in a sandboxed subprocess in its builder's virtual environment below `cache`.

    The subprocess has no network, none of the caller's tokens, a memory limit, and dies with us.
    It can read its inputs, its builder and the system's libraries, write its output and a temporary
    folder, and reach no other program, as far as the kernel supports that: `doctor` reports it. If
    not even the network can be blocked, no job is run, unless `allow_network` is given.
    """

    name = "local"

    def __init__(self, cache: Path, *, allow_network: bool = False) -> None:
        self._cache = cache
        self._allow_network = allow_network
        self.networked = False

    def prepare(self, builder: str, progress: Progress) -> None:
        """Create the builder's environment and tools, if needed."""
        self._require_confinement()
        pins = _pins(builder)
        if not is_complete(environment_folder(self._cache, pins)):
            progress.note(
                f"making the builder {builder!r} ({pins.flavour}) in {self._cache}: "
                "one to three minutes, once"
            )
        make_environment(self._cache, pins, progress)
        for engine in compiled_engines(builder):
            toolset.make_toolset(self._cache, engine, progress)
        toolset.try_toolsets(self._cache, builder, progress)

    def check(self, builder: str) -> None:
        """Raise EnvironmentFailure if jobs would have network access, or a compiler is missing.

        UsageError for a folder that a builder cannot be in.
        """
        self._require_confinement()
        pins = _pins(builder)
        if not is_complete(environment_folder(self._cache, pins)):
            check_compiler(pins)

    def ready(self, builder: str) -> bool:
        """Say whether environment and tools are complete."""
        tools = [toolset.toolset_folder(self._cache, one) for one in compiled_engines(builder)]
        return is_complete(environment_folder(self._cache, _pins(builder))) and all(
            folder.is_dir() for folder in tools
        )

    def run(
        self, job: Job, progress: Progress, *, stop: int | None = None
    ) -> Mapping[str, JsonValue]:
        """Run the job; raises the job's own error, or EnvironmentFailure if it died.

        InterruptedError once the open file `stop` can be read.
        """
        self.prepare(job.builder, progress)
        here = {n: given.at(given.path.absolute()) for n, given in job.inputs.items()}
        job = job.at(here, job.output.absolute())
        environment = environment_folder(self._cache, _pins(job.builder))
        python = environment / "bin" / "python"
        compiled = compiled_engines(job.builder)
        tools = {name: toolset.toolset_folder(self._cache, name) for name in compiled}
        tools |= toolset.optional_toolsets(self._cache, job.builder)
        with (
            private_folder(self._cache) as folder,
            open_log(self._cache, job.kind) as log,
            Conversation(job=job, progress=progress, log=log).in_time() as conversation,
        ):
            temporary, lib = folder / "tmp", folder / "lib"
            temporary.mkdir()
            lib.mkdir()  # from which only our package is imported
            (lib / "weightsmith").symlink_to(package())
            (folder / "job.json").write_text(write_job(job), encoding="utf-8")
            found = confinement()
            sandbox = job_sandbox(
                found,
                run=[environment, *interpreter(python), package(), *tools.values()],
                read=[folder],
                inputs=[given.path for given in job.inputs.values()],
                write=[temporary, job.output],
                gpu=job.use_gpu,
                sockets=not found.network,
                shared_bytes=job.memory_bytes,
            )
            if left := found.left():
                log.write(f"on this machine the job can reach {left}\n")
            if sandbox.sockets:
                if not self.networked:
                    progress.warn("jobs have network access, because of --allow-network-in-jobs")
                self.networked = True
            done = process.run(
                [python, "-m", "weightsmith.worker", folder / "job.json"],
                cwd=temporary,
                env=_environment(temporary, lib, tools),
                on_line=conversation.on_line,
                on_error_line=conversation.on_error_line,
                longest_line=RESULT,
                hold_stdin=True,
                timeout=job.seconds or None,
                stop=stop,
                limits=process.ResourceLimits(
                    # A GPU's memory is mapped into the process, so no such limit would hold.
                    memory_bytes=0 if job.use_gpu and gpu_names() else _most_data(job),
                    resident_bytes=job.memory_bytes,
                    shared=not lies_in_memory(job.output, *(i.path for i in job.inputs.values())),
                    sandbox=sandbox,
                ),
            )
            result = conversation.result(done.returncode)
            return {**result, "network_in_jobs": True} if sandbox.sockets else result

    def _require_confinement(self) -> None:
        if os.pathsep in str(self._cache):  # it separates the folders of PATH and PYTHONPATH
            raise UsageError(
                f"a builder cannot be made in {self._cache}: its path has a colon",
                hint="set WEIGHTSMITH_HOME to a folder without one in its path",
            )
        if not self._allow_network and not confinement().network:
            raise EnvironmentFailure(
                "the local runner cannot isolate jobs from the network on this machine",
                hint=WAYS_OUT,
            )


def _environment(temporary: Path, lib: Path, tools: Mapping[str, Path]) -> dict[str, str]:
    own = {
        **worker_environment(),
        "HOME": str(temporary),
        "TMPDIR": str(temporary),
        # Else a quantizer's library makes its cache in /tmp, which a job may not write to.
        "HF_HOME": str(temporary / "hub"),
        "PYTHONPATH": str(lib),
        "PYTHONSAFEPATH": "1",
    }
    driver = {str(library.parent) for library in driver_libraries()}
    # Not a distribution's folders: its other libraries would go before torch's own.
    if driver and not driver & set(DISTRIBUTION_FOLDERS):
        own["LD_LIBRARY_PATH"] = driver.pop()
    named = {toolset.tools_variable(name): str(place) for name, place in tools.items()}
    return process.scrubbed({**own, **named})


def _most_data(job: Job) -> int:
    """Return RLIMIT_DATA for a job, in bytes; safetensors' mappings of files count."""
    if not job.memory_bytes:
        return 0
    weights = sum(
        entry.stat().st_size
        for given in job.inputs.values()
        for entry in (given.path.glob("*") if given.path.is_dir() else (given.path,))
        if entry.suffix in {".safetensors", ".gguf"}
    )
    reserved = _RESERVED + cores() * _RESERVED_PER_CORE
    return job.memory_bytes + reserved + _MAPPINGS * weights


def worker_environment() -> dict[str, str]:
    """Return the environment variables of every worker, in any runner."""
    return {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(cores()),
        # Jobs have threads of their own; idle ones of numpy's BLAS would take CPU time.
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONNOUSERSITE": "1",
        "PYTHONUNBUFFERED": "1",
        "LANG": "C.UTF-8",
    }


def _pins(builder: str) -> Pins:
    return Pins(name=builder, flavour="cuda" if gpu_names() else "cpu")


_LONG = 160
"""Characters of a reason; the middle of a longer one is cut."""


class FallbackRunner:
    """Uses the first runner, or the second for builders that the first cannot make.

    Both give the same bytes, so a build may mix them. A failed job is never retried, since it
    would fail the same way.
    """

    def __init__(self, first: Runner, second: Runner) -> None:
        self._first = first
        self._second = second
        self.name = first.name
        self._chosen: dict[str, Runner] = {}

    def prepare(self, builder: str, progress: Progress) -> None:
        """Prepare the builder in the first runner that can."""
        if builder in self._chosen:
            return
        try:
            self._first.prepare(builder, progress)
        except EnvironmentFailure as error:
            # The first line names what failed, the last says why.
            lines = [line.strip() for line in error.message.splitlines() if line.strip()]
            why = lines[-1] if lines[1:] else ""
            if len(why) > _LONG:
                why = f"{why[: _LONG // 2]} … {why[-_LONG // 2 :]}"
            progress.warn(
                f"the {self._first.name} runner cannot make the builder {builder!r}, so the "
                f"{self._second.name} runner runs its jobs: {f'{lines[0]} {why}'.rstrip()}"
            )
            self._second.prepare(builder, progress)
            self._chosen[builder] = self._second
        else:
            self._chosen[builder] = self._first

    @property
    def networked(self) -> bool:
        """Say whether any job had network access."""
        return self._first.networked or self._second.networked

    def check(self, builder: str) -> None:
        """Check nothing in advance: either runner may be able to make the builder."""

    def ready(self, builder: str) -> bool:
        """Say whether either runner has the builder."""
        return self._first.ready(builder) or self._second.ready(builder)

    def run(
        self, job: Job, progress: Progress, *, stop: int | None = None
    ) -> Mapping[str, JsonValue]:
        """Run the job in the runner that has its builder."""
        self.prepare(job.builder, progress)
        return self._chosen[job.builder].run(job, progress, stop=stop)
