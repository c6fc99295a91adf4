"""Errors of images that cannot be started."""

from __future__ import annotations

import errno
import re

from weightsmith.core.errors import CheckFailed

_REASONS = {
    errno.ENOENT: "the program, or its loader or interpreter, is not in the image",
    errno.ENOTDIR: "the program is not in the image",
    errno.EACCES: "the image's user may not execute it",
    errno.ENOEXEC: "it is not a program for this machine",
    errno.ELIBBAD: "it is not a program for this machine",
}

_SAID = {
    "executable file not found": errno.ENOENT,
    "no such file or directory": errno.ENOENT,
    "permission denied": errno.EACCES,
    "is a directory": errno.EACCES,
    "exec format error": errno.ENOEXEC,
}
"""An engine's message -> the kernel's error."""


def no_program(image: str) -> CheckFailed:
    """Return the error for an image without entrypoint and command."""
    return CheckFailed(
        f"{image} cannot be started: it has neither an entrypoint nor a command",
        hint="build it again with an entrypoint, or on a base image that has one",
    )


def unstartable(image: str, program: str, number: int, why: str) -> CheckFailed:
    """Return the error for an image whose program the kernel refuses to start."""
    reason = _REASONS.get(number, why)
    return CheckFailed(
        f"{image} cannot be started: cannot execute its program {program[:200]!r}: {reason}",
        hint="check the entrypoint and the files of the image, or of its base",
    )


def from_engine_message(image: str, said: str) -> CheckFailed | None:
    """Return the error if an engine's message is about the image; else None.

    The messages are those of Docker and of runc, which Podman and containerd use too.
    """
    if re.search("no command (or entrypoint )?(specified|provided)", said, re.IGNORECASE):
        return no_program(image)
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
