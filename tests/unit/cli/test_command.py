"""A command ends with a code and a few lines, whatever happens in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
from invoke.context import Context
from invoke.exceptions import Exit
from weightsmith.cli.command import command
from weightsmith.core.errors import CheckFailed, EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.values import Json

ENDS = {
    RuntimeError("half done"): (1, "unexpected RuntimeError: half done"),
    UsageError("bad", hint="do"): (2, "bad"),
    InputRefused("bad", hint="do"): (3, "bad"),
    CheckFailed("bad", hint="do"): (4, "bad"),
    EnvironmentFailure("bad", hint="do"): (5, "bad"),
    KeyboardInterrupt(): (130, "interrupted"),
}


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_each_end_has_its_code_a_hint_and_no_traceback(
    error: BaseException,
    as_json: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.delenv("WEIGHTSMITH_DEBUG", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, message = ENDS[error]

    @command()
    def fail() -> tuple[Mapping[str, Json], str]:
        raise error

    with pytest.raises(Exit) as caught:
        fail(Context(), json=as_json)

    said = capsys.readouterr()
    first, second = said.err.splitlines()
    assert caught.value.code == code
    assert first == f"error: {message}"
    assert second.startswith("  hint: ")
    if as_json:
        told = json.loads(said.out)["error"]
        assert (told["message"], told["exit_code"]) == (message, code)
        assert f"  hint: {told['hint']}" == second
    else:
        assert said.out == ""
    logs = list(tmp_path.iterdir())
    assert [str(log) in second for log in logs] == [True] * (code == 1)
    assert all("Traceback" in log.read_text("utf-8") for log in logs)
