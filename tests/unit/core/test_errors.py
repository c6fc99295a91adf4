"""What stands behind an error is looked for, however the errors refer to each other."""

import errno
import os

import pytest
from weightsmith.cli.command import _guarded
from weightsmith.core.errors import EnvironmentFailure, of_limits


def test_too_many_open_files_are_found_behind_other_errors_that_may_form_a_loop() -> None:
    error, other = ValueError("damaged"), ValueError()
    error.__cause__ = OSError(errno.EMFILE, "Too many open files")
    found = of_limits(error)
    assert found is not None
    assert "ulimit" in found.hint

    error.__cause__, other.__cause__ = other, error
    assert of_limits(error) is None


def _no_segment() -> None:
    """As the C library's loader says it of a package's own code."""
    raise ImportError("x.so: failed to map segment from shared object")


@pytest.mark.parametrize("body", [lambda: bytearray(1 << 62), _no_segment])
def test_too_little_memory_is_no_bug(body) -> None:
    with pytest.raises(EnvironmentFailure, match="not enough memory") as caught:
        _guarded(body, {})
    assert "ulimit -v" in caught.value.hint


def _fails(number: int) -> None:
    raise OSError(number, os.strerror(number), "model.safetensors")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EFBIG])
def test_a_failing_disk_and_a_limit_of_a_files_size_are_no_bugs(number: int) -> None:
    with pytest.raises(EnvironmentFailure, match=r"model\.safetensors"):
        _guarded(_fails, {"number": number})
