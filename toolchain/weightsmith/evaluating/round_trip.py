"""Whether a started server's parsers read the calls and thoughts that the chat template writes.

No model is asked: the server renders a chat that has calls, and reads the tokens of the last answer
back as if the model had just written them. vLLM (0.32) does both: /tokenize, and /derender if it is
started with `--enable-scale-out`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import NamedTuple

from weightsmith.core.errors import CheckFailed
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Json, JsonValue
from weightsmith.evaluating.client import Served, thoughts_of
from weightsmith.evaluating.session import Answer, ServerSession, excerpt
from weightsmith.evaluating.tool_calls import (
    ANOTHER_PARSER,
    Call,
    calls_text,
    read_calls,
    without_thoughts,
)

_TEXT: JsonValue = {"type": "string"}
_FIELDS: Mapping[str, JsonValue] = {
    "get_weather": {
        "city": _TEXT,
        "days": {"type": "integer"},
        "units": {"type": "array", "items": _TEXT},
        "at": {
            "type": "object",
            "properties": {
                "hour": {"type": "integer"},
                "note": _TEXT,
                "exact": {"type": "boolean"},
            },
        },
    },
    "send": {"to": _TEXT},
}
TOOLS: JsonValue = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": name,
            "parameters": {"type": "object", "properties": fields},
        },
    }
    for name, fields in _FIELDS.items()
]
_WEATHER: Mapping[str, JsonValue] = {
    "city": 'Łódź "old" town',
    "days": 3,
    "units": ["C", "%"],
    "at": {"hour": 7, "note": "first\nsecond", "exact": True},
}
CALLS: Mapping[str, Sequence[Call]] = {
    "a call": (("get_weather", _WEATHER),),
    "two calls": (("get_weather", {"city": "Rome", "days": 1}), ("send", {"to": "a@b.c"})),
}
"""What is rendered and read back: quotes, a line break, other letters and objects in objects."""
_ASKED: Mapping[str, JsonValue] = {"role": "user", "content": "?"}
_PLAIN: Mapping[str, JsonValue] = {"role": "assistant", "content": "It rains."}
_ANSWER: Mapping[str, JsonValue] = {"role": "assistant", "content": "Take the second bridge"}
_THOUGHT = "First I look at the map."
_OPENED: Mapping[str, str] = {
    "<think>": "</think>",
    "[THINK]": "[/THINK]",
    "<seed:think>": "</seed:think>",
}
"""Marks that a prompt may end with, so that an answer begins within thoughts, and their ends."""
_MARK = 12
"""Tokens that such a mark and the white space after it take at most."""
_PIECE = 4
"""Tokens that come at a time where an answer is streamed."""
_SEEN = 64
"""Tokens of the prompt's end, where it may have begun the model's thoughts."""
_MOST = 8192
"""Tokens of a chat that is read back: each piece of a stream is a request."""
_READ = "/v1/chat/completions/derender"
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError)


def read_back(session: ServerSession, served: Served, fitting: Sequence[str]) -> str:
    """Return what the server's parser read of the template's own calls, whole and streamed.

    `fitting` are the parsers whose marks are in the template, the best first. A stream that is read
    otherwise is told, and no more: some of vLLM's parsers read it wrongly (0.32: DeepSeek's), and
    whole answers rightly. Raises CheckFailed if it reads other calls than the text has; a template
    that loses some of them on the way, or that nothing here reads, is told.
    """
    prompt, plain = _rendered(session, served, (), True), _rendered(session, served, _PLAIN)
    if not prompt or not plain:
        return "not tried: the server does not say how the template is tokenized"
    seen = []
    for name, calls in CALLS.items():
        whole = _rendered(session, served, _said(calls))
        if whole is None:
            seen.append(f"{name}: refused by the template, or too long")
            continue
        if whole[: len(prompt)] != prompt:
            seen.append(
                f"{name}: not tried, for the template writes it otherwise than a new answer"
            )
            continue
        ids = _written(prompt, whole, plain)
        answer = session.try_post(_READ, _request(served, prompt, ids, TOOLS, stream=False))
        if answer.status in {403, 404, 405}:
            return f"not tried: the server reads no tokens (HTTP {answer.status})"
        if answer.status != 200:  # as for a short context
            seen.append(f"{name}: not tried (HTTP {answer.status}: {excerpt(answer.text)})")
            continue
        if (found := _read(answer).calls) != list(calls):
            text = _text(session, served, ids)
            if list(read_calls(text, [*_FIELDS])) == list(calls):
                raise _fault(session, text, found, fitting)
            seen.append(f"{name}: read otherwise; the template writes {excerpt(text)}")
            continue
        streamed = _streamed(session, served, prompt, ids, TOOLS).calls
        seen.append(name if streamed == list(calls) else f"{name}: read whole, not in a stream")
    return "; ".join(seen)


def thoughts_read_back(
    session: ServerSession, served: Served, fitting: Sequence[str], of_calls: Sequence[str] | None
) -> str:
    """Return what the server's parser read of thoughts before an answer, and before a call.

    As `read_back`; `fitting` are the parsers of thoughts for the template's marks, `of_calls` those
    of calls, None if the server reads none. Some templates leave the thoughts of earlier answers
    out, and the prompt of a new one opens them: there, what the model would write is put together.
    """
    seen = [f"an answer: {_thoughts_before(session, served, _ANSWER, (), fitting, ())}"]
    if of_calls is not None:
        (calls, *_) = CALLS.values()
        said = _thoughts_before(session, served, _said(calls), calls, fitting, of_calls)
        seen.append(f"a call: {said}")
    return "; ".join(seen)


def _thoughts_before(
    session: ServerSession,
    served: Served,
    said: Mapping[str, JsonValue],
    calls: Sequence[Call],
    fitting: Sequence[str],
    of_calls: Sequence[str],
) -> str:
    tools = TOOLS if calls else ()
    thinking = _thinking(session, served, said, tools)
    if isinstance(thinking, str):
        return thinking
    prompt, ids = thinking
    answer = session.try_post(_READ, _request(served, prompt, ids, tools, stream=False))
    if answer.status != 200:
        return f"not tried (HTTP {answer.status}: {excerpt(answer.text)})"
    wanted = _Said(_THOUGHT, str(said["content"]), list(calls))
    if (found := _read(answer)) != wanted:
        text = _text(session, served, ids)
        own, thoughts = without_thoughts(text)
        read = list(read_calls(own, [*_FIELDS]))
        if thoughts != _THOUGHT or read != list(calls) or not (read or own.strip() == wanted[1]):
            return f"read otherwise; the template writes {excerpt(text)}"
        made = f", and {calls_text(found.calls) if found.calls else 'no call'}" if calls else ""
        key, named = "reasoning_parser", " or ".join(fitting)
        if found.thoughts == _THOUGHT and calls:
            key, named = "tool_parser", " or ".join(of_calls)
        raise CheckFailed(
            f"{session.endpoint.shown}: of {excerpt(text)}, which the chat template writes, the"
            f" server's parser makes the thoughts {found.thoughts!r} and the answer"
            f" {found.content!r}{made}",
            hint=f"the template's marks are those of serve.{key} {named}"
            if named
            else f"name another serve.{key}, or none",
        )
    streamed = _streamed(session, served, prompt, ids, tools)
    return "whole and in a stream" if streamed == wanted else "read whole, not in a stream"


def _thinking(
    session: ServerSession, served: Served, said: Mapping[str, JsonValue], tools: JsonValue
) -> tuple[Sequence[int], Sequence[int]] | str:
    """Return the tokens of a prompt, and of an answer with thoughts; or why there are none."""
    prompt = _rendered(session, served, (), True, tools=tools)
    plain = _rendered(session, served, _PLAIN, tools=tools)
    # Templates name the thoughts in one way or the other.
    thinking = {**said, "reasoning": _THOUGHT, "reasoning_content": _THOUGHT}
    whole = _rendered(session, served, thinking, tools=tools)
    if not prompt or not plain:
        return "not tried: the server does not say how the template is tokenized"
    if whole is None:
        return "not tried: the template refuses a chat with thoughts, or it is too long"
    begins = whole[: len(prompt)] == prompt
    if begins and _THOUGHT in _text(session, served, ids := _written(prompt, whole, plain)):
        return prompt, ids
    opening, mark = _opening(session, served, prompt)
    before = prompt[: len(prompt) - opening]
    if not begins and (not mark or whole[: len(before)] != before):
        return "not tried, for the template writes them otherwise than a new answer"
    rest = _written(before, whole, plain)
    if not mark or mark in _text(session, served, rest):
        return "not tried: the template leaves thoughts out"
    thoughts = _tokens(
        session,
        {
            "model": served.name,
            "prompt": f"{_THOUGHT}\n{_OPENED[mark]}\n\n",
            "add_special_tokens": False,
        },
    )
    return (prompt, [*thoughts, *rest]) if thoughts else "not tried: the server tokenizes no text"


def _opening(session: ServerSession, served: Served, prompt: Sequence[int]) -> tuple[int, str]:
    """Return how many tokens at a prompt's end open thoughts, and their mark; (0, "") if none."""
    end = _text(session, served, prompt[-_MARK:]).rstrip()
    mark = next((one for one in _OPENED if end.endswith(one)), "")
    if mark:
        for count in range(1, _MARK + 1):
            if _text(session, served, prompt[-count:]).strip() == mark:
                return count, mark
    return 0, ""


