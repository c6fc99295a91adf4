"""Programs that download run again where a connection broke, and nowhere else."""

from __future__ import annotations

import time

import pytest
from weightsmith.outside.downloading import persistently
from weightsmith.outside.process import Completed

from tests.fakes.journal import RecordingProgress

BROKEN = (
    "urllib3.exceptions.ReadTimeoutError: HTTPSConnectionPool(host='x'): Read timed out.",
    "urllib3.exceptions.ProtocolError: ('Connection broken: IncompleteRead(1 bytes read)')",
    "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.",
    "ERROR: HTTP error 503 while getting https://index.example/torch.whl",
    "#9 12.3 E: Failed to fetch http://deb.example/x.deb  Hash Sum mismatch",
    "error: https://index.example/llama.tar.gz broke off: timed out; run it again",
)
FINAL = (
    "ERROR: No matching distribution found for no-such-package==1.0",
    "[503/900] Building CXX object ggml.o: error: expected ';'",
    "dial tcp: lookup registry.example: no such host",
    "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError(refused)'",
)


def ended(code: int, *tail: str) -> Completed:
    return Completed(argv=("pip",), returncode=code, seconds=1.0, tail=tail)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.mark.parametrize("said", BROKEN)
@pytest.mark.parametrize("last", [0, 2])  # patience ends
def test_a_broken_connection_is_tried_again_with_a_warning(
    pauses: list[float], said: str, last: int
) -> None:
    ends = iter([ended(1, said, "more"), ended(1, said), ended(last, said)])
    progress = RecordingProgress()

    assert persistently(lambda: next(ends), progress).returncode == last
    assert pauses == [5, 20]
    assert all(kind == "warn" and said[:50] in text for kind, text in progress.lines)


@pytest.mark.parametrize("said", FINAL)
def test_what_another_try_does_not_change_is_not_tried(pauses: list[float], said: str) -> None:
    ends = iter([ended(1, said)])

    assert persistently(lambda: next(ends), RecordingProgress()).returncode == 1
    assert pauses == []
