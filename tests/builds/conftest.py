"""Builds in memory: a set of fakes for each test, and what one build of it made."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from weightsmith.building.wiring import cache_folder
from weightsmith.cache import uploads
from weightsmith.evaluating import speed
from weightsmith.fleets import running
from weightsmith.outside.toolset import tools_variable, toolset_folder

from tests.clusters import FOLDER, Cluster
from tests.conftest import made_once
from tests.fakes.memory import Memory, in_memory
from tests.fakes.store import MemoryStore

ROOT = Path(__file__).parents[2]


_context = cache(ssl.create_default_context)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """What each build reads anew is read once, and no other work is looked for."""
    monkeypatch.setattr(speed, "in_use", lambda _: 0.0)
    monkeypatch.setattr(ssl, "create_default_context", _context)


@pytest.fixture
def memory(tmp_path: Path, quick: None) -> Iterator[Memory]:
    """Everything that a build reaches, nothing made yet."""
    with in_memory(tmp_path) as made:
        yield made
        assert made.launcher.running == 0


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed is tried again without a pause."""
    monkeypatch.setattr(running, "_PAUSES", (0.0, 0.0))
    monkeypatch.setattr(uploads, "_PAUSE_SECONDS", 0.0)


@pytest.fixture
def two(tmp_path: Path, quick: None, at_once: None) -> Iterator[Memory]:
    """A user's folder with two adapters, each with its own questions."""
    with in_memory(tmp_path, adapters=("a", "b")) as made:
        made.write_recipe(adapters=None)
        yield made


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MemoryStore, str]]:
    """The store after one build, and that image's digest."""
    with in_memory(tmp_path_factory.mktemp("finished")) as made:
        (built,) = made.build().values()
        yield made.store, built.published.digest


@pytest.fixture
def warm(memory: Memory, finished: tuple[MemoryStore, str]) -> Memory:
    """The same with the results of an earlier build, whose image is nowhere any more."""
    memory.begin_with(finished[0])
    return memory


@pytest.fixture
def digest(finished: tuple[MemoryStore, str]) -> str:
    """The digest of the undisturbed build."""
    return finished[1]


@pytest.fixture(scope="session")
def fleet_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a base, four adapters and a broken one, for fleets on clusters."""
    from tests.fakes.fleet_home import write_home  # imports numpy

    folder = tmp_path_factory.mktemp("home")
    write_home(folder)
    return folder


@pytest.fixture(
    params=[
        pytest.param("ray", marks=pytest.mark.ray),
        pytest.param("slurm", marks=pytest.mark.slurm),
    ]
)
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Both nodes of one of the clusters, with empty stores."""
    variables = request.getfixturevalue(f"{request.param}_cluster")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'toolchain'}:{ROOT}")
    found = Cluster(request.param, Path(variables[FOLDER]))
    found.clean()
    yield found
    found.revive()
    found.clean()


@pytest.fixture(scope="session")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base as a 16-bit GGUF file, and beside it an importance matrix."""
    from tests.fakes.ggufs import make_middle  # imports torch

    return made_once(tmp_path_factory, "middle", make_middle) / "bf16" / "demo.gguf"


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Our kernels are found in this process, as in a job's."""
    from weightsmith.forward import native

    monkeypatch.setenv(tools_variable("kernels"), str(toolset_folder(cache_folder(), "kernels")))
    native.is_fast.cache_clear()
    yield
    native.is_fast.cache_clear()
