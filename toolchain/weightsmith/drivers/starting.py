"""What is wrong with an image that cannot be started, said as the image's fault that it is."""

from __future__ import annotations

import errno
import re

from weightsmith.errors import CheckFailed

_REASONS = {
    errno.ENOENT: "it, or the loader or interpreter that it names, is not in the image",
    errno.ENOTDIR: "it is not in the image",
    errno.EACCES: "it is no program that the image's user may run",
    errno.ENOEXEC: "it is no program for this machine",
    errno.ELIBBAD: "it is no program for this machine",
}

_SAID = {
    "executable file not found": errno.ENOENT,
    "no such file or directory": errno.ENOENT,
    "permission denied": errno.EACCES,
    "is a directory": errno.EACCES,
    "exec format error": errno.ENOEXEC,
}
"""What engines say -> what the kernel told them."""


def without_program(image: str) -> CheckFailed:
    """Return the error for an image that names nothing to start."""
    return CheckFailed(
        f"{image} cannot be started: it names no program, neither an entrypoint nor a command",
        hint="build it again with an entrypoint, or on a base image that has one",
    )


def unstartable(image: str, program: str, number: int, why: str) -> CheckFailed:
    """Return the error for an image whose program the kernel does not start."""
    reason = _REASONS.get(number, why)
    return CheckFailed(
        f"{image} cannot be started: its program {program[:200]!r} does not run: {reason}",
        hint="look at the entrypoint and the files of the image, or of the base below it",
    )


def told_by_engine(image: str, said: str) -> CheckFailed | None:
    """Return the error where what an engine says is the image's fault; None where it is not.

    The words are those of Docker and of runc, which Podman and containerd call too.
    """
    if re.search("no command (or entrypoint )?(specified|provided)", said, re.IGNORECASE):
        return without_program(image)
    if found := re.search(r'exec: "([^"]*)": ([^:]*(?:: [^:]*)?)', said):
        program, why = found[1], found[2]
        number = next((n for words, n in _SAID.items() if words in said), 0)
        return unstartable(image, program, number, why)
    if "unable to find user" in said or "no matching entries in" in said:
        return CheckFailed(
            f"{image} cannot be started: its user is not in its /etc/passwd or /etc/group",
            hint="name the user by number in the image's configuration",
        )
    if "mkdir" in said and "not a directory" in said:
        return CheckFailed(
            f"{image} cannot be started: its working directory is a file",
            hint="correct the working directory in the image's configuration",
        )
    return None
