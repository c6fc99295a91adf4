"""Comparing files: what differs from the base in its spelling only is no finding."""

import json
import shutil
from pathlib import Path

import pytest
from weightsmith.validating.structure import compare_files

BASE = Path(__file__).parents[3] / "examples" / "tiny" / "base"


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        (10000, 10000.0, True),  # as transformers writes it again
        (float("nan"), float("nan"), True),
        (10000, 10000.5, False),
        (float("nan"), 1.0, False),
    ],
)
def test_a_number_of_config_json(tmp_path, before, after, same):
    for name, value in (("base", before), ("merged", after)):
        shutil.copytree(BASE, tmp_path / name)
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rope_theta": value}))

    found = compare_files(tmp_path / "base", (), tmp_path / "merged")

    assert any("rope_theta" in each.message for each in found) != same