def _written(prompt: Sequence[int], whole: Sequence[int], plain: Sequence[int]) -> Sequence[int]:
    """Return the tokens of an answer: after the prompt, and before the end of every chat."""
    same = zip(reversed(whole), reversed(plain), strict=False)
    end = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], same))
    return whole[len(prompt) : len(whole) - end]


class _Said(NamedTuple):
    """What a client gets of an answer."""

    thoughts: str
    content: str
    calls: list[Call]


_NOTHING = _Said("", "", [])


def _rendered(
    session: ServerSession,
    served: Served,
    said: Mapping[str, JsonValue] | tuple[()],
    begins: bool = False,
    tools: JsonValue = TOOLS,
) -> list[int] | None:
    """Return a chat's tokens, with the beginning of an answer if `begins`; None if refused."""
    body: JsonValue = {
        "model": served.name,
        "messages": [_ASKED, *([said] if said else [])],
        **({"tools": tools} if tools else {}),
        "add_generation_prompt": begins,
    }
    return _tokens(session, body)


def _tokens(session: ServerSession, body: JsonValue) -> list[int] | None:
    """Return the tokens of a chat or a text; None if they are refused, none, or too many."""
    answer = session.try_post("/tokenize", body)
    try:
        found = [int(one) for one in parse(answer.text)["tokens"]] if answer.status == 200 else []
        return found if 0 < len(found) <= _MOST else None
    except _MALFORMED:
        return None


