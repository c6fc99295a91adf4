"""What every command shares: `--json`, errors in a few lines, exit codes, interrupts."""

from __future__ import annotations

import errno
import functools
import inspect
import io
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

from invoke.exceptions import Exit
from invoke.tasks import task

from weightsmith.api.commands.requests import Said
from weightsmith.cli.sections import Flags
from weightsmith.core import escape
from weightsmith.core.errors import (
    EnvironmentFailure,
    UsageError,
    WeightsmithError,
    of_limits,
    of_machine,
    of_memory,
)
from weightsmith.core.escape import put_line
from weightsmith.core.interrupts import interruptible
from weightsmith.core.values import JsonValue, plain

_JSON = inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=False)
_JSON_HELP = "print the result as one JSON object, and nothing else, on standard output"
_NO_PATHS = {
    errno.ENAMETOOLONG: "give a shorter name or path",
    errno.ELOOP: "correct the symbolic links, or give another path",
}
_CONTEXT = inspect.Parameter("context", inspect.Parameter.POSITIONAL_ONLY)
"""Invoke's own first argument, which no command uses."""

Body: TypeAlias = Callable[..., Said]


def command(
    request: type[object] | Flags | None = None,
    *,
    positional: tuple[str, ...] = (),
    meanings: Mapping[str, str] | None = None,
) -> Callable[[Body], Callable[..., None]]:
    """Turn a function into an Invoke task of the contract: results on stdout, the rest on stderr.

    The body gets a `request`, whose fields are the command's flags, as `asked`. Without one, its
    parameters are the flags: `positional` names those without a flag, `meanings` has their help.
    It gets the flag `--json`; the function sees it only if it has a parameter of that name.
    """
    flags = request if isinstance(request, Flags | None) else Flags(section=request)
    positional = flags.positional() if flags else positional
    texts = {"json": _JSON_HELP, **(flags.help() if flags else meanings or {})}

    def wrap(body: Body) -> Callable[..., None]:
        asks = "json" in inspect.signature(body).parameters

        @functools.wraps(body)
        def run(_context: object, /, **arguments: JsonValue) -> None:
            as_json = bool(arguments["json"] if asks else arguments.pop("json"))
            settle_streams()
            try:
                _require_words(positional, arguments)
                values = {"asked": flags.read(arguments)} if flags else arguments
                result, text = _guarded(body, values)
            except WeightsmithError as error:
                print_error(error, as_json=as_json)
                raise Exit(code=error.exit_code) from None
            except KeyboardInterrupt:
                again = "run the same command again: what was finished is kept"
                print_error(_Interrupted("interrupted", hint=again), as_json=as_json)
                raise Exit(code=_Interrupted.exit_code) from None
            shown = escape.as_json(plain(result)) if as_json else text
            if why := put_line(shown, sys.stdout):
                hint = "what was made is kept: free some space and run it again"
                failure = EnvironmentFailure(f"cannot write the result: {why}", hint=hint)
                print_error(failure, as_json=False)
                raise Exit(code=failure.exit_code)

        own = inspect.signature(body)
        found = flags.parameters() if flags else [*own.parameters.values()]
        given = {one.name: one for one in (_CONTEXT, *found, _JSON)}
        run.__signature__ = own.replace(parameters=[*given.values()])  # type: ignore[attr-defined]
        made: Callable[..., None] = task(
            positional=list(positional),
            iterable=flags.many() if flags else [],
            auto_shortflags=False,
            help={name: text for name, text in texts.items() if name in given},
        )(run)
        return made

    return wrap


