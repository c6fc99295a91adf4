"""A walk over calibration text does not begin where its bits would be this CPU's own."""

import pytest
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.forward import native
from weightsmith.worker import calibrating


def test_importance_is_not_measured_without_our_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrating, "has_avx2", lambda: True)
    monkeypatch.setattr(native, "is_fast", lambda: False)

    with pytest.raises(EnvironmentFailure, match="depend on this CPU") as refused:
        calibrating.importance(tmp_path, (), tmp_path / "imatrix.gguf", lambda *_: None)

    assert "imatrix: auto" in refused.value.hint
    assert not list(tmp_path.iterdir())
