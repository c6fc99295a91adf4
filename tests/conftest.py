"""Which tests can run on this machine, and what they find there."""

import fcntl
import functools
import gc
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import compress
from operator import not_
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.clusters import clusters, has_ray, has_slurm
from tests.parts import dealt, in_order
from tests.paths import ROOT, TINY

# A busy machine is no fault of the code: nothing here is judged by the clock. And the same commit
# gives the same result; `pytest --hypothesis-profile=explore` looks for what was not seen yet.
_CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("explore", _CALM)
settings.register_profile("steady", _CALM, derandomize=True)
settings.load_profile("steady")

# jsonschema compiles these grammars as it is imported, which takes two seconds; no schema here
# names a format that needs them but CycloneDX's, of IRIs.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

LANES = (4, 8, 16)
REST = frozenset({"full", "real", "gpu"})
"""Marks of what `make test` leaves out."""
RUN_BY_MAKE_TEST = pytest.StashKey[frozenset[str]]()
"""Names, without cases, of the collected tests that `make test` runs where all needs are met."""


@functools.cache
def engine_answers() -> bool:
    """Say whether a container engine is there, as the `docker` command sees it."""
    if shutil.which("docker") is None:
        return False
    asked = subprocess.run(
        ["docker", "version", "--format", "{{.Server.Version}}"], check=False, capture_output=True
    )
    return asked.returncode == 0


@functools.cache
def chromium_path() -> str:
    """Return Chromium's program, or '' where it or the library that drives it is missing."""
    if importlib.util.find_spec("playwright") is None:
        return ""
    return first_of("chromium", "chromium-browser", "google-chrome", "chrome")


def first_of(*names: str) -> str:
    return next(filter(None, map(shutil.which, names)), "")


@functools.cache
def emulator() -> str:
    """Return the program that runs programs for 64-bit Arm on another CPU, or ''."""
    return first_of("qemu-aarch64-static", "qemu-aarch64")


@functools.cache
def vllm_absent() -> str:
    """Return why no image of vLLM can be built and started here, or ''."""
    from tests import vllm_parts

    return vllm_parts.absent()


NEEDS = {
    "docker": (engine_answers, "no container engine answers: run tests/engine.sh as root"),
    "registry": (lambda: shutil.which("docker-registry"), "docker-registry is not installed"),
    "other_registries": (
        lambda: shutil.which("weightsmith-test-registries"),
        "no weightsmith-test-registries (tests/engine.sh as root builds it)",
    ),
    "browser": (
        chromium_path,
        "no Chromium (tests/engine.sh as root installs it), or no playwright",
    ),
    "emulator": (emulator, "no qemu-aarch64 (tests/engine.sh as root installs it)"),
    "ray": (has_ray, "Ray is not installed"),
    "slurm": (has_slurm, "no Slurm, and no root to install it"),
    "gpu": (lambda: shutil.which("nvidia-smi"), "no NVIDIA GPU"),
    "root": (lambda: os.geteuid() == 0, "needs root"),
}
"""Marker -> whether this machine has it, and what to say where it has not."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a part of the tests be chosen, the same on each machine."""
    parser.addoption("--part", metavar="N/PARTS", help="run the N-th of so many parts of the tests")


def pytest_configure(config: pytest.Config) -> None:
    """Look for no garbage while tests are read: it takes a seventh of the time and finds none."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        gc.disable()  # not in the process that only deals tests out, which reads none


@pytest.hookimpl(wrapper=True)
def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> Iterator[None]:
    """Of a grid of cases, leave all but every n-th to `make test-all`; draw the part; order."""
    seen: dict[str, int] = {}
    for item in items:
        if grid := item.get_closest_marker("grid"):
            name = item.nodeid.partition("[")[0]
            seen[name] = seen.get(name, -1) + 1
            if seen[name] % grid.args[0]:
                item.add_marker("full")
    config.stash[RUN_BY_MAKE_TEST] = frozenset(
        item.nodeid.partition("[")[0] for item in items if not (REST & _marks(item))
    )
    if part := config.getoption("part"):
        number, parts = map(int, part.split("/"))
        drawn = [one == number - 1 for one in dealt(items, parts)]
        config.hook.pytest_deselected(items=[*compress(items, map(not_, drawn))])
        items[:] = compress(items, drawn)
    yield  # those that -m and -k leave out go
    items[:] = in_order(items, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def _marks(item: pytest.Item) -> set[str]:
    return {mark.name for mark in item.iter_markers()}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A part may have no test of a kind."""
    if session.config.getoption("part") and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of every later garbage collection."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000)
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what cannot run here; with WEIGHTSMITH_REQUIRE_DOCKER a missing engine is a failure."""
    # What a test draws does not depend on the tests before it.
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.random.default_generator.manual_seed(0)
    for name, (there, reason) in NEEDS.items():
        if item.get_closest_marker(name) and not there():
            if name == "docker" and os.environ.get("WEIGHTSMITH_REQUIRE_DOCKER"):
                pytest.fail(reason)
            pytest.skip(reason)
    if item.get_closest_marker("vllm") and vllm_absent():
        pytest.skip(vllm_absent())


@pytest.fixture(autouse=True)
def as_found() -> Iterator[None]:
    """Give the next test the variables and the working directory that this one found.

    Libraries of models, and what runs in a worker elsewhere, set some for their whole process.
    """
    folder, environment = Path.cwd(), dict(os.environ)
    heard = signal.getsignal(signal.SIGINT)  # ignored after a command that was interrupted
    yield
    signal.signal(signal.SIGINT, heard)
    os.chdir(folder)
    environment["PYTEST_CURRENT_TEST"] = os.environ["PYTEST_CURRENT_TEST"]
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)


@pytest.fixture(scope="session", autouse=True)
def without_waiting_for_the_disk() -> Iterator[None]:
    """Nothing that a test writes must outlive a power failure; a closed file is still a fault."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: os.fstat(handle) and None)
        yield