def settle_streams() -> None:
    """Escape what the locale cannot encode; replace streams that were closed before the start."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 - for the rest of our time
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _require_words(positional: tuple[str, ...], arguments: Mapping[str, JsonValue]) -> None:
    """Raise UsageError for a blank argument, which as a path would be the current folder.

    A flag's own value may be empty, which is its default.
    """
    for name, value in arguments.items():
        words = value if isinstance(value, list) else [value]
        must = isinstance(value, list) or name in positional
        if any(isinstance(word, str) and not word.strip() and (word or must) for word in words):
            flag = name.upper() if name in positional else f"--{name.rstrip('_').replace('_', '-')}"
            raise UsageError(
                f"{flag} is empty", hint="give a value; a variable of the shell may not be set"
            )


def _guarded(body: Body, arguments: dict[str, JsonValue]) -> Said:
    """Run a body; some signals end it like Ctrl-C, and a bug leaves its traceback in a file."""
    try:
        Path.cwd()
    except FileNotFoundError:
        raise EnvironmentFailure(
            "the current folder was deleted", hint="change to one that exists"
        ) from None
    try:
        with interruptible():
            return body(**arguments)
    except Exception as error:
        if too_many := of_limits(error):
            raise too_many from error
        if isinstance(error, WeightsmithError):
            raise
        if no_memory := of_memory(error):
            raise no_memory from error
        raise (_refused(error) or _unexpected(error)) from error


def _refused(error: Exception) -> Exception | None:
    """Return what the machine, or a path or a word that was given, is at fault for; else None."""
    if isinstance(error, OSError):
        if error.errno in _NO_PATHS:
            name = str(error.filename or "a path")
            shown = name if len(name) <= 200 else f"{name[:200]}…"
            return UsageError(f"{shown}: {error.strerror}", hint=_NO_PATHS[error.errno])
        from weightsmith.building.wiring import require_folders

        try:
            require_folders()  # in some places, such as below /proc, a folder cannot be made
        except WeightsmithError as refused:
            return refused
        return of_machine(error)
    if isinstance(error, UnicodeEncodeError):
        part = error.object[error.start : error.end]
        if not all("\ud800" <= character <= "\udfff" for character in part):
            return None
        around = error.object[max(0, error.start - 20) : error.end + 20]
        return UsageError(
            f"a name on the command line or of a file is not UTF-8: {around!r}",
            hint="rename it, or spell it in the terminal's own encoding",
        )
    if isinstance(error, RuntimeError):  # pathlib has no classes of its own
        if str(error).startswith("Symlink loop from"):
            return UsageError(str(error), hint=_NO_PATHS[errno.ELOOP])
        if str(error) == "Could not determine home directory.":
            said = "a path begins with ~ and the name of a user who has no home folder"
            return UsageError(said, hint="write the folder in full")
    return None


def _unexpected(error: Exception) -> Exception:
    if os.environ.get("WEIGHTSMITH_DEBUG"):
        return error
    try:
        descriptor, name = tempfile.mkstemp(prefix="weightsmith-", suffix=".log", text=True)
        with os.fdopen(descriptor, "w") as file:
            file.write(traceback.format_exc())
        trace = f"the traceback is in {name}"
    except OSError:
        trace = "with WEIGHTSMITH_DEBUG=1 it prints its traceback"
    return WeightsmithError(
        f"unexpected {type(error).__name__}: {error}", hint=f"this is a bug in weightsmith; {trace}"
    )


class _Interrupted(WeightsmithError):
    exit_code = 130


def print_error(error: WeightsmithError, *, as_json: bool) -> None:
    """Print an error in a few lines on stderr, and with --json as an object on stdout."""
    hint = error.hint
    if sys.getfilesystemencoding() == "ascii" and not error.message.isascii():
        hint = f"set LC_ALL=C.UTF-8 and not PYTHONUTF8=0, else names must be ASCII; or {hint}"
    if as_json:
        code = error.exit_code
        report: dict[str, JsonValue] = {"message": error.message, "hint": hint, "exit_code": code}
        put_line(escape.as_json({**plain(error.details), "error": report}), sys.stdout)
    text = f"error: {escape.quoted(error.message)}"
    text += f"\n  hint: {escape.quoted(hint)}" if hint else ""
    put_line(text, sys.stderr)
