"""Merges the model of a thin image into a folder, each file compared with what the gate saw.

A folder appears under its own name when all of its files are complete and right, so a killed merge
leaves nothing that looks like a model. The folder lock is the kernel's: containers that share a
volume merge once, and the others wait.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Self

from weightsmith.core.cpus import granted
from weightsmith.core.errors import CheckFailed, EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.json_objects import read_exactly
from weightsmith.core.safe_parse import INDEX, parse, parse_file, read_bytes
from weightsmith.core.thin import (
    FOLDER,
    MARKER,
    PLACES,
    SERVED,
    SPARE,
    CopiedFile,
    MadeFile,
    ThinModel,
)
from weightsmith.core.trees import discard
from weightsmith.merging.blocks import MergeCounts, Settings
from weightsmith.merging.companions import companion_files, index_json
from weightsmith.merging.libc import keep_freed_memory
from weightsmith.merging.outputs import OutputShard
from weightsmith.merging.plan import MergePlan, make_plan
from weightsmith.merging.shards import ShardMaker
from weightsmith.merging.stream import sha256_file
from weightsmith.merging.virtual import AT_ONCE, opened
from weightsmith.models.safetensors import NO_DATA, build_header
from weightsmith.quantizers.rounded import quantize
from weightsmith.quantizers.schemes import SCHEMES

STATE = "merging.json"
"""In the folder of temporary files: what is going on, for probes."""
CHECK = "WEIGHTSMITH_CHECK"
"""Variable: `digest` (default) or `time`, how a model that a volume already has is compared."""
_MOST_WORKERS = 16
_MODE = 0o644
_EVERY = 0.2
"""Seconds between two looks at how much is done."""


def merged(manifest: Path, places: Sequence[str] = PLACES, served: str = SERVED) -> Path:
    """Return the folder with the model of a manifest; merge it unless it is there already.

    Raises CheckFailed if a file differs from the manifest, EnvironmentFailure without a folder that
    has room, InputRefused and UsageError as a merge does.
    """
    check = os.environ.get(CHECK) or "digest"
    if check not in ("digest", "time"):
        raise UsageError(f"{CHECK}={check}: unknown", hint="one of digest, time")
    try:
        data = read_bytes(manifest, INDEX)
        model = read_exactly(ThinModel, parse(data.decode()))
        if model.format and model.format not in SCHEMES:
            raise ValueError(f"format {model.format!r}")
    except (OSError, ValueError) as error:
        raise InputRefused(
            f"{manifest} cannot be read: {error}", hint="the image is damaged: pull it again"
        ) from None
    name = hashlib.sha256(data).hexdigest()[:16]
    roots = [Path(place) for place in places]
    with _Progress(Path(served).parent / STATE) as progress:
        folder = next((r / name for r in roots if (r / name).is_dir()), None)
        if folder is None or not _holds(folder, model, check, progress):
            folder = _merge_in(_writable(roots), name, model, check, progress)
        _link(folder, Path(served))
        progress.say("ready")
    return Path(served)


def _writable(roots: Sequence[Path]) -> Path:
    for root in roots:
        with suppress(OSError):
            root.mkdir(mode=0o1777, exist_ok=True)
        if os.access(root, os.W_OK | os.X_OK):
            return root
    raise EnvironmentFailure(
        f"no folder to merge into: {' and '.join(map(str, roots))} cannot be written",
        hint=f"mount a volume at {roots[0]}",
    )


def _merge_in(root: Path, name: str, model: ThinModel, check: str, progress: _Progress) -> Path:
    folder, partial = root / name, root / f".merging-{name}"
    with _locked(root, progress):
        if folder.is_dir() and _holds(folder, model, check, progress):  # by now
            return folder
        for left in (folder, partial):  # of a killed merge, or altered since
            discard(left)
        free = shutil.disk_usage(root).free
        if free < model.size + SPARE:
            size = model.size + SPARE
            raise EnvironmentFailure(
                f"the merged model takes {size} bytes, and {root} has {free}",
                hint=f"give the container more shared memory (docker run --shm-size {size}), or "
                "mount a volume at /model",
            )
        try:
            partial.mkdir()
            _make(model, partial, progress)
            _copy(model.copied, partial)
            times = {f.name: (partial / f.name).stat().st_mtime_ns for f in model.files}
            (partial / MARKER).write_text(json.dumps(times), "utf-8")
            partial.rename(folder)
        except OSError as error:
            raise EnvironmentFailure(
                f"cannot write {error.filename or root}: {error.strerror}",
                hint="check the space and the permissions of that folder",
            ) from None
        finally:
            discard(partial)
    return folder


@contextmanager
def _locked(root: Path, progress: _Progress) -> Iterator[None]:
    handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say(f"waiting for another container that merges into {root}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _holds(folder: Path, model: ThinModel, check: str, progress: _Progress) -> bool:
    """Return whether a folder has exactly the model; says what differs."""
    progress.begin("comparing", model.size)
    try:
        times = parse_file(folder / MARKER)
    except (OSError, ValueError):
        times = None
    differs = [*_strange(folder, model)] if isinstance(times, dict) else [MARKER]
    for file in model.files if not differs else ():
        path = folder / file.name
        with suppress(OSError):
            status = path.lstat()
            same = status.st_size == file.size and status.st_mtime_ns == times.get(file.name)
            if same and path.is_file() and not path.is_symlink():
                continue
        differs.append(file.name)
    if not differs and check == "digest":
        for file, found in _hashed(folder, model.files):
            progress.add(file.size)
            differs += [file.name] if found != file.sha256 else []
    if not differs:
        progress.reach(model.size)
    else:
        progress.say(f"{folder / differs[0]} is not as it was merged: merging anew")
    return not differs


def _strange(folder: Path, model: ThinModel) -> Iterator[str]:
    """Yield what lies in a model's folders and is no file of it: a server may read that, too."""
    known: dict[Path, set[str]] = {}
    for path in (Path(MARKER), *(Path(file.name) for file in model.files)):
        for inner, outer in zip((path, *path.parents), path.parents, strict=False):
            known.setdefault(outer, set()).add(inner.name)
    for place, names in known.items():
        with suppress(OSError):  # what is missing is told elsewhere
            found = {path.name for path in (folder / place).iterdir()}
            yield from (str(place / one) for one in sorted(found - names))


