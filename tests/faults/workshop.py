"""A user's place of work: a recipe, a store and the real command line, to be disturbed by tests."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from unittest.mock import patch

from weightsmith.building.wiring import cache_folder
from weightsmith.core.escape import quoted

from tests.fakes.command_line import weightsmith
from tests.fakes.started import hear_interrupts, until
from tests.paths import TINY

PROGRAM = Path(sys.executable).with_name("weightsmith")
BUILDERS = Path(os.environ.get("WEIGHTSMITH_TEST_CACHE") or cache_folder())
"""Builders are made once and kept here, because that takes minutes."""
TARGET = "llamacpp-q4_k_m"
RESULTS = Path("tiny-capitals", "1.0.0", TARGET)
QUESTIONS = 3
"""Of the example's twenty: enough for a score, and the reference answers in seconds."""
PATIENCE = 400.0
"""Seconds that any command may take, on a busy machine too; where builders are still to be made,
an hour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How one command ended."""

    code: int
    out: str
    err: str

    @property
    def told(self) -> dict[str, Any]:
        return json.loads(self.out)

    @property
    def digest(self) -> str:
        """The image's digest, of a build that succeeded."""
        assert self.code == 0, self.err
        return str(self.told["targets"][TARGET]["digest"])

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        assert self.code == 0, self.err
        return dict(self.told["targets"][TARGET]["stages"])

    def refused(self, code: int, *said: str) -> dict[str, Any]:
        """Check that it failed as users are promised, and that it says all of these things."""
        assert self.code == code, f"exit code {self.code}: {self.err}"
        assert "Traceback" not in self.out + self.err, self
        error = dict(self.told["error"])
        assert error["exit_code"] == code, self
        assert f"error: {quoted(error['message'])}" in self.err, self
        assert error["hint"], f"nothing says what to do next: {self}"
        text = f"{error['message']}\n{error['hint']}"
        missing = [words for words in said if words.lower() not in text.lower()]
        assert not missing, f"{missing} not in: {text}"
        assert len(text) < 2500, f"more than a few lines: {text}"
        return error


