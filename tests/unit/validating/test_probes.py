"""Probes: what both sides are asked, and by which tokenizer."""

import shutil
from pathlib import Path

import pytest
from weightsmith.errors import InputRefused
from weightsmith.validating.probes import expected_tokenizer

BASE = Path(__file__).parents[3] / "examples" / "tiny" / "base"


def test_a_base_whose_tokenizer_is_damaged_is_refused(tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, tmp_path / name)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(InputRefused, match="cannot be loaded"):
        expected_tokenizer(tmp_path, ())
