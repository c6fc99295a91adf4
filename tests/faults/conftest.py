"""The undisturbed build that every fault is held against, and a workshop for each test."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from weightsmith.oci.layout import held_digest

from tests.conftest import TinyBuild, made_once

pytest.register_assert_rewrite("tests.faults.workshop")
from tests.faults.moments import Moments  # noqa: E402
from tests.faults.workshop import RESULTS, Finished, Workshop  # noqa: E402 - its assertions are explained


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_build: TinyBuild) -> Finished:
    """What comes out when nothing goes wrong: once for all processes of a run."""

    def make(folder: Path) -> None:
        workshop = Workshop(folder)
        shutil.copytree(tiny_build.store, workshop.store)
        assert workshop.start_build().end(3600).digest

    folder = made_once(tmp_path_factory, "reference", make)
    return Finished(folder / "store", folder / "dist" / RESULTS)


@pytest.fixture
def digest(reference: Finished) -> str:
    """The image's digest when nothing goes wrong."""
    return str(held_digest(reference.results / "image"))


@pytest.fixture
def empty(tmp_path: Path, reference: Finished) -> Iterator[Workshop]:
    yield Workshop(tmp_path / "work")
    shutil.rmtree(tmp_path / "work", ignore_errors=True)


@pytest.fixture
def workshop(empty: Workshop, reference: Finished) -> Workshop:
    """A workshop whose store holds the whole build, so that little is done again."""
    empty.fill_store(reference.store)
    return empty


@pytest.fixture(scope="module")
def moments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moments]:
    with Moments(tmp_path_factory.mktemp("moments")) as process:
        yield process
