"""A build in memory that is interrupted at every event that it has: nothing half-made is seen."""

from __future__ import annotations

import pytest

from tests.fakes.memory import Memory

TARGET = "llamacpp-q4_k_m"
MOMENTS = {
    "stage resolve": (), "finish resolve": (),
    "make healthcheck for linux/amd64": ("base", "merge"),
    "stage merge": (), "job merge": ("merge",), "finish merge": (),
    "stage validate": (), "job proof": ("validate", "reference"), "finish validate": (),
    "stage reference": (), "finish reference": (),
    "stage quantize": (), "job quantize": ("quantize",), "finish quantize": (),
    "stage quality": (), "job quality": ("quality",), "finish quality": (),
    "stage render": (), "finish render": (),
    "stage bake": (), "job export-engine": ("base",), "finish bake": (),
    "stage evaluate": (), "load candidate": ("smoke",), "start": ("smoke",),
    "stop": ("smoke",), "finish evaluate": ("smoke",),
    "stage publish": ("smoke",), f"load 1.0.0-{TARGET}": ("smoke",),
    "untag candidate": ("smoke",), "finish publish": ("smoke",),
}  # fmt: skip
"""Every event of a build, and the results that the store lacks so that it comes."""
ALONE = {"job validate": ("validate",), "job reference": ("reference",)}
"""Jobs that run by themselves if the store lacks one result only."""
BETWEEN = {"finish evaluate", "stage publish", f"load 1.0.0-{TARGET}"}
"""Where a candidate waits to get its name. The next load removes it once its owner is dead."""
NAMED = {"untag candidate", "finish publish"}
"""After the image got its name: it is whole, and only its record is missing."""


def test_these_are_the_events_of_a_build(memory: Memory) -> None:
    memory.build()

    assert list(dict.fromkeys(memory.journal.events)) == list(MOMENTS)


@pytest.mark.parametrize("moment", [*MOMENTS, *ALONE])
def test_an_interrupted_build(warm: Memory, digest: str, moment: str) -> None:
    warm.store.forget(*(MOMENTS | ALONE)[moment])
    warm.journal.faults[moment] = KeyboardInterrupt()

    with pytest.raises(KeyboardInterrupt):
        warm.build()

    assert {event.partition(" ")[0] for event in warm.journal.after(moment)} <= {"stop", "untag"}
    assert warm.seen() == ([f"{warm.repository}:1.0.0-{TARGET}"] if moment in NAMED else [])
    assert bool(warm.left()) == (moment in BETWEEN)
    assert warm.build()[TARGET].published.digest == digest
    assert warm.left() == []


def test_an_interrupted_push_sets_no_tag(
    warm: Memory, digest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on with the blobs that arrived."""

    def interrupt(sent: int, total: int, unit: str) -> None:
        if "stage publish" in warm.journal.events:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(warm.progress, "advance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            warm.build(push=True)

    assert warm.registry.manifests == {}
    assert warm.left() == []
    assert warm.build(push=True)[TARGET].published.digest == digest
