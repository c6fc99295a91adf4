"""One suite for every engine of a fleet: the fake, this machine, Ray and Slurm."""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.ports import Ended, FleetEngine, NodeTask
from weightsmith.outside import fleet_ray
from weightsmith.outside.fleet_local import LocalFleet, Room
from weightsmith.outside.fleet_ray import RayFleet
from weightsmith.outside.fleet_slurm import SlurmFleet

from tests.clusters import has_ended
from tests.fakes.fleet import MemoryFleet
from tests.fakes.started import until
from tests.paths import ROOT

PATIENCE = 300.0
NODE = "tests.fakes.fleet_node"
MIB = 1 << 20


def local(folder: Path) -> FleetEngine:
    room = Room(cpus=2, memory_bytes=64 << 30, disk_bytes=0, gpus=0)
    return LocalFleet(argv=(sys.executable, "-m", NODE), room=room, logs=folder / "logs")


def memory(folder: Path) -> FleetEngine:
    def do(text: str) -> str:
        asked = json.loads(text)
        if begun := asked.get("begun"):
            Path(begun).write_text("1\n")
        return "" if asked.get("do") == "crash" else json.dumps({"id": asked["id"]})

    return MemoryFleet(do)


@pytest.fixture(
    params=[
        "memory",
        pytest.param("local", marks=pytest.mark.slow),
        pytest.param("ray", marks=[pytest.mark.ray, pytest.mark.slow]),
        pytest.param("slurm", marks=[pytest.mark.slurm, pytest.mark.slow]),
    ]
)
def engine(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FleetEngine]:
    kind = request.param
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'toolchain'}:{ROOT}")
    if kind == "ray":
        nodes = request.getfixturevalue("ray_cluster")["WEIGHTSMITH_TEST_RAY"]
        made: FleetEngine = RayFleet(module=NODE, address=nodes)
    elif kind == "slurm":
        monkeypatch.setenv("SLURM_CONF", request.getfixturevalue("slurm_cluster")["SLURM_CONF"])
        made = SlurmFleet(argv=(sys.executable, "-m", NODE), folder=tmp_path / "jobs")
    else:
        made = {"local": local, "memory": memory}[kind](tmp_path)
    yield made
    made.close()


def work(number: int, **request: Any) -> NodeTask:
    name = f"task {number}"
    return NodeTask(
        id=f"id{number}", name=name, text=json.dumps({"id": f"id{number}", **request}),
        cpus=1, memory_bytes=200 * MIB, disk_bytes=0, gpus=0,
    )  # fmt: skip


def all_of(engine: FleetEngine, count: int) -> dict[str, Ended]:
    found: dict[str, Ended] = {}
    until = time.monotonic() + PATIENCE
    while len(found) < count and time.monotonic() < until:
        found |= {ended.id: ended for ended in engine.wait(5.0)}
    assert len(found) == count
    return found


def test_every_task_gets_its_own_reply(engine: FleetEngine) -> None:
    engine.check("1")
    engine.submit([work(n) for n in range(4)])
    engine.submit([work(4)])

    found = all_of(engine, 5)

    assert {key: json.loads(ended.text)["id"] for key, ended in found.items()} == {
        key: key for key in found
    }
    assert all(ended.node and not ended.why for ended in found.values())
    assert engine.running() == frozenset()
    assert list(engine.wait(0.1)) == []


def test_a_task_without_a_reply_says_why(engine: FleetEngine) -> None:
    if isinstance(engine, MemoryFleet):
        pytest.skip("its tasks are functions and cannot crash")
    engine.check("1")
    engine.submit([work(0, do="crash"), work(1)])

    found = all_of(engine, 2)

    assert found["id0"].text == ""
    assert found["id0"].why
    assert json.loads(found["id1"].text)["id"] == "id1"


def test_closing_ends_what_runs(engine: FleetEngine, tmp_path: Path) -> None:
    if isinstance(engine, MemoryFleet):
        pytest.skip("nothing runs while nobody waits")
    begun, ended = tmp_path / "begun", tmp_path / "ended"
    engine.check("1")
    engine.submit([work(0, do="wait", begun=str(begun), ended=str(ended))])
    until(lambda: begun.exists() and begun.read_text())
    assert engine.running() == {"id0"}

    engine.close()

    until(ended.exists)  # it had time to clean up
    pid = int(begun.read_text())
    until(lambda: has_ended(pid))


@pytest.fixture
def ray(ray_cluster: Mapping[str, str]) -> Iterator[RayFleet]:
    engine = RayFleet(module=NODE, address=ray_cluster["WEIGHTSMITH_TEST_RAY"])
    yield engine
    engine.close()


@pytest.mark.ray
@pytest.mark.slow
def test_ray_refuses_a_node_of_another_version(ray: RayFleet) -> None:
    with pytest.raises(EnvironmentFailure, match="another version of weightsmith"):
        ray.check("2")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.grid(3)
@pytest.mark.parametrize("address", ["127.0.0.1:9", "no.such.host.invalid:6379", "127.0.0.1:99999"])
def test_ray_says_that_no_cluster_answers(address: str) -> None:
    with pytest.raises(EnvironmentFailure, match=f"no Ray cluster answers at {address}"):
        RayFleet(module=NODE, address=address).check("1")


@pytest.mark.ray
@pytest.mark.slow
def test_ray_says_what_no_node_has(ray: RayFleet) -> None:
    ray.check("1")
    ray.submit([replace(work(1), cpus=64)])
    (ended,) = ray.wait(1.0)
    assert "no node of the cluster has 64 CPU" in ended.why