@pytest.fixture(scope="session", autouse=True)
def builder_base(request: pytest.FixtureRequest) -> None:
    """Build builders on the base that tests/engine.sh made, where the locked one is not there."""
    wanted = {mark.name for item in request.session.items for mark in item.iter_markers()}
    if not wanted & {"builders", "docker"}:
        return  # asking takes a second, which the tests near a change may take themselves
    if "WEIGHTSMITH_BUILDER_BASE" in os.environ or not engine_answers():
        return
    from tests.builders import engine_environment

    os.environ.update(engine_environment())


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Mapping[str, str]]:
    """The variables of a Ray cluster of two nodes with a CPU each."""
    with clusters("ray") as found:
        assert "WEIGHTSMITH_TEST_RAY" in found, "Ray does not start"
        yield found


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Mapping[str, str]]:
    """The variables of a Slurm cluster of two nodes with a CPU each."""
    with clusters("slurm") as found:
        assert "SLURM_CONF" in found, "Slurm does not start"
        yield found


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that one of a run's processes makes for all of them, which only read it."""
    base = factory.getbasetemp()
    place = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"once-{name}"
    place.mkdir(exist_ok=True)
    folder, whole = place / "made", place / "whole"
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            folder.mkdir()
            make(folder)
            whole.touch()
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyBuild:
    """The tiny example, built once."""

    store: Path
    """Holds nothing else, and is to be copied, not used."""
    dist: Path
    told: dict[str, Any]
    """What --json says of its one target."""


@pytest.fixture(scope="session")
def tiny_build(tmp_path_factory: pytest.TempPathFactory, builder_base: None) -> TinyBuild:
    """The tiny example, built by the local runner: once for all processes of a run."""

    def make(folder: Path) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "weightsmith.cli.program", "build", "--recipe",
             TINY / "recipe.yaml", "--runner", "local", "--dist", folder / "dist", "--json"],
            env={**os.environ, "WEIGHTSMITH_STORE": str(folder / "store")},
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "told.json").write_text(done.stdout)

    folder = made_once(tmp_path_factory, "tiny", make)
    (target,) = json.loads((folder / "told.json").read_text())["targets"].values()
    return TinyBuild(store=folder / "store", dist=folder / "dist", told=target)


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory: pytest.TempPathFactory, tiny_build: TinyBuild) -> Path:
    """One store for builds and pages that need none of their own, so that all is made once."""
    folder = made_once(
        tmp_path_factory,
        "shared",
        lambda folder: shutil.copytree(tiny_build.store, folder / "store"),
    )
    return folder / "store"


@pytest.fixture(scope="module")
def compiled_kernels() -> Iterator[None]:
    """Inner loops in C, as the jobs of a builder have them."""
    from weightsmith.building.wiring import cache_folder
    from weightsmith.core.kernels import library
    from weightsmith.outside.toolset import tools_variable, toolset_folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(tools_variable("kernels"), str(toolset_folder(cache_folder(), "kernels")))
        yield
        library.kernels().weightsmith_lanes(max(LANES))


@pytest.fixture(params=LANES)
def lanes(request: pytest.FixtureRequest, compiled_kernels: None) -> int:
    from weightsmith.core.kernels import library

    if library.kernels().weightsmith_lanes(request.param) < request.param:
        pytest.skip(f"this CPU has no vectors of {request.param} lanes")
    return request.param
