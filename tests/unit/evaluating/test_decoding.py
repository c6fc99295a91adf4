"""Tokens per second of one answer, measured against a server whose clock is the test's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from typing import Any, cast

import pytest
from weightsmith.core.errors import CheckFailed
from weightsmith.core.values import Json
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.decoding import decoding_speed
from weightsmith.evaluating.session import Answer, ServerSession


@dataclass
class Server:
    """Takes two seconds for a prompt, the first time twenty, and then a time for each token."""

    per_token: Sequence[float] = (0.05,)
    """Seconds, answer by answer; the last one for all further answers."""
    ends_after: int = 1 << 30
    counts: bool = True
    refuses: bool = False
    now: float = 0.0
    asked: list[Json] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.times: Iterator[float] = chain(self.per_token, repeat(self.per_token[-1]))

    def adding(self, fields: Json) -> Any:
        assert fields == {"ignore_eos": True}
        return self

    def try_post(self, path: str, body: Json) -> Any:
        assert path == "/v1/chat/completions"
        tokens = min(body["max_tokens"], self.ends_after)
        self.now += (2 if self.asked else 20) + tokens * next(self.times)
        self.asked.append(body)
        usage = f'"completion_tokens": {tokens}' if self.counts else ""
        if self.refuses:
            return Answer(400, "the context is too short")
        return Answer(200, f'{{"usage": {{{usage}}}}}')

    def speed(self, context: int = 512) -> float:
        session = cast("ServerSession", self)
        return decoding_speed(session, Served(name="bot"), context, lambda: self.now)


def test_neither_the_prompt_nor_other_work_counts() -> None:
    """Only the fewest seconds of a round do: others are of what else the machine did."""
    assert Server().speed() == 20.0
    assert Server(per_token=(9, 9, 9, 9, 0.05, 0.07, 0.06, 0.05)).speed() == 20.0


def test_answers_fit_the_context() -> None:
    server = Server()
    server.speed(context=40)
    assert {body["max_tokens"] for body in server.asked} == {1, 20}


@pytest.mark.parametrize(
    ("server", "why"),
    [
        (Server(counts=False), "the server counts 0 and 0"),
        (Server(refuses=True), "HTTP 400: the context is too short"),
        (Server(ends_after=1), "of answers of 1 and 64 tokens, the server counts 1 and 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(server: Server, why: str) -> None:
    with pytest.raises(CheckFailed, match=why):
        server.speed()
