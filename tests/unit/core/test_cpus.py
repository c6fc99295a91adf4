"""How many threads a program gets: busy CPUs are not counted."""

from __future__ import annotations

import os

import pytest
from weightsmith.core import cpus


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([7, 7, 7, 7], [27, 27, 27, 27], 4),
        ([7, 7, 7, 7], [27, 27, 26, 7], 3),  # a busy one
        ([7, 7, 7, 7], [17, 17, 27, 27], 3),  # a busy program that moves between two
        ([7, 7, 7, 7], [7, 7, 7, 7], 1),
        ([7, 7, 7, 7], [507, 27, 27, 27], 4),  # the clock went on while this process waited
        ([], [], 3),  # without counts one CPU is left
        ([1, 1, 1, 1], [1, 1, 1], 3),
        ([0, 0, 0, 0], [0, 0, 0, 0], 3),
    ],
)
def test_busy_cpus_get_no_thread(monkeypatch, before, after, expected):
    """Of a machine of four CPUs; idle times in ticks."""
    readings = iter([before, after])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    monkeypatch.setattr(os, "sysconf", lambda _: 100)
    monkeypatch.setattr(cpus.time, "sleep", lambda _: None)
    monkeypatch.setattr(
        cpus, "_unused", lambda: {f"cpu{n}": t for n, t in enumerate(next(readings))}
    )

    assert cpus.idle() == expected


def test_counts_are_those_of_the_kernel(tmp_path):
    mine = sorted(os.sched_getaffinity(0))
    stat = tmp_path / "stat"
    lines = ["cpu  9 9 9 9 9 9", *(f"cpu{n} 1 2 3 {40 + n} 5 6 7 8 9 10" for n in mine), "intr 5"]
    stat.write_text("\n".join(lines))
    assert cpus._unused(stat) == {f"cpu{n}": 45 + n for n in mine}
    stat.write_text("cpu0 1")
    assert cpus._unused(stat) == {}
    assert cpus._unused(tmp_path / "absent") == {}
    assert cpus._unused().keys() == {f"cpu{n}" for n in mine}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu sse4_2 fma avx f16c bmi1 avx2 bmi2", True),
        ("flags\t\t: fpu sse4_2 avx f16c bmi1 avx2 bmi2", False),  # no CPU is known
        ("flags\t\t: fpu sse4_2 fma avx f16c bmi1 bmi2", False),
        ("flags\t\t: fpu sse4_2 fma avx bmi1 avx2 bmi2", False),  # hidden by a virtual machine
        ("flags\t\t: fpu sse4_2 fma avx f16c avx2", False),
        ("Features\t: fp asimd", False),  # Arm
        ("", False),
    ],
)
def test_avx2_comes_with_what_the_kernels_use(tmp_path, flags, expected):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor\t: 0\n{flags}\n")
    assert cpus.has_avx2(info) is expected
    assert cpus.flags(tmp_path / "absent") == frozenset()


def test_flags_are_those_of_the_first_cpu(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nflags\t\t: fpu amx_tile avx2\nflags : other\n")
    assert {"fpu", "amx_tile"} < cpus.flags(info)
    assert "other" not in cpus.flags(info)


def test_the_cpu_has_the_kernels_name(tmp_path):
    told = tmp_path / "cpuinfo"
    told.write_text("processor\t: 0\nmodel name\t: AMD EPYC 9R14\nmodel name\t: another\n")
    assert cpus.model(told) == "AMD EPYC 9R14"
    told.write_text("processor\t: 0\nCPU part\t: 0xd0c\n")
    assert cpus.model(told) == ""
    assert cpus.model(tmp_path / "none") == ""


def test_the_share_in_use_is_that_of_all_cpus_over_the_time(monkeypatch):
    hertz = os.sysconf("SC_CLK_TCK")
    readings = iter(
        [{"cpu0": 10, "cpu1": 10}, {"cpu0": 10 + 4 * hertz, "cpu1": 10 + hertz}, {}, {}]
    )
    monkeypatch.setattr(cpus, "_unused", lambda: next(readings))
    monkeypatch.setattr(cpus.time, "sleep", lambda _: None)

    assert cpus.in_use(4.0) == pytest.approx(0.375)
    assert cpus.in_use(4.0) == 0.0
