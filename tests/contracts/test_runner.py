"""One suite for every runner: the fake, virtual environments and containers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
from weightsmith.building.prefetch import WithinMemory
from weightsmith.building.wiring import cache_folder
from weightsmith.core.errors import CheckFailed, EnvironmentFailure, InputRefused, WeightsmithError
from weightsmith.core.jobs import Input, Job, MergeJob, read_job, write_job
from weightsmith.core.merge_options import Merge
from weightsmith.core.ports import Progress, Runner, Silent
from weightsmith.core.values import Digest, FileEntry, Json
from weightsmith.outside.docker import DockerEngine
from weightsmith.outside.docker_containers import LABEL_JOB, DockerRunner
from weightsmith.outside.folders import read_tree
from weightsmith.outside.local import LocalRunner
from weightsmith.worker.jobs import STAGES

from tests.fakes.bare_builder import echo_job
from tests.fakes.echo import let_runners_start_it
from tests.fakes.journal import RecordingProgress
from tests.fakes.runner import MemoryRunner
from tests.fakes.started import hear_interrupts, until
from tests.fakes.store import MemoryStore
from tests.paths import ROOT


@dataclass
class RemoteRunner:
    """Runs jobs on a `machine` (a folder) that never reads the paths that a job names here."""

    inner: Runner
    machine: Path
    name: str = "remote"
    networked: bool = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self, job: Job, progress: Progress, *, stop: int | None = None) -> Mapping[str, Json]:
        # A reference without content is read to know what to send.
        known = {n: i if i.files is not None else read_input(i.path) for n, i in job.inputs.items()}
        there = read_job(write_job(job.at(known, job.output)))
        self.machine.mkdir(exist_ok=True)
        place = Path(mkdtemp(dir=self.machine, prefix="job-"))
        fetched = {}
        for name, given in there.inputs.items():
            fetched[name] = given.at(place / name)
            for entry in given.files or ():
                data = (given.path / entry.path).read_bytes()
                if (Digest.of(data), len(data)) != (entry.digest, entry.size):
                    raise EnvironmentFailure(f"{entry.path} changed on the way", hint="try again")
                (place / name / entry.path).parent.mkdir(parents=True, exist_ok=True)
                (place / name / entry.path).write_bytes(data)
        shutil.copytree(job.output, place / "out")  # a job may resume what another one left
        result = self.inner.run(there.at(fetched, place / "out"), progress)
        shutil.copytree(place / "out", job.output, dirs_exist_ok=True)
        return result


def read_input(path: Path) -> Input:
    """Return a reference to what lies at a path, every file of it read."""
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    data = {str(each.relative_to(path)): each.read_bytes() for each in found}
    files = (FileEntry(path=n, size=len(d), digest=Digest.of(d)) for n, d in data.items())
    return Input(path=path, files=tuple(files))


CACHE = Path(os.environ.get("WEIGHTSMITH_TEST_CACHE") or cache_folder())
"""Builders are made once and kept here, because that takes minutes."""
REAL = [
    pytest.param("local", marks=pytest.mark.builders),
    pytest.param("docker", marks=[pytest.mark.builders, pytest.mark.docker]),
]


def make_runner(kind: str, folder: Path | None = None) -> Runner:
    if kind == "within":
        return WithinMemory(MemoryRunner(), 2 << 30)
    if kind == "remote":
        return RemoteRunner(MemoryRunner(), folder / "remote")
    let_runners_start_it()
    if kind == "local":
        return LocalRunner(CACHE)
    if kind == "docker":
        return DockerRunner(DockerEngine(), CACHE)
    return MemoryRunner()


@pytest.fixture(params=["fake", "remote", "within", *REAL])
def runner(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    return make_runner(request.param, tmp_path)


@pytest.fixture(params=REAL)
def real_runner(request: pytest.FixtureRequest) -> Runner:
    return make_runner(request.param)


@pytest.fixture
def progress() -> RecordingProgress:
    return RecordingProgress()


def test_a_job_reads_its_input_and_writes_its_output(runner, tmp_path, progress):
    job = echo_job(tmp_path)

    result = runner.run(job, progress)

    assert result["text"] == "grüße\n"
    assert (job.output / "echo.txt").read_text("utf-8") == "grüße\n"
    assert ("advance", "1", "1", "items") in progress.lines
    for path in (job.output, job.output / "echo.txt"):
        assert (path.stat().st_uid, path.stat().st_gid) == (os.getuid(), os.getgid())


def test_an_error_of_the_job_crosses_with_its_class_message_and_hint(runner, tmp_path, progress):
    for code, kind in ((3, InputRefused), (4, CheckFailed)):
        with pytest.raises(kind, match="asked to fail") as caught:
            runner.run(echo_job(tmp_path, fail=code), progress)
        assert caught.value.hint == "ask for something else"


def test_a_crash_of_the_job_is_an_unexpected_error(runner, tmp_path, progress):
    with pytest.raises(WeightsmithError, match=r"unexpected ValueError.*boom") as caught:
        runner.run(echo_job(tmp_path, crash="boom"), progress)

    assert caught.value.exit_code == 1
    if runner.name in ("local", "docker"):
        log = Path(caught.value.hint.rpartition(": ")[2])
        assert "Traceback" in log.read_text("utf-8")


def test_a_job_that_needs_more_memory_than_it_may_use_ends_with_an_error(
    real_runner, tmp_path, progress
):
    """And one below its limit runs, although the kernel counts more than it uses."""
    job = replace(echo_job(tmp_path, fill=3 << 30), memory_bytes=1 << 30)

    with pytest.raises(
        EnvironmentFailure, match=r"echo job.*memory.*limit 1,073,741,824"
    ) as caught:
        real_runner.run(job, progress)

    assert "--memory" in caught.value.hint
    assert real_runner.run(replace(job, fill=700 << 20), progress)["text"]


@pytest.mark.builders
def test_mapped_weights_are_no_memory_of_a_local_job(tmp_path, progress):
    """They count towards RLIMIT_DATA, so that what the job really holds is watched, too."""
    job = replace(echo_job(tmp_path), memory_bytes=1 << 30)
    weights = job.text.path.with_name("model.safetensors")
    with weights.open("wb") as file:
        file.truncate(4 << 30)
    job = replace(job, text=Input(path=job.text.path.parent), fill=3 << 30)

    with pytest.raises(EnvironmentFailure, match=r"killed.*memory.*limit 1,073,741,824"):
        LocalRunner(CACHE).run(job, progress)


@pytest.mark.parametrize(
    ("own", "most", "limit"), [(0, 0, 0), (5, 0, 5), (0, 7, 7), (5, 7, 5), (9, 7, 7)]
)
def test_no_job_may_use_more_than_the_command_allows(tmp_path, progress, own, most, limit):
    inner = MemoryRunner()

    WithinMemory(inner, most).run(replace(echo_job(tmp_path), memory_bytes=own), progress)

    assert inner.jobs[0].memory_bytes == limit


def test_a_prepared_builder_is_ready(runner, progress):
    runner.prepare("merge", progress)

    assert runner.ready("merge")


def merge_of(folder: Path, output: Path, refer: Callable[[Path], Input]) -> MergeJob:
    """Return a merge of two adapters, one of them at half its weight."""
    output.mkdir()
    return MergeJob(
        builder="merge",
        base=refer(folder / "base"),
        adapters=(refer(folder / "adapters" / "a"), refer(folder / "adapters" / "b")),
        weights=(0.5, 1.0),
        options=Merge(method="linear"),
        output=output,
        seconds=0,
    )


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    copied = shutil.ignore_patterns("*.py", "*.jsonl")
    return shutil.copytree(ROOT / "examples" / "tiny", tmp_path / "tiny", ignore=copied)


def known(path: Path) -> Input:
    """Refer to a folder as a build does to its sources."""
    return Input.tree(read_tree(path, MemoryStore(path.parent), Silent()))


@pytest.mark.parametrize("refer", [known, lambda path: Input(path=path)], ids=["known", "not"])
def test_a_job_needs_no_more_than_its_references(refer, tiny, tmp_path, progress):
    """The inputs are out of reach while another machine merges what it fetched."""

    def merge_there(job: MergeJob, report: Any) -> Any:
        hidden = tiny.rename(tmp_path / "hidden")
        try:
            return STAGES["merge"](job, report)
        finally:
            hidden.rename(tiny)

    here, there = merge_of(tiny, tmp_path / "a", refer), merge_of(tiny, tmp_path / "b", refer)
    remote = RemoteRunner(MemoryRunner(stages={"merge": merge_there}), tmp_path / "remote")

    results = [MemoryRunner().run(here, progress), remote.run(there, progress)]

    assert (here.output / "model.safetensors").stat().st_size > 1_000_000
    assert read_input(here.output).files == read_input(there.output).files
    assert results[0]["files"] == results[1]["files"]
    assert results[0]["tensors"] == results[1]["tensors"]


def test_an_input_that_differs_from_its_reference_is_not_used(tiny, tmp_path, progress):
    job = merge_of(tiny, tmp_path / "out", known)
    weights = tiny / "adapters" / "b" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    there = MemoryRunner()

    with pytest.raises(EnvironmentFailure, match="changed on the way"):
        RemoteRunner(there, tmp_path / "remote").run(job, progress)

    assert there.jobs == []
    assert not any(job.output.iterdir())


def test_a_job_has_no_network_and_no_secrets(real_runner, tmp_path, progress, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")

    result = real_runner.run(echo_job(tmp_path), progress)

    assert result["network"] is False
    assert result["secrets"] == []
    assert ("note", "echo begins") in progress.lines
    assert not any("printed by the stage" in line for line in progress.lines)


def test_a_job_that_hangs_is_ended_and_the_next_one_runs(real_runner, tmp_path, progress):
    # On a busy machine a job may need longer than the shortest of these to begin.
    for seconds in (3, 30, 180):
        with pytest.raises(
            EnvironmentFailure, match=f"echo job was ended after {seconds}"
        ) as caught:
            real_runner.run(echo_job(tmp_path, seconds=seconds, sleep=600), progress)
        if "it was at: echo begins" in caught.value.message:
            break
    else:
        pytest.fail("the job did not begin")

    assert not running(real_runner.name, tmp_path)
    assert Path(caught.value.hint.rpartition(": ")[2]).is_file()
    assert real_runner.run(echo_job(tmp_path, seconds=600), progress)["text"] == "grüße\n"


@pytest.mark.parametrize("moment", ["before it begins", "as it runs"])
def test_a_job_that_another_thread_stops_is_killed(real_runner, tmp_path, moment):
    stop = os.eventfd(1 if moment == "before it begins" else 0)

    class Watched(RecordingProgress):
        def note(self, text: str) -> None:
            if text == "echo begins":
                threading.Thread(target=os.eventfd_write, args=[stop, 1]).start()

    with pytest.raises(InterruptedError):
        real_runner.run(echo_job(tmp_path, sleep=600), Watched(), stop=stop)
    os.close(stop)

    assert not running(real_runner.name, tmp_path)
    assert not list(tmp_path.glob("out/echo.txt"))


@pytest.mark.docker
@pytest.mark.builders
def test_a_container_can_write_nothing_but_its_output(tmp_path, progress):
    """And inputs that others cannot read are handed over to it."""
    wanted = ("/in/x", "/weightsmith/x", "/opt/x", "/etc/x", "/root/x", "/out/x")
    job = echo_job(tmp_path, try_to_write=wanted)
    job.text.path.chmod(0o600)

    result = make_runner("docker").run(job, progress)

    assert result["writable"] == ["/out/x"]
    assert result["input_writable"] is False
    assert result["uid"] != 0
    assert result["text"] == "grüße\n"
    assert result["builder_image"].startswith("sha256:")
    assert job.text.path.stat().st_mode & 0o777 == 0o600


SLEEPER = """
import sys
from pathlib import Path
from tests.contracts.test_runner import make_runner
from tests.fakes.bare_builder import echo_job
from weightsmith.core.ports import Silent

