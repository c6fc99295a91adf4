"""Which of vLLM's own parsers read back the calls and thoughts that a chat template writes.

The engine's packages take the place of the builder's, in this process alone. They are those of the
image for CPUs; images for GPUs have the same parsers. Written against vLLM 0.32.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

from weightsmith.core import time_limits
from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.jobs import ReadCallsJob, Row
from weightsmith.core.safe_parse import parse
from weightsmith.core.time_limits import cpu_limit
from weightsmith.core.values import JsonValue
from weightsmith.models.templates import render_chat
from weightsmith.worker.wire import Report

_Delta = TypeVar("_Delta")
_ASKED = {"role": "user", "content": "?"}


def read_calls_back(job: ReadCallsJob, report: Report) -> Mapping[str, JsonValue]:
    """Return `read`: by parser and chat, how its calls were read, whole or streamed or both.

    And `thoughts`: by parser of them, how they were read; `skipped`: by chat, why it was not tried.
    Raises EnvironmentFailure if the engine's packages cannot be loaded here.
    """
    _take_packages(job.packages.path, job.output)
    try:
        reader = _Reader.of(job)
    except Exception as error:  # noqa: BLE001 - whatever libraries of another environment raise
        raise EnvironmentFailure(
            f"vLLM's parsers cannot be loaded: {type(error).__name__}: {str(error)[:300]}",
            hint="name the parser: serve.tool_parser",
        ) from None
    texts: dict[str, str] = {}
    skipped: dict[str, JsonValue] = {}
    for chat in job.chats:
        try:
            text = reader.answer(chat)
            if chat.get("thoughts") and reader.split is None:
                raise ValueError("there is no parser for thoughts")
            texts[str(chat["name"])] = text
        except Exception as error:  # noqa: BLE001 - templates raise what they like
            skipped[str(chat["name"])] = str(error)[:200]
    read: dict[str, JsonValue] = {}
    for number, name in enumerate(job.parsers, start=1):
        report(number, len(job.parsers), "parsers")
        read[name] = {
            str(chat["name"]): reader.read(name, texts[str(chat["name"])], chat)
            for chat in job.chats
            if chat["name"] in texts
        }
    thoughts: dict[str, JsonValue] = {}
    if job.reasoners:
        try:
            text = reader.answer(job.thinking)
        except Exception as error:  # noqa: BLE001 - as above
            skipped["thoughts"] = str(error)[:200]
        else:
            thoughts = {name: reader.thought(name, text, job.thinking) for name in job.reasoners}
    return {"read": read, "thoughts": thoughts, "skipped": skipped}


def _take_packages(folder: Path, scratch: Path) -> None:
    """Let imports find the engine's packages, and ours, but no others."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    if version not in folder.parts:
        raise EnvironmentFailure(
            f"vLLM's packages in {folder} are not for this builder's {version}",
            hint="name the parser: serve.tool_parser",
        )
    kept = [path for path in sys.path if not path.endswith(("site-packages", "dist-packages"))]
    sys.path[:] = [*kept, str(folder)]
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"):
        os.environ[name] = str(scratch)
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reader:
    """The model's tokenizer, and the engine's parsers; their types are in another environment."""

    tokenizer: Any
    tools: Sequence[Row]
    request: Any
    calls: Any
    """The class of a parser of calls, by its name."""
    reasoners: Any
    """The same of thoughts."""
    split: Callable[[str], tuple[str | None, str | None]] | None
    """Thoughts and the rest of an answer; None without a parser for them."""

    @classmethod
    def of(cls, job: ReadCallsJob) -> _Reader:
        chat = importlib.import_module("vllm.entrypoints.openai.chat_completion.protocol")
        calls = importlib.import_module("vllm.tool_parsers").ToolParserManager
        thoughts = importlib.import_module("vllm.reasoning").ReasoningParserManager
        # Code of the model's own is never run: it is the default, and said again.
        tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(
            str(job.model.path), trust_remote_code=False, local_files_only=True
        )
        request = chat.ChatCompletionRequest(model="m", messages=[_ASKED], tools=list(job.tools))
        split = None
        if job.thoughts:
            kind = thoughts.get_reasoning_parser(job.thoughts)

            def split(text: str) -> tuple[str | None, str | None]:
                found: tuple[str | None, str | None] = kind(tokenizer).extract_reasoning(
                    text, request
                )
                return found

        return cls(
            tokenizer=tokenizer,
            tools=job.tools,
            request=request,
            calls=calls.get_tool_parser,
            reasoners=thoughts.get_reasoning_parser,
            split=split,
        )

    def rendered(self, *said: Row, begins: bool = False) -> str:
        tools = json.dumps(list(self.tools))
        return render_chat(self.tokenizer, [_ASKED, *said], answer=begins, tools=tools)

    def answer(self, chat: Row) -> str:
        """Return what the model would have to write for this message; ValueError if unknown."""
        prompt, whole = self.rendered(begins=True), self.rendered(chat["said"])
        if not whole.startswith(prompt):
            raise ValueError("the template writes it otherwise than a new answer")
        plain = self.rendered({"role": "assistant", "content": "It rains."})
        same = zip(reversed(whole), reversed(plain), strict=False)
        end = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], same))
        text = whole[len(prompt) : len(whole) - end]
        thoughts = str(chat.get("thoughts", ""))
        if thoughts and thoughts not in text:
            raise ValueError("the template leaves thoughts out")
        return text

    def read(self, name: str, text: str, chat: Row) -> list[JsonValue]:
        """Return how a parser reads the calls of an answer, exactly: whole, streamed, or both."""
        ways: dict[str, Callable[[], JsonValue]] = {"whole": lambda: self._whole(name, text, chat)}
        if not chat.get("thoughts"):  # a stream of both is put together by the server
            ways["streamed"] = lambda: self._streamed(name, text)
        return _ways(ways, chat["calls"])

    def thought(self, name: str, text: str, chat: Row) -> list[JsonValue]:
        """Return how a parser reads the thoughts before an answer: whole, streamed, or both."""

        def whole() -> JsonValue:
            found = self.reasoners(name)(self.tokenizer).extract_reasoning(text, self.request)
            return [(one or "").strip() for one in found]

        def streamed() -> JsonValue:
            parser, thoughts, content = self.reasoners(name)(self.tokenizer), "", ""
            for delta in self._pieces(text, parser.extract_reasoning_streaming):
                thoughts += getattr(delta, "reasoning", None) or ""
                content += delta.content or ""
            return [thoughts.strip(), content.strip()]

        ways: dict[str, Callable[[], JsonValue]] = {"whole": whole, "streamed": streamed}
        return _ways(ways, [chat["thoughts"], chat["said"]["content"]])

    def _whole(self, name: str, text: str, chat: Row) -> JsonValue:
        body = text
        if chat.get("thoughts") and self.split:
            said, rest = self.split(text)
            if str(said).strip() != chat["thoughts"]:
                return None
            body = rest or ""
        parser = self.calls(name)(self.tokenizer, self.request.tools)
        calls = parser.extract_tool_calls(body, self.request).tool_calls or []
        return [[one.function.name, parse(one.function.arguments)] for one in calls]

    def _streamed(self, name: str, text: str) -> JsonValue:
        """Return the calls that a client would put together, of an answer token by token."""
        parser = self.calls(name)(self.tokenizer, self.request.tools)
        names: dict[int, str] = {}
        given: dict[int, str] = {}
        for delta in self._pieces(text, parser.extract_tool_calls_streaming, self.request):
            for call in delta.tool_calls or []:
                function = call.function
                if function and function.name:
                    names[call.index] = function.name
                if function and function.arguments:
                    given[call.index] = given.get(call.index, "") + function.arguments
        return [[names[number], parse(given.get(number) or "{}")] for number in sorted(names)]

    def _pieces(self, text: str, reads: Callable[..., _Delta], *others: object) -> Iterator[_Delta]:
        """Yield what a parser makes of each token of an answer."""
        before, seen, new = "", list[int](), list[int]()
        for one in self.tokenizer.encode(text, add_special_tokens=False):
            new.append(one)
            now = self.tokenizer.decode([*seen, *new], skip_special_tokens=False)
            if now.endswith("\ufffd"):  # a letter that is not whole yet: servers wait for the rest
                continue
            delta = reads(before, now, now[len(before) :], seen, [*seen, *new], new, *others)
            before, seen, new = now, [*seen, *new], []
            if delta:
                yield delta


def _ways(ways: Mapping[str, Callable[[], JsonValue]], wanted: JsonValue) -> list[JsonValue]:
    """Return in which ways an answer is read exactly."""
    found: list[JsonValue] = []
    for way, reads in ways.items():
        try:
            with cpu_limit(time_limits.FOREIGN_SECONDS):  # patterns may take forever on a text
                if reads() == wanted:
                    found.append(way)
        except Exception:  # noqa: BLE001, S112 - a parser that fails does not read it
            continue
    return found
