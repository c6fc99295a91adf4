"""What every command shares: `--json`, errors in a few lines, exit codes, interrupts."""

from __future__ import annotations

import errno
import functools
import inspect
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from invoke.exceptions import Exit
from invoke.tasks import task

from toolchain.cli.flags import FLAGS
from toolchain.errors import EnvironmentFailure, WeightsmithError
from toolchain.interrupts import raise_it
from toolchain.values import Json, plain

_OF_THE_MACHINE = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR}
)
"""What a disk or its permissions refuse: for the user to change, no fault of ours."""

Body = Callable[..., tuple[Mapping[str, Json], str]]
"""A command's body returns its JSON object and the same for people."""


def command(
    *, positional: tuple[str, ...] = (), many: tuple[str, ...] = ()
) -> Callable[[Body], Any]:
    """Turn a function into an Invoke task of the contract: results on stdout, the rest on stderr.

    `positional` names arguments without a flag, `many` those that may be given more than once.
    """

    def wrap(body: Body) -> Any:
        @functools.wraps(body)
        def run(context: object, **arguments: Any) -> None:
            as_json = bool(arguments.get("json"))
            try:
                result, text = _guarded(body, context, arguments)
            except WeightsmithError as error:
                _fail(error.message, error.hint, error.exit_code, error.details, as_json=as_json)
            except KeyboardInterrupt:
                _fail("interrupted; what was finished is kept", "", 130, {}, as_json=as_json)
            else:
                _say(json.dumps(plain(result)) if as_json else text)

        # Invoke reads the signature, and takes a list's default only from None.
        run.__signature__ = _with_none(inspect.signature(body), many)  # type: ignore[attr-defined]
        names = inspect.signature(body).parameters
        return task(
            positional=list(positional),
            iterable=list(many),
            auto_shortflags=False,
            help={name: text for name, text in FLAGS.items() if name in names},
        )(run)

    return wrap


def _say(text: str) -> None:
    try:
        print(text, flush=True)  # noqa: T201
    except BrokenPipeError:  # the reader, such as `head`, had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _with_none(signature: inspect.Signature, many: tuple[str, ...]) -> inspect.Signature:
    return signature.replace(
        parameters=[
            parameter.replace(default=None) if name in many else parameter
            for name, parameter in signature.parameters.items()
        ]
    )


def _guarded(
    body: Body, context: object, arguments: dict[str, Any]
) -> tuple[Mapping[str, Json], str]:
    """Run a body; SIGTERM ends it like Ctrl-C, and a fault of ours leaves its trace in a file."""
    raise_it()
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        return body(context, **arguments)
    except WeightsmithError:
        raise
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise _unexpected(error) from error
        place = error.filename or "a file"
        raise EnvironmentFailure(
            f"cannot write {place}: {error.strerror}",
            hint="make room or get the right to write there, or set WEIGHTSMITH_CACHE, "
            "WEIGHTSMITH_STORE and TMPDIR to folders where you may write",
        ) from error
    except Exception as error:
        raise _unexpected(error) from error
    finally:
        signal.signal(signal.SIGTERM, previous)


def _unexpected(error: Exception) -> Exception:
    if os.environ.get("WEIGHTSMITH_DEBUG"):
        return error
    return WeightsmithError(
        f"unexpected {type(error).__name__}: {error}",
        hint=f"this is a fault of weightsmith; the trace is in {_save_trace()}",
    )


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _save_trace() -> Path:
    descriptor, name = tempfile.mkstemp(prefix="weightsmith-", suffix=".log", text=True)
    with os.fdopen(descriptor, "w") as file:
        file.write(traceback.format_exc())
    return Path(name)


def _fail(
    message: str, hint: str, code: int, details: Mapping[str, Json], *, as_json: bool
) -> None:
    if as_json:
        error = {"message": message, "hint": hint, "exit_code": code}
        print(json.dumps({**plain(details), "error": error}), flush=True)  # noqa: T201
    text = f"error: {message}" + (f"\n  hint: {hint}" if hint else "")
    print(text, file=sys.stderr, flush=True)  # noqa: T201
    raise Exit(code=code)
