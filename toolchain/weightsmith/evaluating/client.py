"""Asking a server: its health, its models and how they are asked, many questions, kept answers."""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import httpx

from weightsmith.core.errors import CheckFailed, InputRefused, UsageError, WeightsmithError
from weightsmith.core.network import DeadlineTransport
from weightsmith.core.ports import Endpoint, Progress
from weightsmith.core.safe_parse import RECORD, content, parse
from weightsmith.core.values import Json, JsonValue, key_of
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.pictures import Picture
from weightsmith.evaluating.session import NoAnswer, ServerSession, Unanswered, died, excerpt

_POLL_SECONDS = 0.05
_PROBE_SECONDS = 5.0
_DATED = re.compile(r"-\d{4}-\d\d-\d\d")
"""Date suffix that hosted servers append to a model's name."""
_CHATML = "message.role + '\n' + message.content + '<|im_end|>\n'"
"""In the template that llama.cpp shows for a model without one; nobody else writes it so."""
_MOST_REFUSED = 8
"""Refusals before the first answer that end the questions: the server refuses all of them."""
_MOST_SILENT = 2
"""Questions in a row without an answer that end the questions: each takes minutes."""
_BEGIN = b'\n["sha256:'

Ask = Callable[[Item], Mapping[str, JsonValue]]


def wait_until_healthy(
    endpoint: Endpoint, health_path: str, limit_seconds: float, *, poll: float = _POLL_SECONDS
) -> float:
    """Wait until the health path returns 200; return the seconds waited.

    Raises CheckFailed with the server's last log lines if it stops or the time is up.
    """
    started = time.monotonic()
    last = "no response"
    transport = DeadlineTransport()
    with httpx.Client(base_url=endpoint.url, transport=transport, trust_env=False) as http:
        while (waited := time.monotonic() - started) < limit_seconds:
            if not endpoint.alive():
                raise died(endpoint, f"before it was ready, after {waited:.1f} s")
            try:
                # Only read the status: the body may be endless.
                with transport.within(_PROBE_SECONDS), http.stream("GET", health_path) as answer:
                    status = answer.status_code
            except httpx.HTTPError as error:
                last = type(error).__name__
            else:
                if status == httpx.codes.OK:
                    return time.monotonic() - started
                last = f"the last response was HTTP {status}"
            time.sleep(poll)
    lines = endpoint.logs(15).strip()
    raise CheckFailed(
        f"the server was not ready after {limit_seconds:g} s: {last}"
        + (f"\n{lines}" if lines else ""),
        hint="a large model on a slow disk may need more time",
    )


def check_served_name(session: ServerSession, served_name: str) -> None:
    """Raise CheckFailed unless the server lists the model."""
    names = served_names(session)
    if served_name not in names:
        raise CheckFailed(
            f"the server does not serve {served_name!r}, but {', '.join(names) or 'nothing'}",
            hint="check the port and the image",
        )


def served_names(session: ServerSession) -> list[str]:
    """Return the names of the server's models."""
    rows = session.get("/v1/models").get("data")
    if not isinstance(rows, list):
        return []
    return [str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row]


_EXACT = 1 << 53
"""Up to which JSON's numbers are exact in every reader."""


def weight_bytes(session: ServerSession) -> int:
    """Return the bytes of its model's tensors as a server says them; 0 if it does not.

    llama.cpp does (`meta` in tools/server/server-context.cpp): they depend on the file alone.
    """
    rows: Json = []
    with suppress(WeightsmithError, ValueError, LookupError, TypeError):
        rows = parse(session.try_get("/v1/models").text)["data"]
    for row in rows if isinstance(rows, list) else []:
        meta = row.get("meta") if isinstance(row, dict) else None
        size = meta.get("size") if isinstance(meta, dict) else None
        if type(size) is int and 0 < size <= _EXACT:
            return size
    return 0


