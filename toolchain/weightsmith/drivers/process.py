"""Starts programs: the one place of the toolchain that does.

Every program runs without a shell, with an environment made here, in a process group of its own.
The group ends with its leader, on an exception, on Ctrl-C, and when this process is killed: a
small trampoline (`trampoline.py`) asks the kernel for a death signal before it becomes the
program. The kernel ties that signal to the *thread* that started the program, so start programs
from a thread that outlives them.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from weightsmith.drivers.jail import Jail
from weightsmith.drivers.lines import LONGEST, Lines, pump
from weightsmith.errors import EnvironmentFailure

_TRAMPOLINE = Path(__file__).with_name("trampoline.py")
_NOT_STARTED = 125
"""The trampoline's exit code for what fails before the program runs."""
_TAIL_LINES = 200
_PATIENCE = 5.0
"""Seconds between asking a group to end and killing it."""

_KEPT = ("PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "TMPDIR")
_KEPT_FOR_NETWORK = (
    *("HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY"),
    *("http_proxy", "https_proxy", "no_proxy", "all_proxy"),
    *("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)

OnLine = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceLimits:
    """What a program may use."""

    memory_bytes: int = 0
    """Most that it may allocate; mapped files do not count. 0 for no limit."""
    jail: Jail | None = None
    """Keeps it apart from everything else, by what `confinement` has found out; for jobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """A program that ended by itself."""

    argv: tuple[str, ...]
    returncode: int
    """Negative for the signal that ended it."""
    seconds: float
    tail: tuple[str, ...]
    """The last lines of its output, both streams."""

    def require(self, what: str, *, hint: str) -> Completed:
        """Return itself, or raise EnvironmentFailure with the end of the output."""
        if self.returncode == 0:
            return self
        last = "\n".join(f"  {line}" for line in self.tail[-12:] if line.strip())
        raise EnvironmentFailure(
            f"{what} failed ({describe_exit(self.returncode)})" + (f":\n{last}" if last else ""),
            hint=hint,
        )


class TookTooLong(EnvironmentFailure):
    """A program was ended because its time was over."""


NO_LIMITS = ResourceLimits()


def describe_exit(returncode: int) -> str:
    """Say how a program ended, for people."""
    if returncode >= 0:
        return f"exit code {returncode}"
    with contextlib.suppress(ValueError):
        return f"killed by {signal.Signals(-returncode).name}"
    return f"killed by signal {-returncode}"


def scrubbed(
    extra: Mapping[str, str] | None = None, *, network: bool = False, prefixes: Sequence[str] = ()
) -> dict[str, str]:
    """Return an environment of the few harmless variables, without tokens and passwords.

    `network` adds proxies and certificate files, `prefixes` whole families such as `PIP_`.
    """
    names = {*_KEPT, *(_KEPT_FOR_NETWORK if network else ())}
    kept = {
        name: value
        for name, value in os.environ.items()
        if name in names or name.startswith(tuple(prefixes))
    }
    return {"PATH": os.defpath, **kept, **(extra or {})}


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: bytes | None = None,  # noqa: A002 - as subprocess.run calls it
    on_line: OnLine | None = None,
    on_error_line: OnLine | None = None,
    longest_line: int = LONGEST,
    hold_stdin: bool = False,
    timeout: float | None = None,
    limits: ResourceLimits = NO_LIMITS,
) -> Completed:
    """Run a program to its end, handing on its output line by line as it comes.

    Standard error joins standard output unless `on_error_line` wants it apart. A line of
    standard output with more bytes than `longest_line` comes in pieces. `hold_stdin` keeps the
    program's standard input open and silent, so that it sees the end of file when we die.
    `timeout` is in seconds. The callbacks run on the caller's thread; what they raise ends the
    program. Raises EnvironmentFailure where the program is missing or took too long; an exit code
    is returned, not raised.
    """
    words = tuple(str(word) for word in argv)
    started = time.monotonic()
    deadline = None if timeout is None else started + timeout
    tail: deque[str] = deque(maxlen=_TAIL_LINES)

    def hear(listener: OnLine | None) -> OnLine:
        def keep(line: str) -> None:
            tail.append(line[:LONGEST])
            if listener is not None:
                listener(line)

        return keep

    with _stdin(input, hold=hold_stdin) as stdin:
        merge = on_error_line is None
        process = _spawn(words, cwd=cwd, env=env, stdin=stdin, limits=limits, merge=merge)
        both = (
            (process.stdout, Lines(longest_line), on_line),
            (process.stderr, Lines(), on_error_line),
        )
        streams = [(stream, lines, hear(to)) for stream, lines, to in both if stream is not None]
        with _ended(process):
            try:
                pump(process.pid, streams, deadline, lambda: _signal_group(process, signal.SIGKILL))
            except TimeoutError:
                raise TookTooLong(
                    f"{_name(words)} did not end within {timeout:g} s",
                    hint="see whether the machine is overloaded, then run the command again",
                ) from None
    return Completed(
        argv=words,
        returncode=_returncode(process, words, tail),
        seconds=time.monotonic() - started,
        tail=tuple(tail),
    )


@dataclass(slots=True)
class Server:
    """A started program that serves until its context ends."""

    process: subprocess.Popen[bytes]
    _lines: deque[str] = field(default_factory=lambda: deque(maxlen=2000))

    def logs(self, count: int) -> str:
        """Return the last `count` lines of its output, both streams."""
        return "\n".join(list(self._lines)[-count:])

    def alive(self) -> bool:
        """Say whether it still runs."""
        return self.process.poll() is None

    def stop(self, seconds: float) -> int | None:
        """Send SIGTERM to it and its children; return its exit code, None where it still runs."""
        _signal_group(self.process, signal.SIGTERM)
        return self.process.wait() if _exited(self.process, seconds) else None

    def listen(self) -> None:
        """Keep its output until it closes it; runs on a thread of its own."""
        with self.process.stdout or open(os.devnull, "rb") as stream:  # noqa: PTH123
            for raw in stream:
                self._lines.append(raw.decode(errors="replace").rstrip("\r\n"))


@contextlib.contextmanager
def start(
    argv: Sequence[str | Path],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    limits: ResourceLimits = NO_LIMITS,
    handing: Sequence[int] = (),
) -> Iterator[Server]:
    """Start a server, and stop it with all its children when the context ends.

    `handing` are open files that it gets too, by their numbers. Raises EnvironmentFailure where
    the program is missing; whether it then serves is for the caller to find out.
    """
    words = tuple(str(word) for word in argv)
    with _stdin(None, hold=False) as stdin:
        process = _spawn(
            words, cwd=cwd, env=env, stdin=stdin, limits=limits, merge=True, handing=handing
        )
    server = Server(process)
    listener = threading.Thread(target=server.listen, daemon=True)
    listener.start()
    try:
        with _ended(process):
            yield server
    finally:
        listener.join(_PATIENCE)


def _spawn(
    words: tuple[str, ...],
    *,
    cwd: Path | None,
    env: Mapping[str, str] | None,
    stdin: int | IO[bytes],
    limits: ResourceLimits,
    merge: bool,
    handing: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start the trampoline that becomes the program."""
    environment = dict(scrubbed() if env is None else env)
    if shutil.which(words[0], path=environment.get("PATH")) is None:
        raise EnvironmentFailure(
            f"the program {words[0]!r} is not there",
            hint="install it and make sure that PATH finds it",
        )
    settings: dict[str, object] = {
        "parent": os.getpid(),
        "memory_bytes": limits.memory_bytes,
        "jail": limits.jail and asdict(limits.jail),
    }
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(_TRAMPOLINE), json.dumps(settings), *words],
        cwd=cwd,
        env=environment,
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if merge else subprocess.PIPE,
        start_new_session=True,
        pass_fds=tuple(handing),
    )


@contextlib.contextmanager
def _stdin(content: bytes | None, *, hold: bool) -> Iterator[int | IO[bytes]]:
    """Give a program nothing, some bytes, or a pipe that stays open for as long as we live."""
    if content is not None:
        # A file, not a pipe: a program that does not read cannot block us.
        with tempfile.TemporaryFile() as file:
            file.write(content)
            file.seek(0)
            yield file
    elif hold:
        reading, writing = os.pipe()
        try:
            yield reading
        finally:
            os.close(reading)
            os.close(writing)
    else:
        yield subprocess.DEVNULL


@contextlib.contextmanager
def _ended(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End the whole group when the block ends; politely first where the leader still runs."""
    try:
        yield
    finally:
        try:
            if not _exited(process, 0):
                _signal_group(process, signal.SIGTERM)
                _exited(process, _PATIENCE)
        finally:
            # The leader is not reaped yet, so its number cannot mean another group.
            _signal_group(process, signal.SIGKILL)
            process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)


def _exited(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for the leader's end without reaping it."""
    if process.returncode is not None:
        return True
    until = time.monotonic() + seconds
    flags = os.WEXITED | os.WNOWAIT | os.WNOHANG
    while os.waitid(os.P_PID, process.pid, flags) is None:
        if time.monotonic() >= until:
            return False
        time.sleep(0.02)
    return True


def _returncode(
    process: subprocess.Popen[bytes], words: tuple[str, ...], tail: Sequence[str]
) -> int:
    code = process.wait()
    if code == _NOT_STARTED and tail and tail[-1].startswith("cannot start"):
        raise EnvironmentFailure(
            f"{_name(words)} could not be started: {tail[-1]}",
            hint="see that the file is a program for this machine",
        )
    return code


def _name(words: Sequence[str]) -> str:
    return Path(words[0]).name