def _hashed(
    folder: Path, files: Sequence[MadeFile | CopiedFile]
) -> Iterator[tuple[MadeFile | CopiedFile, str]]:
    """Yield files and the sha256 of what has their names; "" if nothing has."""

    def digest(file: MadeFile | CopiedFile) -> str:
        path = folder / file.name
        return sha256_file(path) if path.is_file() else ""

    with ThreadPoolExecutor(granted()) as pool:
        yield from zip(files, pool.map(digest, files), strict=True)


def _make(model: ThinModel, out: Path, progress: _Progress) -> None:
    if model.mounted and not Path(model.base, "config.json").is_file():
        raise EnvironmentFailure(
            f"the base is not in this image, and nothing is mounted at {model.base}",
            hint=f"mount the folder {FOLDER} of the image {model.mounted} there",
        )
    adapters = tuple((Path(one.folder), one.weight) for one in model.adapters)
    progress.begin("merging", sum(file.size for file in model.made))
    keep_freed_memory()
    done = 0
    if model.format:
        _round(model, adapters, out, progress)
        for file, found in _hashed(out, model.made):
            _compare(file, (out / file.name).stat().st_size if found else 0, found)
            done += file.size
            progress.reach(done)
        return
    plan = make_plan(Path(model.base), adapters, model.merge)
    outputs = plan.outputs
    workers = min(granted(), _MOST_WORKERS)
    maker = ShardMaker(Settings(device="cpu", workers=workers), MergeCounts(), proven=False)
    with closing(maker):
        for file in model.made:
            if missing := [name for name in file.tensors if name not in outputs]:
                raise CheckFailed(
                    f"base and adapters give no {missing[0]}, which {file.name} has",
                    hint="the image is damaged: pull it again",
                )
            shard = OutputShard(name=file.name, outputs=tuple(outputs[t] for t in file.tensors))
            told = maker.write(shard, out / file.name, progress.add).finish()
            _compare(file, int(str(told["size"])), str(told["sha256"]))
            done += file.size
            progress.reach(done)


