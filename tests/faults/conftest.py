"""The undisturbed build that every fault is held against, and a workshop for each test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import TinyBuild

pytest.register_assert_rewrite("tests.faults.workshop")
from tests.faults.workshop import Workshop  # noqa: E402 - its assertions are explained


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What comes out when nothing goes wrong."""

    workshop: Workshop
    digest: str


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, tiny_build: TinyBuild) -> Reference:
    """One build of the example with fewer questions, after the one with all of them."""
    workshop = Workshop(tmp_path_factory.mktemp("reference"))
    shutil.copytree(tiny_build.store, workshop.store)
    built = workshop.start_build().end(3600)
    return Reference(workshop=workshop, digest=built.digest)


@pytest.fixture
def digest(reference: Reference) -> str:
    """The image's digest when nothing goes wrong."""
    return reference.digest


@pytest.fixture
def empty(tmp_path: Path, reference: Reference) -> Iterator[Workshop]:
    yield Workshop(tmp_path / "work")
    shutil.rmtree(tmp_path / "work", ignore_errors=True)


@pytest.fixture
def workshop(empty: Workshop, reference: Reference) -> Workshop:
    """A workshop whose store holds the whole build, so that little is done again."""
    empty.fill_store(reference.workshop.store)
    return empty
