"""Free memory, of this machine and below a container's limit."""

from __future__ import annotations

from pathlib import Path

import pytest
from weightsmith.outside import hardware
from weightsmith.serving.memory import host_memory


@pytest.mark.parametrize(
    ("most", "used", "files", "free"),
    [
        ("900000", 600_000, 100_000, 400_000),
        ("900000", 950_000, 0, 1),  # over its limit: nothing, which is not the same as unknown
    ],
)
def test_a_container_has_what_its_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: str, used: int, files: int, free: int
) -> None:
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{most}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {files}\nactive_file 7\n")

    assert hardware.free_memory() == free


def test_no_limit_leaves_what_the_kernel_estimates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")

    assert 1 << 20 < hardware.free_memory() <= host_memory()


def test_the_drivers_libraries_are_found_where_the_loader_is_told_to_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", f":{tmp_path / 'empty'}:{tmp_path}")
    names = {"libcuda.so.1", "libnvidia-ml.so.1", "libnvidia-nvvm.so.4"}
    for name in (*names, "libcudart.so.13"):
        (tmp_path / name).touch()

    assert {path.name for path in hardware.driver_libraries()} == names


def test_the_memory_is_read_at_some_speed() -> None:
    """No machine that this runs on reads less than 50 MB or more than 10 TB in a second."""
    assert 5e7 < hardware.memory_bandwidth() < 1e13
