"""Logs of jobs: the newest are kept, and those of jobs that still run."""

import os
from pathlib import Path

from weightsmith.drivers.wire import open_log


def test_the_log_of_a_long_job_outlives_those_of_many_short_ones(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    for number in range(300):
        path = folder / f"20260101T{number:06d}-1-000-merge.log"
        path.write_text("x")
        os.utime(path, (1000 + number, 1000 + number))
    long = folder / "20250101T000000-1-000-quantize.log"
    long.write_text("first by name, and written to last")

    with open_log(tmp_path, "bake"):
        kept = {path.name for path in folder.iterdir()}

    assert long.name in kept
    assert "20260101T000000-1-000-merge.log" not in kept
