"""Smoke test of a started image: checks on the running server before publishing.

What users will do: chat, streaming, a prompt that is too long, the planned number of requests at
once, log-probabilities, SIGTERM while it answers, restart. vLLM without a compiler crashed on
log-probabilities although it said that it was healthy.
"""

from __future__ import annotations

import struct
import time
import zlib
from base64 import b64encode
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event

from weightsmith.core.errors import CheckFailed, WeightsmithError
from weightsmith.core.ports import Endpoint
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import JsonValue
from weightsmith.evaluating.client import Served, ask, check_served_name, wait_until_healthy
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.round_trip import read_back, thoughts_read_back
from weightsmith.evaluating.session import Refused, ServerSession, TryAgain, died, excerpt
from weightsmith.evaluating.tool_calls import ANOTHER_PARSER, read_calls, without_thoughts
from weightsmith.models.task import ModelTask

PICTURE = "picture"
"""Name of the check with a picture; what it saw begins with REFUSED if the server takes none."""
REFUSED = "refused"
_GREETING = Item(messages=({"role": "user", "content": "Hello"},), expected=("",), line=0)
_SHORT, _LONG = 8, 256
MOST_AT_ONCE = 64
_PIXELS = 64
"""Width and height of the picture."""
_STOP_SECONDS = 10.0
"""Default timeout of `docker stop`; an idle server must have ended by then."""
_TRIES = 3
"""How often a server is stopped at most to see how it ends."""
_RUNNING, _RUNNING_SLOWLY = 64, 8
"""Tokens of an answer that SIGTERM interrupts, and of one whose server takes a second for each."""
_CLEAN_ENDS = frozenset({0, 143, -15})
"""Exit codes after SIGTERM: handled, or the signal's default action."""
_CLEAR = ("context", "token", "length", "long")


