"""Builds of two users with one cache: what the second one does not do, and does not read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from weightsmith.core.errors import CheckFailed, EnvironmentFailure

from tests.fakes.cache import MemoryCache
from tests.fakes.memory import Memory, in_memory


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[MemoryCache, str]:
    """A cache that one user's build filled, and the digest of what it pushed."""
    cache = MemoryCache()
    with in_memory(tmp_path_factory.mktemp("first")) as first:
        first.cache = cache
        built = first.build()
        assert first.given_up == 0
    return cache, built["llamacpp-q4_k_m"].published.digest


@pytest.fixture
def cache(filled: tuple[MemoryCache, str]) -> MemoryCache:
    """The same, for one test to break."""
    cache = filled[0]
    return replace(
        cache,
        documents=dict(cache.documents),
        blobs=dict(cache.blobs),
        named=dict(cache.named),
        used=dict(cache.used),
        faults={},
        asked=[],
        read_bytes=0,
    )


def test_a_second_user_makes_nothing_again_and_keeps_no_weights(
    memory: Memory, cache: MemoryCache, filled: tuple[MemoryCache, str]
) -> None:
    memory.cache = cache
    (built,) = memory.build(push=True).values()

    assert memory.jobs() == []
    assert built.published.digest == filled[1]
    assert not [entry for entry in memory.store.entries.values() if entry.tree.weight_bytes]
    assert max(cache.asked.count(key) for key in cache.asked) <= 1
    assert not [w for w in memory.progress.warnings if "cache" in w]
    assert memory.store.entries.keys() <= cache.documents.keys()


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("fault", "lost"),
    [
        (EnvironmentFailure("gone"), ("find", "read", "write")),
        (ConnectionResetError("reset"), ("find", "read", "write")),
        (PermissionError(13, "no"), ("find", "read", "write")),
        (ValueError("Invalid endpoint: nowhere"), ("find", "read", "write")),
        (OSError(28, "No space left on device"), ("write",)),
    ],
)
def test_a_cache_that_cannot_be_used_is_one_warning(
    memory: Memory, fault: Exception, lost: tuple[str, ...]
) -> None:
    memory.cache = MemoryCache(faults=dict.fromkeys(lost, fault))
    memory.build()

    (warning,) = [w for w in memory.progress.warnings if "cache" in w]
    assert getattr(fault, "strerror", None) or str(fault) in warning
    assert "merge" in memory.jobs()


def test_a_cache_that_breaks_in_the_middle_costs_only_time(
    memory: Memory, cache: MemoryCache, filled: tuple[MemoryCache, str]
) -> None:
    memory.cache = cache
    cache.faults["read"] = ConnectionResetError("reset")
    (built,) = memory.build().values()

    assert built.published.digest == filled[1]
    assert "merge" in memory.jobs()
    assert len([w for w in memory.progress.warnings if "cache" in w]) == 1


Spoil = Callable[[bytes], bytes]


@pytest.mark.parametrize(
    "spoil",
    [lambda data: data[:-1500], lambda data: bytes([data[0] ^ 1]) + data[1:], lambda data: b""],
    ids=["truncated", "altered", "empty"],
)
def test_spoiled_blobs_are_made_again(
    memory: Memory, cache: MemoryCache, filled: tuple[MemoryCache, str], spoil: Spoil
) -> None:
    memory.cache = cache
    cache.blobs = {digest: spoil(data) for digest, data in cache.blobs.items()}
    (built,) = memory.build().values()

    assert built.published.digest == filled[1]
    assert "merge" in memory.jobs()
    assert memory.progress.warnings


def test_what_was_here_already_is_uploaded_too(memory: Memory) -> None:
    memory.build()
    memory.cache = MemoryCache()
    memory.build()

    assert memory.jobs() == []
    shared = {str(memory.store.notes[key]["stage"]) for key in memory.cache.documents}
    assert {"merge", "quantize", "reference", "validate", "quality", "smoke"} <= shared


def test_a_refused_build_has_shared_what_it_made(memory: Memory) -> None:
    memory.cache = MemoryCache()
    with pytest.raises(CheckFailed):
        memory.build("quality.limits={q4_k_m: {kl_mean: 0.0}}", "quality.gate=true")
    assert memory.store.entries.keys() <= memory.cache.documents.keys()
    assert memory.cache.documents


@pytest.mark.parametrize("target", ["vllm", "llamacpp-lora", "vllm-lora"])
def test_other_kinds_of_weights_are_shared_too(memory: Memory, tmp_path: Path, target: str) -> None:
    cache = MemoryCache()
    (tmp_path / "other").mkdir()
    with in_memory(tmp_path / "other") as first:
        first.cache = cache
        first.write_recipe(image={"repository": memory.repository})
        made = first.build(targets=[target])
    memory.cache = cache
    built = memory.build(targets=[target], push=True)

    assert memory.jobs() == []
    assert built[target].published.digest == made[target].published.digest
    assert not [event for event in memory.journal.events if event.startswith("assemble")]
