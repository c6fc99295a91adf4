"""Program of a thin image: merges base and adapters, compares every file, then starts the server.

    python3 -I -B /opt/weightsmith [SERVER ARGUMENT…]

Without a server it only merges, as an init container does. Nothing is served that differs from what
the build's gate saw. Of the image's Python it uses numpy alone, whatever else lies there.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn

from weightsmith.core.errors import WeightsmithError
from weightsmith.core.escape import escaped
from weightsmith.core.thin import LEAST_PYTHON, MANIFEST

_ENDED = 128 + signal.SIGTERM
_NOT_OURS = ("ml_dtypes", "threadpoolctl", "torch", "safetensors")
"""Packages that an engine may have in any version: code that could use them does without."""
_ONE_THREAD = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")


def main(words: list[str], manifest: Path = Path(MANIFEST)) -> int:
    """Merge, then become the server; returns an exit code if there is none, or if it failed."""
    environment = dict(os.environ)
    if sys.version_info[:2] < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        _say(f"error: this image's Python is older than {least}")
        return 5
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGINT, _end)
    for name in _NOT_OURS:
        sys.modules[name] = None  # type: ignore[assignment]
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))  # before numpy is imported
    os.environ["WEIGHTSMITH_TOOLS_KERNELS"] = str(Path(sys.argv[0]).absolute() / "kernels")
    from weightsmith.worker.merging_at_start import merged

    try:
        folder = merged(manifest)
    except WeightsmithError as error:
        hint = f"\n  hint: {escaped(error.hint)}" if error.hint else ""
        _say(f"error: {escaped(error.message)}{hint}")
        return error.exit_code
    except MemoryError:
        _say("error: merging ran out of memory: see thin.json's memory_bytes")
        return 5
    if not words:
        return 0
    _say(f"starting the server on {folder}")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        os.execvpe(words[0], words, environment)  # noqa: S606 - the image's own command
    except OSError as error:
        _say(f"error: {words[0]} cannot be started: {error.strerror}")
        return 5


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _end(_number: int, _frame: object) -> NoReturn:
    """Unwind, so that what is half done is deleted; a second signal changes nothing."""
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)
    raise SystemExit(_ENDED)