def _compare(file: MadeFile | CopiedFile, size: int, sha256: str) -> None:
    if (size, sha256) != (file.size, file.sha256):
        raise CheckFailed(
            f"{file.name} is not what was tested: its sha256 is {sha256 or 'missing'}, not "
            f"{file.sha256}; nothing is served",
            hint="the image was altered, or memory is faulty: pull it again, or use another one",
        )


def _round(
    model: ThinModel, adapters: tuple[tuple[Path, float], ...], out: Path, progress: _Progress
) -> None:
    """Write rounded weights; merged rows are computed as they are read, and never stored."""
    base = Path(model.base)
    with tempfile.TemporaryDirectory(prefix="weightsmith-") as scratch:
        headers = Path(scratch)
        _write_headers(make_plan(base, adapters, model.merge), headers)
        with opened(headers, base, adapters, model.merge), progress.watched(out):
            threads = min(granted(), AT_ONCE)
            quantize(SCHEMES[model.format], headers, out, model.keep, threads=threads)
        wanted = {file.name for file in model.files}
        for path in out.iterdir():  # companions, which the image has
            if path.name not in wanted or path.suffix != ".safetensors":
                discard(path)


def _write_headers(plan: MergePlan, folder: Path) -> None:
    """Write the merged checkpoint without its data."""
    extra, _ = companion_files(plan)
    if plan.base.index_file:
        places = {output.name: shard.name for shard in plan.shards for output in shard.outputs}
        extra[plan.base.index_file] = index_json(places, 0, 0)
    for name, data in extra.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    for shard in plan.shards:
        tensors = [(output.name, output.dtype, output.shape) for output in shard.outputs]
        (folder / shard.name).write_bytes(build_header(tensors, NO_DATA))


def _copy(files: Sequence[CopiedFile], out: Path) -> None:
    for file in files:
        try:
            data = Path(file.source).read_bytes()
        except OSError:
            data = b""
        _compare(file, len(data), hashlib.sha256(data).hexdigest())
        path = out / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        path.chmod(_MODE)


def _link(folder: Path, served: Path) -> None:
    """Let the server find the folder; replaces the link of an earlier start."""
    new = served.with_name(f".{served.name}.new")
    try:
        new.unlink(missing_ok=True)
        new.symlink_to(folder)
        new.replace(served)
    except OSError as error:
        raise EnvironmentFailure(
            f"cannot link {served}: {error.strerror}",
            hint="the container must be able to write to /tmp",
        ) from None


class _Progress:
    """Says on stderr, and in a file for probes, what is going on and how much is done."""

    def __init__(self, file: Path) -> None:
        self._file, self._total = file, 1
        self._state, self._done, self._told, self._since = "", 0, -1, time.monotonic()

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Let nothing say that it goes on if it does not."""
        if kind is not None:
            self._write("failed")

    def say(self, text: str) -> None:
        """Print a line."""
        seconds = time.monotonic() - self._since
        sys.stderr.write(f"[{seconds:.1f} s] {text}\n")
        sys.stderr.flush()
        self._write(text)

    def begin(self, state: str, total: int) -> None:
        """Start counting anew."""
        self._state, self._total, self._done, self._told = state, max(1, total), 0, -1
        self.add(0)

    def add(self, size: int) -> None:
        """Count bytes; each tenth is a line."""
        self.reach(self._done + size)

    def reach(self, done: int) -> None:
        """Set how many bytes are done."""
        self._done = done
        tenth = min(10, 10 * done // self._total)
        if tenth > self._told:
            self._told = tenth
            self.say(f"{self._state}: {10 * tenth} % of {self._total / 1e9:.1f} GB")

    @contextmanager
    def watched(self, folder: Path) -> Iterator[None]:
        """Count what files in a folder take on the disk while the block runs."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(_EVERY):
                with suppress(OSError):
                    sizes = [path.stat().st_blocks * 512 for path in folder.iterdir()]
                    self.reach(max(self._done, sum(sizes)))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()

    def _write(self, state: str) -> None:
        told = {"state": state, "done_bytes": self._done, "total_bytes": self._total}
        with suppress(OSError):
            new = self._file.with_name(f".{self._file.name}.new")
            new.write_text(json.dumps(told), "utf-8")
            new.replace(self._file)