def _said(calls: Sequence[Call]) -> Mapping[str, JsonValue]:
    made: list[JsonValue] = [
        {
            "id": f"call{number:05}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(given, ensure_ascii=False)},
        }
        for number, (name, given) in enumerate(calls)
    ]
    return {"role": "assistant", "content": "", "tool_calls": made}


def _request(
    served: Served, prompt: Sequence[int], ids: Sequence[int], tools: JsonValue, *, stream: bool
) -> dict[str, JsonValue]:
    chat: JsonValue = {
        "model": served.name,
        "messages": [_ASKED],
        **({"tools": tools, "tool_choice": "auto"} if tools else {}),
    }
    choice: JsonValue = {
        "index": 0,
        "token_ids": list(ids),
        "finish_reason": None if stream else "stop",
    }
    part = "generate_chunk" if stream else "generate_response"
    return {
        "model": served.name,
        "stream": stream,
        part: {"choices": [choice]},
        "prompt_token_ids": list(prompt[-_SEEN:]),
        "chat_request": chat,
    }


def _read(answer: Answer) -> _Said:
    """Return what an answer says; nothing if it is not one."""
    try:
        message = parse(answer.text)["choices"][0]["message"]
        rows = [one["function"] for one in message.get("tool_calls") or ()]
        return _Said(
            thoughts_of(message).strip(),
            str(message.get("content") or "").strip(),
            [(str(row["name"]), parse(str(row["arguments"]))) for row in rows],
        )
    except _MALFORMED:
        return _NOTHING


def _text(session: ServerSession, served: Served, ids: Sequence[int]) -> str:
    answer = session.try_post("/detokenize", {"model": served.name, "tokens": list(ids)})
    try:
        return str(parse(answer.text)["prompt"])
    except _MALFORMED:
        return ""


def _fault(
    session: ServerSession, text: str, found: Sequence[Call], fitting: Sequence[str]
) -> CheckFailed:
    named = " or ".join(fitting)
    made = calls_text(found) if found else "text"
    return CheckFailed(
        f"{session.endpoint.shown}: of the calls that the chat template writes, {excerpt(text)},"
        f" the server's parser makes {made}",
        hint=f"the template's marks are those of serve.tool_parser {named}"
        if named
        else ANOTHER_PARSER,
    )


def _streamed(
    session: ServerSession,
    served: Served,
    prompt: Sequence[int],
    ids: Sequence[int],
    tools: JsonValue,
) -> _Said:
    """Return what a client would put together; nothing if the server fails."""
    state: Json = None
    thoughts = content = ""
    names: dict[int, str] = {}
    given: dict[int, str] = {}
    try:
        for place in range(0, len(ids), _PIECE):
            body = _request(served, prompt, ids[place : place + _PIECE], tools, stream=True)
            told = parse(session.try_post(_READ, {**body, "stream_state": state}).text)
            state = told["stream_state"]
            for choice in (told["chunk"] or {}).get("choices", ()):
                delta = choice["delta"]
                thoughts += thoughts_of(delta)
                content += delta.get("content") or ""
                for call in delta.get("tool_calls") or ():
                    made, number = call.get("function") or {}, int(call["index"])
                    names[number] = made.get("name") or names.get(number, "")
                    given[number] = given.get(number, "") + (made.get("arguments") or "")
        calls = [(names[number], parse(given[number] or "{}")) for number in sorted(names)]
        return _Said(thoughts.strip(), content.strip(), calls)
    except _MALFORMED:
        return _NOTHING
