"""A walk over calibration text does not begin where its bits would be this CPU's own."""

import pytest
from weightsmith.errors import EnvironmentFailure
from weightsmith.forward import native
from weightsmith.job_inputs import Input
from weightsmith.jobs import ImportanceJob
from weightsmith.worker import calibrating


def test_importance_is_not_measured_without_our_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrating, "has_avx2", lambda: True)
    monkeypatch.setattr(native, "is_fast", lambda: False)
    job = ImportanceJob(builder="merge", output=tmp_path, seconds=0, model=Input(path=tmp_path),
                        texts=(), file="imatrix.gguf")  # fmt: skip

    with pytest.raises(EnvironmentFailure, match="depend on this CPU") as refused:
        calibrating.importance(job, lambda *_: None)

    assert "imatrix: auto" in refused.value.hint
