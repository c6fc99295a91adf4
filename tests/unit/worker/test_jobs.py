"""What jobs import while programs run, and what they do not begin without."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.forward import native
from weightsmith.quantizers.gguf import QUANTIZER
from weightsmith.worker import calibrating
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


def test_importance_is_not_measured_without_our_kernels(tmp_path, monkeypatch):
    """A walk does not begin where its bits would be this CPU's own."""
    monkeypatch.setattr(calibrating, "has_avx2", lambda: True)
    monkeypatch.setattr(native, "is_fast", lambda: False)

    with pytest.raises(EnvironmentFailure, match="depend on this CPU") as refused:
        calibrating.importance(tmp_path, (), tmp_path / "imatrix.gguf", lambda *_: None)

    assert "imatrix: auto" in refused.value.hint
    assert not list(tmp_path.iterdir())
