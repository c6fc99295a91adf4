"""The undisturbed build that every fault is held against, and a workshop for each test."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.faults.workshop")
from tests.faults.workshop import Outcome, Workshop  # noqa: E402 - its assertions are explained


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What comes out when nothing goes wrong."""

    workshop: Workshop
    digest: str
    seconds: float


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, builder_base: None) -> Reference:
    """One build of the example from an empty store, timed without the making of builders."""
    workshop, built, seconds = _timed(tmp_path_factory)
    if "making the builder" in built.err or "compiling" in built.err:
        workshop, built, seconds = _timed(tmp_path_factory)
    return Reference(workshop=workshop, digest=built.digest, seconds=seconds)


def _timed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workshop, Outcome, float]:
    workshop = Workshop(tmp_path_factory.mktemp("reference"))
    began = time.monotonic()
    return workshop, workshop.start_build().end(3600), time.monotonic() - began


@pytest.fixture
def digest(reference: Reference) -> str:
    """The image's digest when nothing goes wrong."""
    return reference.digest


@pytest.fixture
def empty(tmp_path: Path, reference: Reference) -> Iterator[Workshop]:
    """A workshop with an empty store."""
    yield Workshop(tmp_path / "work")
    shutil.rmtree(tmp_path / "work", ignore_errors=True)


@pytest.fixture
def workshop(empty: Workshop, reference: Reference) -> Workshop:
    """A workshop whose store holds the whole build, so that little is done again."""
    shutil.copytree(reference.workshop.store, empty.store)
    return empty
