"""What engines say of an image that cannot be started is the image's fault, and told as that."""

from __future__ import annotations

import pytest
from weightsmith.core.errors import CheckFailed
from weightsmith.outside.start_errors import from_engine_message

RUNC = (
    "failed to create task for container: failed to create shim task: OCI runtime create failed:"
    " runc create failed: unable to start container process: "
)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("no command specified", "it has neither an entrypoint nor a command"),
        (
            RUNC + 'exec: "/missing": stat /missing: no such file or directory: unknown',
            "cannot execute its program '/missing': the program, or its loader",
        ),
        (
            RUNC + 'exec: "missing": executable file not found in $PATH: unknown',
            "cannot execute its program 'missing': the program, or its loader",
        ),
        (
            RUNC + 'exec: "/plain": permission denied: unknown',
            "cannot execute its program '/plain': the image's user may not execute it",
        ),
        (
            RUNC + 'exec: "/": is a directory: unknown: permission denied',
            "cannot execute its program '/': the image's user may not execute it",
        ),
        ("unable to find user x: no matching entries in passwd file", "its user is not in"),
        ("Cannot mkdir: /plain is not a directory", "its working directory is a file"),
    ],
)
def test_an_image_s_fault_is_told_as_that(said: str, told: str) -> None:
    """Taken from Docker 26 with runc."""
    fault = from_engine_message("image:1", said)
    assert isinstance(fault, CheckFailed)
    assert fault.message.startswith(f"image:1 cannot be started: {told}")
    assert fault.hint
    assert "docker info" not in fault.hint


@pytest.mark.parametrize(
    "said", ["no space left on device", "driver failed: no such file or directory", ""]
)
def test_an_engine_s_fault_stays_its_own(said: str) -> None:
    assert from_engine_message("image:1", said) is None
