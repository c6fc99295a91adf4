"""Modules imported while programs run: once, and with their errors where they are needed."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from weightsmith.quantizers.gguf import QUANTIZER
from weightsmith.worker.jobs import import_ahead


def test_whoever_imports_a_module_meanwhile_waits_for_it_and_gets_its_error(
    tmp_path: Path, monkeypatch
) -> None:
    (tmp_path / "slow_one.py").write_text("import time\ntime.sleep(0.2)\ndone = True\n")
    (tmp_path / "broken_one.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)

    import_ahead(["slow_one", "broken_one"])

    assert importlib.import_module("slow_one").done
    with pytest.raises(ImportError, match="no_such_module"):
        importlib.import_module("broken_one")


def test_the_modules_of_a_check_exist() -> None:
    for name in QUANTIZER.check_imports:
        importlib.import_module(name)
        assert name in sys.modules