def first_name(session: ServerSession) -> str:
    """Return the server's first model; raise CheckFailed if it lists none."""
    names = served_names(session)
    if not names:
        raise CheckFailed(
            f"{session.endpoint.shown}/v1/models lists no model",
            hint="check that the server is OpenAI-compatible, or name the model with --served-name",
        )
    return names[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model by its name on a server, and how it is asked: chats or plain prompts."""

    name: str
    chat: bool = True
    """Whether it has a chat template; without one it gets plain prompts, as the references do."""

    @property
    def path(self) -> str:
        """The path of requests."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, item: Item, max_tokens: int, *, stream: bool = False) -> dict[str, JsonValue]:
        """Return the body of a greedy request; raise InputRefused for a chat without a template."""
        return {
            "model": self.name,
            **self.question(item),
            "max_tokens": max_tokens,
            "temperature": 0.0,
            "top_p": 1.0,
            "seed": 0,
            "stream": stream,
        }

    def question(self, item: Item) -> dict[str, JsonValue]:
        """Return the part of a body that asks; raise InputRefused for a chat without a template."""
        if self.chat:
            messages: JsonValue = item.in_parts(_sent_part)
            tools = {"tools": parse(item.tools), "tool_choice": "auto"} if item.tools else {}
            return {"messages": messages, **tools}
        if len(item.messages) != 1 or item.pictures:
            has = "a picture" if item.pictures else f"{len(item.messages)} messages"
            raise InputRefused(
                f"the model has no chat template, but a question has {has}",
                hint="give plain prompts, or add chat_template.jinja to the model or the adapter",
            )
        return {"prompt": item.prompt}

    def text(self, choice: Json, *, stream: bool = False) -> Json:
        """Return the text of a response's choice; raise KeyError or TypeError if it has none."""
        if not self.chat:
            return choice["text"]
        if not stream:
            return choice["message"]["content"]
        delta = choice["delta"] or {}
        return delta.get("content") or thoughts_of(delta)


def _sent_part(picture: Picture) -> JsonValue:
    return {"type": "image_url", "image_url": {"url": picture.url()}}


def thoughts_of(message: Mapping[str, Json]) -> str:
    """Return the thoughts that a server took out of an answer, or of a piece of one."""
    said = message.get("reasoning_content") or message.get("reasoning")
    return said if isinstance(said, str) else ""


def find_served(session: ServerSession, name: str, *, may_ask: bool = True) -> Served:
    """Return a model on a running server; the server says whether it has a chat template.

    llama.cpp shows its own default in /props; other servers refuse a chat without a template,
    which is tried if `may_ask`. Without it, such a server is taken to have one.
    """
    shown = session.try_get("/props")
    try:
        template = parse(shown.text)["chat_template"]
    except (ValueError, KeyError, TypeError):
        template = None
    if isinstance(template, str) and template:
        return Served(name=name, chat=_CHATML not in template)
    served = Served(name=name)
    if not may_ask:
        return served
    hello = Item(messages=({"role": "user", "content": "Hello"},), expected=("",), line=0)
    answer = session.try_post(served.path, served.body(hello, 1))
    refused = 400 <= answer.status < 500 and "template" in answer.text.lower()
    return Served(name=name, chat=not refused)


def ask(
    session: ServerSession, served: Served, item: Item, max_tokens: int
) -> Mapping[str, JsonValue]:
    """Send a greedy request; return `{answer, finish_reason}`, and `prompt_tokens` if known.

    Raises CheckFailed, after retries if useful, if the server fails, hangs or stops, or if its
    response is truncated, too large, without a text or from another model.
    """
    answer = session.post(served.path, served.body(item, max_tokens))
    require_model(session, served.path, answer, served.name)
    try:
        choice = answer["choices"][0]
        text = served.text(choice)
        if not isinstance(text, str | None):  # null where there are calls or thoughts alone
            raise TypeError
    except (KeyError, IndexError, TypeError):
        raise session.unanswered(
            served.path, f"the response has no text: {excerpt(json.dumps(answer))}"
        ) from None
    usage = answer.get("usage")
    counted = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    return {
        # JSON can contain lone surrogates, which UTF-8 cannot.
        "answer": (text or "").encode("utf-8", "replace").decode(),
        "finish_reason": choice.get("finish_reason"),
        **_found_by_parsers(choice, item, served),
        **({"prompt_tokens": counted} if type(counted) is int else {}),
    }


def require_model(session: ServerSession, path: str, answer: Mapping[str, Json], name: str) -> None:
    """Raise CheckFailed if an answer says that another model gave it."""
    said = answer.get("model")
    if isinstance(said, str) and said != name:
        rest = said.removeprefix(name)
        if rest == said or not _DATED.fullmatch(rest):
            raise session.failed(path, f"requested model {name!r}, but {said!r} answered")


def _found_by_parsers(choice: Json, item: Item, served: Served) -> Mapping[str, JsonValue]:
    """Return what a server took out of an answer: `thoughts`, and `calls` where it has tools."""
    message = choice.get("message") or {}
    said = thoughts_of(message)
    found: dict[str, JsonValue] = {"thoughts": said} if said else {}
    if item.tools and served.chat:  # else it was told of none
        rows = message.get("tool_calls")
        found["calls"] = [
            {"name": f.get("name"), "arguments": f.get("arguments")}
            for row in (rows if isinstance(rows, list) else [])
            if isinstance(row, dict) and isinstance(f := row.get("function"), dict)
        ]
    return found


def ask_all(
    items: Sequence[Item], ask: Ask, progress: Progress, *, concurrency: int = 1
) -> tuple[Mapping[str, JsonValue], ...]:
    """Return the answers in order, each with the `seconds` that it took, or once took.

    One at a time by default, because batching changes the order of sums in a server and so answers
    that are nearly tied. If `ask` raises, the remaining items are not asked.
    """

    def timed(item: Item) -> Mapping[str, JsonValue]:
        began = time.monotonic()
        said = ask(item)
        return {"seconds": round(time.monotonic() - began, 4), **said}

    answers = []
    with _in_order(timed, items, concurrency) as given:
        for number, answer in enumerate(given, start=1):
            answers.append(answer)
            progress.advance(number, len(items), "items")
    return tuple(answers)


@contextmanager
def _in_order(
    ask: Ask, items: Sequence[Item], concurrency: int
) -> Iterator[Iterator[Mapping[str, JsonValue]]]:
    """Yield the answers in order, of `concurrency` calls at once and a few calls ahead."""
    if concurrency <= 1:
        yield map(ask, items)
        return
    with ThreadPoolExecutor(concurrency) as pool:

        def ahead() -> Iterator[Mapping[str, JsonValue]]:
            waiting = iter(items)
            pending = [pool.submit(ask, item) for item in islice(waiting, 4 * concurrency)]
            while pending:
                yield pending.pop(0).result()
                pending += [pool.submit(ask, item) for item in islice(waiting, 1)]

        try:
            yield ahead()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


class Refusals:
    """Takes a question without an answer as answered wrongly, if the server answers others.

    Several threads may ask.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answered = False
        self._failed: list[NoAnswer] = []
        self._silent = 0

    def around(self, ask: Ask) -> Ask:
        """Return what gives `{answer, finish_reason, error}` for a question without an answer.

        It raises NoAnswer once the server has refused many and answered none, or hung or failed on
        several in a row.
        """

        def asked(item: Item) -> Mapping[str, JsonValue]:
            try:
                said = ask(item)
            except NoAnswer as error:
                refused = isinstance(error, Unanswered)
                with self._lock:
                    self._failed.append(error)
                    self._silent = 0 if refused else self._silent + 1
                    if self._silent >= _MOST_SILENT:
                        raise
                    if not self._answered and len(self._failed) > _MOST_REFUSED:
                        raise
                return {"answer": "", "finish_reason": "error", "error": error.reason}
            with self._lock:
                self._answered, self._silent = True, 0
            return said

        return asked

    def require_an_answer(self) -> None:
        """Raise the first failure if no question was answered."""
        if self._failed and not self._answered:
            raise self._failed[0]


class KeptAnswers:
    """A file of JSON lines `[key, answer]`, for the run that goes on with the other questions.

    Several threads may add to it. A key is that of the question and of all of the request that the
    server is told. Whether it is the same model is for the user to know: a URL does not say. A line
    that was cut off counts as none. Raises UsageError for a file that cannot be read or has other
    lines.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._found: dict[str, Mapping[str, JsonValue]] = {}
        try:
            data = content(path, RECORD) if path.exists() else b""
            os.close(self._open())  # now, and not after the first answer
            if data and not data.startswith(_BEGIN):
                raise ValueError("it has other lines")
        except (OSError, ValueError) as error:
            raise UsageError(
                f"--answers {path}: {error}",
                hint="give a new file, or one that `evaluate --answers` wrote",
            ) from None
        for line in data.splitlines():
            with suppress(ValueError, TypeError, KeyError):
                key, answer = parse(line)
                if isinstance(key, str) and isinstance(answer["answer"], str):
                    self._found[key] = answer

    def around(self, ask: Ask, about: JsonValue) -> Ask:
        """Return what asks only questions without an answer, and writes each answer down."""

        def asked(item: Item) -> Mapping[str, JsonValue]:
            more = [one for one in (item.tools, item.parts) if one]
            chat: JsonValue = item.asks if item.pictures else [dict(m) for m in item.messages]
            key = key_of([about, chat, item.choices, item.plain, *more])
            if key in self._found:
                return self._found[key]
            began = time.monotonic()
            said = {**ask(item), "seconds": round(time.monotonic() - began, 4)}
            # The line before may be incomplete, if that process was killed.
            line = "\n" + json.dumps([key, said])
            with self._lock:
                handle = self._open()
                try:
                    os.write(handle, line.encode())
                finally:
                    os.close(handle)
            return said

        return asked

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
