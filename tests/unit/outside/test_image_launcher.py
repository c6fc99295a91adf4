"""What an image's program may use, where no engine runs it."""

from __future__ import annotations

import os

import pytest
from weightsmith.core.ports import StartSpec
from weightsmith.outside.rootfs import memory_limit


@pytest.mark.parametrize(("cpus", "more"), [(2, 288 << 20), (16, 512 << 20), (64, 1280 << 20)])
def test_a_server_has_room_for_the_stacks_of_its_threads(
    monkeypatch: pytest.MonkeyPatch, cpus: int, more: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: cpus)
    spec = StartSpec(port=1, env={}, memory_bytes=192 << 20)
    assert memory_limit(spec) == (192 << 20) + more
