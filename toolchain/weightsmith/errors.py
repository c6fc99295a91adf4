"""Every error that a user can cause: what is wrong, where, and what to do next."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any


class WeightsmithError(Exception):
    """An expected failure: one message, one hint, one exit code, never a traceback."""

    exit_code = 1

    def __init__(
        self, message: str, *, hint: str = "", details: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details or {}
        """What `--json` prints beside the error, under keys of its own."""


class UsageError(WeightsmithError):
    """The command line or the recipe asks for something that cannot be (exit 2)."""

    exit_code = 2


class InputRefused(WeightsmithError):
    """An input is unsafe, incomplete or does not match (exit 3)."""

    exit_code = 3


class Unmeasurable(InputRefused):
    """A model that the quality gate cannot look into; it is then judged by its answers alone."""


class CheckFailed(WeightsmithError):
    """A check or a gate failed (exit 4)."""

    exit_code = 4


class EnvironmentFailure(WeightsmithError):
    """The machine lacks something: engine, registry, disk, memory, network (exit 5)."""

    exit_code = 5


class Altered(EnvironmentFailure):
    """What came over the network is not what its sender said it is (exit 5)."""


def of_open_files(error: BaseException) -> EnvironmentFailure | None:
    """Return what it means that no more files may be opened, where that is behind an error.

    Whoever could not open one thing or other says what that was for, and takes it for damaged.
    """
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:  # an error may be behind itself
        seen.add(id(cause))
        if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
            return EnvironmentFailure(
                f"no more files or connections may be opened: {cause.strerror}",
                hint="raise the limit in the shell that runs this (`ulimit -n 4096`), then run it "
                "again",
            )
        cause = cause.__cause__ or cause.__context__
    return None


_BY_CODE = {
    kind.exit_code: kind for kind in (UsageError, InputRefused, CheckFailed, EnvironmentFailure)
}


def from_code(code: int, message: str, hint: str = "") -> WeightsmithError:
    """Rebuild an error that crossed a process boundary from its exit code."""
    return _BY_CODE.get(code, WeightsmithError)(message, hint=hint)
