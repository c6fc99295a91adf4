"""Models that a program of ours trains, kept for later runs."""

import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory


def trained(
    name: str,
    cache: Path,
    sources: Sequence[Path],
    words: Callable[[Path], Sequence[str | Path]],
    *paths: Path,
    python: str | Path = sys.executable,
) -> Path:
    """Return the folder that the first of `sources` writes; run once for its pins.

    The pins are the sources and the versions of what trains. The program gets the `words` for an
    empty folder and then the folder to write, imports from `paths`, and is a process of its own,
    because one thread and repeatable arithmetic are set for a whole process. Its Python is this
    one, unless another is named.
    """
    known = hashlib.sha256()
    for package in ("peft", "torch", "transformers"):
        known.update(f"{package} {version(package)}\n".encode())
    for source in sources:
        known.update(source.read_bytes())
    found = cache / f"{name}-{known.hexdigest()[:16]}"
    if found.is_dir():
        return found
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{name}.lock").open("w") as lock, TemporaryDirectory(dir=cache) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found.is_dir():  # another process has made it meanwhile
            return found
        made = Path(folder) / "made"
        path = os.pathsep.join(map(str, paths))
        done = subprocess.run(
            [python, sources[0], *words(Path(folder)), made],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        made.rename(found)
    return found
