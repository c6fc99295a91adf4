"""A layer that its registry will not wait for is told in time, with a size that would fit."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
from weightsmith.oci.limits import RegistryLimits, UploadDeadline, limits_of
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry
from weightsmith.serving.memory import parse_size

from tests.fakes.images import tiny_image
from tests.fakes.registry import FakeRegistry

MB = 10**6
SLOW = RegistryLimits(name="Slow Registry", hosts="", upload_seconds=600, source="")


def told(limits: RegistryLimits | None, size: int, rate: float) -> list[str]:
    """What is said of two layers of `size` MB, of which `rate` MB go in a second."""
    said: list[str] = []
    deadline = UploadDeadline(limits, said.append, (n / rate for n in itertools.count()).__next__)
    for file in ("a.safetensors", "b.safetensors"):
        sent = deadline.over(lambda: itertools.repeat(bytes(MB), size), size * MB, file)()  # type: ignore[return-value]
        assert sum(map(len, sent)) == size * MB
    return said


@pytest.mark.parametrize(("rate", "advised"), [(0.5, "240MB"), (0.25, "120MB"), (4.0, "1.9GB")])
def test_too_slow_by_its_own_rate(rate: float, advised: str) -> None:
    (said,) = told(SLOW, int(rate * 700), rate)
    assert f"a.safetensors will take about 12 minutes at {rate:.1f} MB/s" in said
    assert "Slow Registry ends uploads after 10" in said
    assert f"--max-layer-size {advised} " in said
    assert parse_size(advised) / MB / rate < 600


def test_fast_enough_or_without_a_limit() -> None:
    assert told(SLOW, 290, 0.5) == []
    assert told(SLOW, 10, 0.5) == []
    assert told(None, 400, 0.5) == []
    assert told(limits_of("registry.gitlab.com"), 400, 0.5) == []


def test_warned_before_half_of_the_time_is_over() -> None:
    now: list[float] = [0.0]
    said: list[float] = []
    deadline = UploadDeadline(limits_of("ghcr.io"), lambda _: said.append(now[0]), lambda: now[0])
    for _ in deadline.over(lambda: itertools.repeat(bytes(MB), 2000), 2000 * MB)():  # type: ignore[return-value]
        now[0] += 1
    assert said
    assert said[0] < 60


def test_a_push_tells_it(
    fake: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightsmith.oci.registry.limits_of", lambda _: SLOW)
    image = tiny_image(tmp_path / "model")
    said: list[str] = []
    clock = itertools.count(0, 1000).__next__
    with Registry(pause=lambda _: None, clock=lambda: float(clock())) as client:
        client.push(image, Reference.parse(f"{fake.host}/a/b:1"), warn=said.append)
    assert len(said) == 1
    assert re.search(r"^\S.* will take about \d+ minutes", said[0])
