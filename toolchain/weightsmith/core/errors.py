"""Every error that a user can cause: what is wrong, where, and what to do next."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from weightsmith.core.values import Json, Writable


class WeightsmithError(Exception):
    """An expected failure: one message, one hint, one exit code, never a traceback."""

    exit_code = 1

    def __init__(
        self, message: str, *, hint: str = "", details: Mapping[str, Writable] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details: Mapping[str, Json] = details or {}
        """What `--json` prints in addition to the error, under its own keys."""


class UsageError(WeightsmithError):
    """The command line or the recipe is wrong (exit 2)."""

    exit_code = 2


class InputRefused(WeightsmithError):
    """An input is unsafe, incomplete or does not match (exit 3)."""

    exit_code = 3


class Unmeasurable(InputRefused):
    """A model that the quality gate cannot measure; only its answers are then judged."""


class CheckFailed(WeightsmithError):
    """A check or a gate failed (exit 4)."""

    exit_code = 4


class EnvironmentFailure(WeightsmithError):
    """The machine lacks something: engine, registry, disk, memory, network (exit 5)."""

    exit_code = 5


class CacheLost(EnvironmentFailure):
    """A result that the shared cache has could not be read, or was altered (exit 5).

    The store no longer offers it, so the same work done again makes it here.
    """


class Altered(EnvironmentFailure):
    """Data from the network does not match what its sender declared (exit 5)."""


_OF_THE_MACHINE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
    | {errno.ENAMETOOLONG, errno.EFBIG}
)
"""What a disk, its permissions or limits refuse: the user can correct it, so it is no bug."""
_OF_DISKS = frozenset({errno.EIO, errno.ESTALE})
"""What a disk says that is damaged or gone, whatever was asked of it."""


def of_machine(error: OSError) -> EnvironmentFailure | None:
    """Return an error about what the machine refuses to write, if `error` is one; else None."""
    if error.errno in _OF_DISKS:
        return EnvironmentFailure(
            f"a disk fails at {error.filename or 'a file'}: {error.strerror}",
            hint="look at the kernel's log (`dmesg`) and the mount, then run it again; our own "
            "folders are set by WEIGHTSMITH_HOME, WEIGHTSMITH_STORE and TMPDIR",
        )
    no_temporary = error.errno == errno.ENOENT and error.filename is None  # as `tempfile` says it
    if error.errno not in _OF_THE_MACHINE and not no_temporary:
        return None
    return EnvironmentFailure(
        f"cannot write {error.filename or 'a file'}: {error.strerror or error}",
        hint="free some space or get write permission there, or name another folder; our own are "
        "set by WEIGHTSMITH_HOME, WEIGHTSMITH_STORE and TMPDIR",
    )


def of_limits(error: BaseException) -> EnvironmentFailure | None:
    """Return an error about the limit of open files or threads, if that caused `error`; else None.

    Code that fails to open something for this reason often reports it as damaged.
    """
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:  # causes may form a loop
        seen.add(id(cause))
        if isinstance(cause, OSError) and cause.errno in (errno.EMFILE, errno.ENFILE):
            return EnvironmentFailure(
                f"cannot open more files or connections: {cause.strerror}",
                hint="raise the limit in the shell that runs this (`ulimit -n 4096`), then run it "
                "again",
            )
        if isinstance(cause, RuntimeError) and str(cause) == _NO_THREAD:
            return too_many_processes(_NO_THREAD)
        cause = cause.__cause__ or cause.__context__
    return None


_NO_THREAD = "can't start new thread"
"""What Python says; libraries and the C library say what the kernel answered."""


def too_many_processes(said: str) -> EnvironmentFailure | None:
    """Return an error about the limit of processes, if that is what `said` tells of; else None."""
    if _NO_THREAD not in said and os.strerror(errno.EAGAIN) not in said:
        return None
    return EnvironmentFailure(
        f"no more processes or threads can be started: {said}",
        hint="end other programs, or raise the limit in the shell that runs this (`ulimit -u`, "
        "and `ulimit -v` for memory); in a container, its engine's (`--pids-limit`)",
    )


def of_memory(error: BaseException) -> EnvironmentFailure | None:
    """Return an error about this process's memory, if a lack of it caused `error`; else None."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    limited = limit != resource.RLIM_INFINITY
    # As Python's import says where it could not even make an exception.
    speechless = limited and isinstance(error, SystemError)
    if not speechless and not ran_out_of_memory(error):
        return None
    so_far = f": it may use {limit >> 20} MiB" if limited else ""
    return EnvironmentFailure(
        f"there is not enough memory{so_far}",
        hint="end other programs, or raise the limit in the shell that runs this (`ulimit -v`); in "
        "a container, its engine's (`--memory`)",
    )


def of_panic(error: BaseException, what: str) -> InputRefused | None:
    """Return the refusal of an input on which a library written in Rust gave up; else None.

    Its PanicException is no Exception. Tokenizers raise it for a pattern that takes too many steps.
    """
    if type(error).__name__ != "PanicException":
        return None
    return InputRefused(
        f"{what}: a library gave up on its input: {' '.join(str(error).split())[:200]}",
        hint="if it is a tokenizer, compare its tokenizer.json with the base's, or do without it",
    )


_MEMORY = (
    *("can't allocate memory", "cannot allocate memory", "out of memory", "bad_alloc"),
    "failed to map segment",
)
"""What torch, CUDA, the C library, its loader and C++ say, in lower case."""


def ran_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; torch says so with a RuntimeError."""
    if isinstance(error, MemoryError) or getattr(error, "errno", 0) == errno.ENOMEM:
        return True
    text = str(error).lower()
    told = isinstance(error, (RuntimeError, ImportError))
    return told and any(words in text for words in _MEMORY)


_BY_CODE = {
    kind.exit_code: kind for kind in (UsageError, InputRefused, CheckFailed, EnvironmentFailure)
}


def from_code(code: int, message: str, hint: str = "") -> WeightsmithError:
    """Rebuild an error from another process by its exit code."""
    return _BY_CODE.get(code, WeightsmithError)(message, hint=hint)