class Loud(Silent):
    def note(self, text):
        print(text, flush=True)

make_runner(sys.argv[1]).run(echo_job(Path(sys.argv[2]), sleep=600), Loud())
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
@pytest.mark.parametrize("kind", REAL)
def test_a_job_ends_with_its_parent(kind, number, tmp_path):
    make_runner(kind).prepare("merge", RecordingProgress())
    parent = subprocess.Popen(
        [sys.executable, "-c", SLEEPER, kind, str(tmp_path)],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT / 'toolchain'}:{ROOT}",
            "WEIGHTSMITH_TEST_CACHE": str(CACHE),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        preexec_fn=hear_interrupts,
    )
    with parent:
        assert any("echo begins" in line for line in iter(parent.stdout.readline, ""))
        assert running(kind, tmp_path)

        parent.send_signal(number)
        parent.wait(timeout=120)

    until(lambda: not running(kind, tmp_path))


def running(kind: str, tmp_path: Path) -> list[str]:
    """Return the workers of the job whose output lies in the folder."""
    if kind == "docker":
        # One may be removed while it is listed.
        wanted = {"label": f"{LABEL_JOB}=echo"}
        found = DockerEngine().client.containers.list(filters=wanted, ignore_removed=True)
        return [
            container.id
            for container in found
            if any(str(tmp_path) in json.dumps(mount) for mount in container.attrs["Mounts"])
        ]
    jobs = [path.parent for path in CACHE.glob("jobs/*/job.json") if str(tmp_path) in text_of(path)]
    return [
        process.name
        for process in Path("/proc").iterdir()
        if process.name.isdecimal()
        and any(str(job) in text_of(process / "cmdline") for job in jobs)
    ]


def text_of(path: Path) -> str:
    """Return a file's text; '' where it is gone, as those of jobs and processes soon are."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