CHATS = ModelTask(kind="generate")


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """The image's plan: the model and how it is asked, health path, limits."""

    served: Served
    health_path: str
    max_model_len: int
    max_num_seqs: int
    start_seconds: float
    sees: bool = False
    """Whether the model reads pictures."""
    parts: bool = True
    """Whether the chat template takes contents in parts, as a message with a picture has."""
    calls: bool = False
    """Whether the server reads tool calls out of answers."""
    fitting: tuple[str, ...] | None = None
    """Parsers of calls that its template is marked for; None if the server reads no tokens."""
    fitting_thoughts: tuple[str, ...] | None = None
    """The same of thoughts."""
    thinks: bool = False
    """Whether it has a parser for thoughts."""
    task: ModelTask = CHATS
    """What the model is asked for."""
    width: int = 0
    """Numbers of a vector; 0 if that is not known."""
    grace_seconds: float = 0
    """How long running requests may take after SIGTERM; 0 if the server does not wait for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """How a server whose model does not chat is asked; both return what was seen."""

    once: Callable[[ServerSession, Promise], str]
    end: Callable[[ServerSession, Callable[[float], int | None], Promise], str]
    """Stops the server during a request."""


@dataclass(slots=True)
class Smoke:
    """Results of the checks: name, observation, seconds."""

    checks: list[Mapping[str, JsonValue]] = field(default_factory=list)

    def check(self, name: str, session: ServerSession, look: Callable[[], str]) -> None:
        """Run a check and record its result; raise CheckFailed with its name if it fails."""
        began = time.monotonic()
        try:
            seen = look()
        except WeightsmithError as error:
            message = f"smoke test {name!r} failed: {error.message}"
            # Errors of the session already include the log.
            log = "" if session.log() in error.message else session.log()
            raise CheckFailed(message + log, hint=error.hint) from None
        seconds = round(time.monotonic() - began, 3)
        self.checks.append({"name": name, "seen": seen, "seconds": seconds})


def check_serving(smoke: Smoke, session: ServerSession, promise: Promise) -> None:
    """Check a healthy server: model list, chat, streaming, context limit, concurrency, logprobs.

    A vision model gets a picture, too.

    Raises CheckFailed with the check's name and the server's last log lines.
    """
    served = promise.served

    def listed() -> str:
        check_served_name(session, served.name)
        return f"serves {served.name}"

    smoke.check("model list", session, listed)
    smoke.check("chat", session, lambda: _chat(session, served))
    smoke.check("streaming", session, lambda: _stream(session, served))
    smoke.check("end of answer", session, lambda: _end(session, served))
    smoke.check("context limit", session, lambda: _context(session, served, promise.max_model_len))
    count = min(promise.max_num_seqs, MOST_AT_ONCE)
    smoke.check(
        f"{count} requests at once", session, lambda: _concurrent_requests(session, served, count)
    )
    smoke.check("log-probabilities", session, lambda: _logprobs(session, served))
    if promise.calls:
        smoke.check("tools", session, lambda: _tools(session, served))
    if (fitting := promise.fitting) is not None:
        smoke.check("calls read back", session, lambda: read_back(session, served, fitting))
    if (marked := promise.fitting_thoughts) is not None:
        smoke.check(
            "thoughts read back",
            session,
            lambda: thoughts_read_back(session, served, marked, promise.fitting),
        )
    if promise.thinks:
        smoke.check("thoughts", session, lambda: _thoughts(session, served))
    if promise.sees:
        smoke.check(PICTURE, session, lambda: _picture(session, promise))


def check_life(
    smoke: Smoke, endpoint: Endpoint, promise: Promise, asking: Asking | None = None
) -> None:
    """Stop the server with SIGTERM while it answers, restart it, and send another request.

    `asking` says how, of a model that does not chat. Does nothing if the launcher does not support
    this.
    """
    if endpoint.stop is None or endpoint.restart is None:
        return
    stop, restart = endpoint.stop, endpoint.restart

    def ends() -> str:
        tries, current = _TRIES, endpoint
        while True:
            with ServerSession(current) as session:
                try:
                    if asking and promise.grace_seconds:
                        return asking.end(session, stop, promise)
                    return _ended(smoke, session, stop, promise)
                except CameLate:
                    if not (tries := tries - 1):
                        raise
            current = restart()
            wait_until_healthy(current, promise.health_path, promise.start_seconds)

    with ServerSession(endpoint) as session:
        smoke.check("SIGTERM", session, ends)
    again = restart()
    with ServerSession(again) as session:

        def answers() -> str:
            waited = wait_until_healthy(again, promise.health_path, promise.start_seconds)
            if asking:
                asking.once(session, promise)
            else:
                _chat(session, promise.served)
            return f"ready after {waited:.1f} s"

        smoke.check("restart", session, answers)


def _chat(session: ServerSession, served: Served) -> str:
    answer = _said(ask(session, served, _GREETING, _SHORT))
    if not answer:
        raise CheckFailed(
            f"{session.endpoint.shown}{served.path}: empty answer to 'Hello'",
            hint="check that the checkpoint has its chat template",
        )
    return excerpt(answer)


def _said(answer: Mapping[str, JsonValue]) -> str:
    """Return what a server answered; of one that was cut off while it thought, its thoughts."""
    return str(answer["answer"]).strip() or str(answer.get("thoughts", "")).strip()


def _stream(session: ServerSession, served: Served) -> str:
    pieces, done = list[str](), False
    try:
        with session.events(served.path, served.body(_GREETING, _SHORT, stream=True)) as events:
            for event in events:
                if event == "[DONE]":
                    done = True
                    break
                value = parse(event)
                rows = (value.get("choices") if isinstance(value, dict) else None) or []
                try:
                    texts = [served.text({"text": "", "delta": {}, **r}, stream=True) for r in rows]
                except (AttributeError, TypeError):
                    raise Refused(f"an event has no list of choices: {excerpt(event)}") from None
                pieces += filter(None, texts)
    except (TryAgain, Refused, ValueError) as error:
        if not session.endpoint.alive():
            raise died(session.endpoint, "while streaming") from None
        raise session.failed(served.path, f"streaming: {error}") from None
    if not pieces or not done:
        what = "no [DONE] at the end" if pieces else "no text"
        raise session.failed(served.path, f"streaming: {what}")
    return f"{len(pieces)} pieces"


def _end(session: ServerSession, served: Served) -> str:
    answer = ask(session, served, _GREETING, _LONG)
    if answer["finish_reason"] == "stop":
        return "the answer ends by itself"
    return f"the answer to 'Hello' did not end within {_LONG} tokens"


def _context(session: ServerSession, served: Served, max_model_len: int) -> str:
    # At least one token per word with any vocabulary.
    words = " ".join(f"word {number % 10}" for number in range(max_model_len // 2 + 32))
    item = Item(messages=({"role": "user", "content": words},), expected=("",), line=0)
    answer = session.try_post(served.path, served.body(item, 1))
    said = excerpt(answer.text)
    if not 400 <= answer.status < 500:
        raise session.failed(
            served.path,
            f"a prompt longer than {max_model_len} tokens got HTTP {answer.status} instead of an"
            f" error: {said}",
        )
    if not any(word in answer.text.lower() for word in _CLEAR):
        raise session.failed(served.path, f"the error for a long prompt does not say why: {said}")
    if not session.endpoint.alive():
        raise session.failed(served.path, "the server stopped after a too long prompt")
    return f"HTTP {answer.status}: {said}"


def _concurrent_requests(session: ServerSession, served: Served, count: int) -> str:
    with ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(ask, session, served, _GREETING, _SHORT) for _ in range(count)]
        empty = sum(not _said(one.result()) for one in asked)
    if empty:
        raise session.failed(
            served.path, f"{empty} of {count} concurrent requests got an empty answer"
        )
    return f"{count} answers"


def _logprobs(session: ServerSession, served: Served) -> str:
    # A server may not support them, but must not fail.
    wanted = {"logprobs": True, "top_logprobs": 1} if served.chat else {"logprobs": 1}
    asked = {**served.body(_GREETING, 1), **wanted}
    answer = session.try_post(served.path, asked)
    if answer.status >= 500 or not session.endpoint.alive():
        raise session.failed(served.path, f"log-probabilities: HTTP {answer.status}")
    return "supported" if answer.status == 200 else f"HTTP {answer.status}: {excerpt(answer.text)}"


_WEATHER: JsonValue = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


def _tools(session: ServerSession, served: Served) -> str:
    """Offer a tool: the server must take it, and leave no call in the text of its answer."""
    asked = {"role": "user", "content": "What is the weather in Rome? Use the tool."}
    body = served.body(_GREETING, _RUNNING)
    body |= {"messages": [asked], "tools": _WEATHER, "tool_choice": "auto"}
    answer = session.try_post(served.path, body)
    if answer.status != 200:
        raise session.failed(served.path, f"tools got HTTP {answer.status}: {excerpt(answer.text)}")
    try:
        message = parse(answer.text)["choices"][0]["message"]
        text, calls = str(message.get("content") or ""), message.get("tool_calls") or []
    except (ValueError, LookupError, TypeError, AttributeError):
        raise session.failed(served.path, f"tools: no answer: {excerpt(answer.text)}") from None
    if read_calls(text, ["get_weather"]):
        raise CheckFailed(
            f"{session.endpoint.shown}{served.path}: the server's parser left a tool call in the"
            f" text: {excerpt(text)}",
            hint=ANOTHER_PARSER,
        )
    return "called the tool" if calls else f"answered without a call: {excerpt(text)}"


def _thoughts(session: ServerSession, served: Served) -> str:
    answer = ask(session, served, _GREETING, _RUNNING)
    text, left = without_thoughts(str(answer["answer"]))
    if left:
        raise session.failed(
            served.path, f"the server's parser left thoughts in the answer: {excerpt(left)}"
        )
    return "apart from the answer" if answer.get("thoughts") else f"none: {excerpt(text)}"


def _picture(session: ServerSession, promise: Promise) -> str:
    served = promise.served
    if not served.chat:
        return "not tried: the model has no chat template"
    address = f"data:image/png;base64,{b64encode(_png()).decode()}"
    parts: JsonValue = [
        {"type": "image_url", "image_url": {"url": address}},
        {"type": "text", "text": "Which colour is this?"},
    ]
    messages: JsonValue = [{"role": "user", "content": parts}]
    body = {**served.body(_GREETING, _SHORT), "messages": messages}
    answer = session.try_post(served.path, body)
    # A chat template for text, or a short context, may refuse pictures; nothing may fail. Only with
    # such a template, vLLM refuses some models' pictures as an error of its own.
    failed = answer.status >= 500 and promise.parts
    if failed or not session.endpoint.alive():
        raise session.failed(served.path, f"a picture got HTTP {answer.status}")
    if answer.status == 200:
        return "answered"
    why = excerpt(answer.text) if promise.parts else "the chat template is for text alone"
    return f"{REFUSED} with HTTP {answer.status}: {why}"


def _png() -> bytes:
    """Return a red square as PNG (RFC 2083), large enough for any tower's patches."""
    rows = (b"\0" + b"\xc0\x20\x20" * _PIXELS) * _PIXELS
    header = struct.pack(">2I5B", _PIXELS, _PIXELS, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _ended(
    smoke: Smoke, session: ServerSession, stop: Callable[[float], int | None], promise: Promise
) -> str:
    """Stop the server while it answers two requests, one of them a stream: both must be whole."""
    if not promise.grace_seconds:
        return f"{stopped(stop(_STOP_SECONDS), _STOP_SECONDS)}; no request was running"
    served = promise.served
    slow = any(c["name"] == "chat" and float(str(c["seconds"])) > _SHORT for c in smoke.checks)
    tokens = _RUNNING_SLOWLY if slow else _RUNNING
    body, streamed = (
        {**served.body(_GREETING, tokens, stream=stream), "ignore_eos": True}
        for stream in (False, True)
    )
    whole, late, sent = False, 0, Event()
    with ThreadPoolExecutor(2) as pool:
        plain = pool.submit(answered, session, served.path, body, sent)
        sent.wait()  # servers accept in this order: once the stream flows, this one is running too
        try:
            with session.events(served.path, streamed) as events:
                next(events, "")
                stopping = pool.submit(stop, promise.grace_seconds)
                for event in events:
                    whole = whole or event == "[DONE]"
                    late += not whole
        except (TryAgain, Refused) as error:
            raise session.failed(served.path, f"SIGTERM cut a stream: {error}") from None
        end = stopped(stopping.result(), promise.grace_seconds)
        if not whole:
            raise session.failed(served.path, f"SIGTERM cut a stream, {late} events later")
        return f"{end}; a stream went on for {late} events, and {plain.result()}"


class CameLate(CheckFailed):
    """A request got HTTP 503 at the end of a server: lost, or it came after SIGTERM.

    A request that is sent first may be read last, on a busy machine.
    """


def answered(session: ServerSession, path: str, body: JsonValue, sent: Event) -> str:
    """Ask once; `sent` is set when the request is on its way, or failed."""
    try:
        answer = session.try_once(path, body, sent.set)
    except TryAgain as error:
        raise session.failed(path, f"SIGTERM lost a request: {error}") from None
    finally:
        sent.set()
    if answer.status != 200:
        failed = session.failed(
            path, f"SIGTERM lost a request: HTTP {answer.status}: {excerpt(answer.text)}"
        )
        if answer.status == 503:
            raise CameLate(failed.message, hint=failed.hint)
        raise failed
    return "a request was answered"


def stopped(code: int | None, seconds: float) -> str:
    """Return how a server ended after SIGTERM; raise CheckFailed if it was not by itself."""
    if code is None:
        raise CheckFailed(
            f"the server is still running {seconds:g} s after SIGTERM",
            hint="a container engine would now kill it, and lose its requests",
        )
    if code not in _CLEAN_ENDS:
        raise CheckFailed(
            f"the server exited with code {code} after SIGTERM", hint="see its last log lines"
        )
    return f"exit code {code}"