@pytest.mark.ray
@pytest.mark.slow
def test_ray_gives_a_task_back_whose_process_was_killed(ray: RayFleet, tmp_path: Path) -> None:
    """The worker is killed with the program that it runs; who tries again counts its tries."""
    begun = tmp_path / "begun"
    ray.check("1")
    ray.submit([work(0, do="wait", seconds=5, begun=str(begun))])
    until(lambda: begun.exists() and begun.read_text())
    pid = int(begun.read_text())
    worker = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(worker, signal.SIGKILL)
    assert all_of(ray, 1)["id0"].why.startswith("lost by Ray")
    assert len(begun.read_text().split()) == 1
    until(lambda: has_ended(pid))


def test_a_ray_cluster_that_ends_is_an_error_of_the_environment() -> None:
    class RayError(Exception):
        pass

    def gone(*_: object, **__: object) -> object:
        raise RayError("\nFailed to connect to GCS\n  at a line of C++")

    ended: list[bool] = []
    fake = SimpleNamespace(
        cancel=gone, wait=gone, nodes=gone, shutdown=lambda: ended.append(True),
        exceptions=SimpleNamespace(RayError=RayError),
    )  # fmt: skip
    engine = RayFleet(module=NODE, _ray=fake, _given={"runs": work(1)})

    said = "the Ray cluster has ended: Failed to connect to GCS$"
    with pytest.raises(EnvironmentFailure, match=said):
        engine.wait(1)
    with pytest.raises(EnvironmentFailure, match=said):
        engine.submit([work(2)])
    engine.close()
    assert ended == [True]


def test_what_ray_prints_is_not_in_the_output(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its C++ code and its threads print at any time, such as when a node is lost."""
    fake = SimpleNamespace(shutdown=lambda: os.write(1, b"of its end\n"))

    def connected(address: str) -> object:
        os.write(1, b"of C++\n")
        print("of a thread")  # noqa: T201
        raise EnvironmentFailure("no cluster", hint="")

    monkeypatch.setattr(fleet_ray, "_connected", connected)
    monkeypatch.setattr(sys, "stdout", open(1, "w", closefd=False))  # noqa: SIM115 - not pytest's
    engine = RayFleet(module=NODE)
    with pytest.raises(EnvironmentFailure):
        engine.check("1")
    engine._ray = fake
    engine.close()
    engine.close()
    os.write(1, b"ours")

    out, err = capfd.readouterr()
    assert out == "ours"
    assert {"of C++", "of a thread", "of its end"} <= set(err.splitlines())


def test_this_machine_runs_as_many_at_once_as_fit(tmp_path: Path) -> None:
    room = Room(cpus=4, memory_bytes=1000, disk_bytes=0, gpus=1)

    def needing(*memory: int, gpus: Sequence[int] = (0, 0, 0, 0, 0)) -> list[NodeTask]:
        return [
            NodeTask(id=str(n), name="", text="", cpus=1, memory_bytes=m, disk_bytes=9, gpus=g)
            for n, (m, g) in enumerate(zip(memory, gpus, strict=False))
        ]

    assert room.holds(needing(400, 600))
    assert not room.holds(needing(400, 601))
    assert not room.holds(needing(1, 1, 1, 1, 1))
    assert not room.holds(needing(1, 1, gpus=(1, 1)))


def test_ray_cancels_by_force_only_what_does_not_end() -> None:
    """Ray can abort the process that cancels by force what has just ended."""
    cancelled: list[tuple[str, bool]] = []
    fake = SimpleNamespace(
        cancel=lambda one, force: cancelled.append((one, force)),
        wait=lambda given, num_returns, timeout: (given[:1], given[1:]),
        shutdown=lambda: cancelled.append(("all", True)),
        exceptions=SimpleNamespace(RayError=ValueError),
    )
    engine = RayFleet(module=NODE, _ray=fake, _given={"ends": work(1), "hangs": work(2)})

    engine.close()

    assert cancelled == [("ends", False), ("hangs", False), ("hangs", True), ("all", True)]


@pytest.mark.slow
def test_this_machine_takes_long_names_and_says_where_no_log_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'toolchain'}:{ROOT}")
    engine = local(tmp_path)
    engine.submit([replace(work(1), name="base /" + "long/" * 99)])
    assert json.loads(all_of(engine, 1)["id1"].text)["id"] == "id1"
    engine.close()

    (tmp_path / "file").write_text("")
    engine = local(tmp_path / "file")
    engine.submit([work(2)])
    assert "Not a directory" in all_of(engine, 1)["id2"].why
    engine.close()


def test_slurm_takes_a_folder_with_a_percent_sign_and_keeps_no_request(tmp_path: Path) -> None:
    asked: list[tuple[str, ...]] = []

    class Recorded(SlurmFleet):
        def _run(self, *words: str, text: str = "") -> str:
            asked.append(words)
            return "7"

    engine = Recorded(argv=("node",), folder=tmp_path / "50%a")
    engine.submit([work(1)])
    (output,) = (word for word in asked[0] if word.startswith("--output="))
    assert output.startswith(f"--output={tmp_path}/50%%a/")
    assert output.endswith("/%a.log")

    (request,) = (tmp_path / "50%a").glob("*/0.request")
    assert request.stat().st_mode & 0o777 == 0o600
    request.with_name("0.reply").write_text("{}")
    assert [one.text for one in engine.wait(1)] == ["{}"]
    assert not request.exists()
