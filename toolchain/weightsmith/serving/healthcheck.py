"""The program in an image that asks its server: whether it serves, and answers as it was tested.

`images/engines/healthcheck/` has its source. Images for CPUs have it as their health check, and
manifests call it as startup probe.
"""

from __future__ import annotations

from dataclasses import dataclass

from weightsmith.serving.engine import Engine
from weightsmith.serving.plan import ServingPlan

NAME = "healthcheck"
"""Of the program, and of its folder in `images/engines/`."""
FOLDER = "/opt/weightsmith"
PROGRAM = f"{FOLDER}/{NAME}"
WITH_WEIGHTS = f"{NAME}-weights"
"""The program in the images of engines that do not tell the size of their weights."""
WEIGHTS = "/etc/weightsmith/weights.json"
"""The list of files of weights that it looks at."""
BEGINNING = 1 << 20
"""Bytes of each that it reads at most."""
_QUESTIONS, _TOKENS = 32, 64
"""What a replay set asks at most, and how long an answer of it is."""
_CPU_READS, _GPU_READS = 10_000_000_000, 300_000_000_000
"""Bytes a second of weights, as slow machines read them for each token."""
_COMPARES = 100_000_000
"""Bytes a second that are read and compared, with a slow disk or a slow CPU."""
_LEAST_CALL, _LEAST_ALL, _SPARE = 50, 60, 10
"""Seconds; a call must be over before the probe's own limit ends it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartupReplay:
    """How a container is asked its image's replay set before it gets requests."""

    command: tuple[str, ...]
    """Exits 0 once all answers are as they should be; each call goes on where one before ended."""
    call_seconds: int
    """How long one call may take."""
    seconds: int
    """How long the whole set may take."""


def health_command(engine: Engine) -> tuple[str, ...]:
    """Return the command that exits 0 while an engine serves."""
    moved = ("--port-variable", engine.port_variable) if engine.port_variable else ()
    return (PROGRAM, "--port", str(engine.port), *moved, "--health", engine.health_path)


def startup_replay(
    engine: Engine, plan: ServingPlan, *, whole_weights: bool = False
) -> StartupReplay:
    """Return the command and its limits of time, from the weights that each token reads.

    `whole_weights`: all their bytes are compared before.
    """
    reads = _GPU_READS * plan.gpus or _CPU_READS
    weights = plan.weights_bytes_per_gpu * max(1, plan.gpus)
    answer = _TOKENS * weights // reads
    call = max(_LEAST_CALL, answer)
    compare = _LEAST_ALL + weights // _COMPARES // 10 * 10 if whole_weights else 0
    key = ("--key-variable", engine.key_variable) if engine.key_variable else ()
    return StartupReplay(
        command=(
            *health_command(engine),
            "--seconds",
            str(call),
            *key,
            "--replay",
            "--if-any",
        ),
        call_seconds=call + _SPARE,
        seconds=max(_LEAST_ALL, _QUESTIONS * answer // 10 * 10) + compare,
    )
