"""A model on a server, and how it is asked: chats through its template, or plain prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Json
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.session import ServerSession, excerpt

_DATED = re.compile(r"-\d{4}-\d\d-\d\d")
"""Date suffix that hosted servers append to a model's name."""
_CHATML = "message.role + '\n' + message.content + '<|im_end|>\n'"
"""In the template that llama.cpp shows for a model without one; nobody else writes it so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A model by its name on a server."""

    name: str
    chat: bool = True
    """Whether it has a chat template; without one it gets plain prompts, as the references do."""

    @property
    def path(self) -> str:
        """The path of requests."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    def body(self, item: Item, max_tokens: int, *, stream: bool = False) -> dict[str, Json]:
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

    def question(self, item: Item) -> dict[str, Json]:
        """Return the part of a body that asks; raise InputRefused for a chat without a template."""
        if self.chat:
            return {"messages": [dict(message) for message in item.messages]}
        if len(item.messages) != 1:
            raise InputRefused(
                f"the model has no chat template, but a question has {len(item.messages)} messages",
                hint="give plain prompts, or add chat_template.jinja to the model or the adapter",
            )
        return {"prompt": item.prompt}

    def text(self, choice: Mapping[str, Json], *, stream: bool = False) -> Json:
        """Return the text of a response's choice; raise KeyError or TypeError if it has none."""
        if not self.chat:
            return choice["text"]
        return (choice["delta"] or {}).get("content") if stream else choice["message"]["content"]


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
    if not may_ask:
        return Served(name=name)
    hello = Item(messages=({"role": "user", "content": "Hello"},), expected=("",), line=0)
    served = Served(name=name)
    answer = session.try_post(served.path, served.body(hello, 1))
    refused = 400 <= answer.status < 500 and "template" in answer.text.lower()
    return Served(name=name, chat=not refused)


def ask(session: ServerSession, served: Served, item: Item, max_tokens: int) -> Mapping[str, Json]:
    """Send a greedy request; return `{answer, finish_reason}`, and `prompt_tokens` if known.

    Raises CheckFailed, after retries if useful, if the server fails, hangs or stops, or if its
    response is truncated, too large or from another model.
    """
    answer = session.post(served.path, served.body(item, max_tokens))
    check_model(session, served.path, served.name, answer)
    try:
        choice = answer["choices"][0]
        content = served.text(choice)
    except (KeyError, IndexError, TypeError):
        raise session.failed(
            served.path, f"the response has no text: {excerpt(json.dumps(answer))}"
        ) from None
    usage = answer.get("usage")
    counted = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    return {
        # JSON can contain lone surrogates, which UTF-8 cannot.
        "answer": content.encode("utf-8", "replace").decode() if isinstance(content, str) else "",
        "finish_reason": choice.get("finish_reason"),
        **({"prompt_tokens": counted} if type(counted) is int else {}),
    }


def check_model(
    session: ServerSession, path: str, served_name: str, answer: Mapping[str, Json]
) -> None:
    """Raise CheckFailed if a response names another model."""
    said = answer.get("model")
    if not isinstance(said, str) or said == served_name:
        return
    if said.startswith(served_name) and _DATED.fullmatch(said.removeprefix(served_name)):
        return
    raise session.failed(path, f"requested model {served_name!r}, but {said!r} answered")