@dataclass(slots=True)
class Running:
    """A command that runs beside the test."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def err(self) -> str:
        return (self.folder / "stderr").read_text("utf-8", errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing running, whatever the test found."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def wait_for(self, words: str) -> None:
        """Wait until it says these words on standard error."""
        until = time.monotonic() + PATIENCE
        while True:
            ended = self.process.poll() is not None  # asked first: these may be its last words
            if words in self.err:
                return
            assert not ended, f"it ended without saying {words!r}: {self.err}"
            assert time.monotonic() < until, f"it does not say {words!r}: {self.err}"
            time.sleep(0.01)

    def end(self, patience: float = PATIENCE) -> Outcome:
        with self:
            code = self.process.wait(patience)
        return Outcome(code=code, out=(self.folder / "stdout").read_text("utf-8"), err=self.err)


@dataclass(frozen=True, slots=True)
class Finished:
    """A build of the example with fewer questions that nothing disturbed."""

    store: Path
    results: Path


@dataclass(slots=True)
class Workshop:
    """Folders of one test's own, and the command line run in them."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)
    _runs: int = 0
    _before: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        for name in ("tmp", "cache"):
            (self.folder / name).mkdir(parents=True)
        for name in ("builders", "toolsets"):
            (BUILDERS / name).mkdir(parents=True, exist_ok=True)
            (self.cache / name).symlink_to(BUILDERS / name)
        self.repair()
        self.env = {
            **{name: value for name, value in os.environ.items() if name != "WEIGHTSMITH_DEBUG"},
            "WEIGHTSMITH_HOME": str(self.cache),
            "WEIGHTSMITH_STORE": str(self.store),
            "TMPDIR": str(self.folder / "tmp"),
        }

    @property
    def tiny(self) -> Path:
        return self.folder / "tiny"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def results(self) -> Path:
        """The folder that a build of the example fills."""
        return self.folder / "dist" / RESULTS

    def start(
        self,
        *words: str,
        env: Mapping[str, str | None] | None = None,
        under: tuple[str, ...] = (),
    ) -> Running:
        """Start a command, `under` another; a variable that is None is taken away."""
        merged = {**self.env, **(env or {})}
        self._runs += 1
        place = self.folder / f"run-{self._runs}"
        place.mkdir()
        with (place / "stdout").open("wb") as out, (place / "stderr").open("wb") as err:
            process = subprocess.Popen(
                [*under, PROGRAM, *words],
                cwd=self.folder,
                env={name: value for name, value in merged.items() if value is not None},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                preexec_fn=hear_interrupts,
            )
        return Running(process, place)

    def run(self, *words: str, env: Mapping[str, str | None] | None = None) -> Outcome:
        return self.start(*words, "--json", env=env).end()

    def start_build(self, *words: str, env: Mapping[str, str | None] | None = None) -> Running:
        """Start a build of the recipe; flags come after the runner, and may override it."""
        return self.start("build", *self._recipe(words), "--json", env=env)

    def build(self, *words: str, env: Mapping[str, str | None] | None = None) -> Outcome:
        """Build the recipe to its end, in this process: a second less than one of its own."""
        merged = {**self.env, **(env or {})}
        given = {name: value for name, value in merged.items() if value is not None}
        with chdir(self.folder), patch.dict(os.environ, clear=True):
            ended = weightsmith("build", *self._recipe(words), "--json", env=given)
        return Outcome(code=ended.code, out=ended.out, err=ended.err)

    def _recipe(self, words: tuple[str, ...]) -> tuple[str, ...]:
        runner = () if "--runner" in words else ("--runner", "local")
        return ("--recipe", str(self.tiny / "recipe.yaml"), *runner, *words)

    def repair(self) -> None:
        shutil.rmtree(self.tiny, ignore_errors=True)
        shutil.copytree(TINY, self.tiny, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        data = self.tiny / "eval-a.jsonl"
        data.write_text("".join(data.read_text("utf-8").splitlines(keepends=True)[:QUESTIONS]))

    def forget(self, *stages: str) -> None:
        """Delete the store's results of these stages and the image: a build does them again."""
        for manifest in self.store.glob("results/*/manifest.json"):
            if json.loads(manifest.read_bytes())["note"].get("stage") in stages:
                shutil.rmtree(manifest.parent)
        shutil.rmtree(self.folder / "dist", ignore_errors=True)

    def processes(self) -> list[str]:
        """Return what runs in these folders, and what that started: workers, servers, commands.

        A server in namespaces of its own shows no folder of ours, but who started it does.
        """
        seen = dict(filter(None, map(_described, Path("/proc").iterdir())))
        mine = {number for number, found in seen.items() if str(self.folder) in found.places}
        while more := {n for n, found in seen.items() if found.parent in mine} - mine:
            mine |= more
        return [f"{n}: {seen[n].words}" for n in sorted(mine) if seen[n].words]

    def catch(self, name: str, running: Running) -> int:
        """Return a worker's or server's number as soon as it runs; 0 where the build ended first.

        `name` is a word of its command line.
        """
        ended = False
        while not ended:
            ended = running.process.poll() is not None
            for found in self.processes():
                number, _, words = found.partition(": ")
                if name in words and "sandbox_launcher" not in words:
                    return int(number)
            time.sleep(0.005)
        return 0

    def check_quiet(self) -> None:
        """Check that nothing is left running, a moment after a command ended."""
        until(lambda: not self.processes())

    def check_whole(self) -> None:
        """Check that whatever can be seen under a final name is whole."""
        for folder in self.store.glob("results/*"):
            manifest = json.loads((folder / "manifest.json").read_bytes())
            for file in manifest["files"]:
                data = (folder / "data" / file["path"]).read_bytes()
                assert "sha256:" + hashlib.sha256(data).hexdigest() == file["digest"], folder
        for image in self.folder.glob("dist*/*/*/*/image"):
            check_layout(image)
        for record in self.folder.glob("dist*/*/*/*/build.json"):
            assert json.loads(record.read_bytes())

    def fill_store(self, source: Path) -> None:
        shutil.copytree(source, self.store)
        self._before = self._held()

    def _held(self) -> frozenset[str]:
        return frozenset(str(path.relative_to(self.store)) for path in self.store.glob("results/*"))

    def check_unharmed(self) -> None:
        """Check that a refusal, made before any work, left results as they were and no image."""
        self.check_whole()
        assert self._held() == self._before
        assert not list(self.store.glob("partial/*"))
        assert not (self.results / "image").exists()

    def check_intact(self, digest: str) -> None:
        """Check that an undisturbed build on the same store gives the reference's image."""
        self.check_whole()
        self.repair()
        assert self.build().digest == digest
        self.check_whole()


def check_layout(folder: Path) -> None:
    """Check that every blob of an OCI layout is what its name says, from the index down."""
    index = json.loads((folder / "index.json").read_bytes())
    for row in index["manifests"]:
        manifest = json.loads(_blob(folder, row["digest"]))
        for blob in (manifest["config"], *manifest["layers"]):
            assert len(_blob(folder, blob["digest"])) == blob["size"]


def _blob(folder: Path, digest: str) -> bytes:
    data = (folder / "blobs" / "sha256" / digest.removeprefix("sha256:")).read_bytes()
    assert hashlib.sha256(data).hexdigest() == digest.removeprefix("sha256:"), folder
    return data


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """Mount something at a folder: `-t tmpfs -o size=…`, or `--bind SOURCE`; needs root."""
    import pytest

    folder.mkdir(parents=True, exist_ok=True)
    source = () if options[0] == "--bind" else ("none",)
    done = subprocess.run(["mount", *options, *source, folder], check=False, capture_output=True)
    if done.returncode:
        pytest.skip(f"mounts are not allowed here: {done.stderr.decode()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


@dataclass(frozen=True)
class _Process:
    """A running process: what it was started with, where it lies, and who started it."""

    words: str
    places: str
    parent: int


def _described(process: Path) -> tuple[int, _Process] | None:
    if not process.name.isdecimal() or int(process.name) == os.getpid():
        return None
    try:
        words = (process / "cmdline").read_text(errors="replace").replace("\0", " ")
        links = [str((process / name).readlink()) for name in ("cwd", "root")]
        after_name = (process / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    found = _Process(words=words, places=" ".join([words, *links]), parent=int(after_name[1]))
    return int(process.name), found
