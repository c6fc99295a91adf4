"""A started image's server gives answers that never end, or are something else."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from weightsmith.core.errors import CheckFailed, WeightsmithError
from weightsmith.core.ports import Endpoint, Silent
from weightsmith.evaluating import client, smoke
from weightsmith.evaluating.client import Served, ask, wait_until_healthy
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.load import load_test
from weightsmith.evaluating.session import ServerSession, SessionLimits
from weightsmith.evaluating.task import Task, ask_server

from tests.fakes.openai_server import servers as openai_servers
from tests.fakes.serving import answering, drips_its_head


def never_ends_its_body(caller: socket.socket) -> None:
    caller.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        caller.sendall(b"x" * 65536)


@contextmanager
def serving(answer: Callable[[socket.socket], None]) -> Iterator[Endpoint]:
    with answering(answer) as host:
        yield Endpoint(url=f"http://{host}", logs=lambda _: "", alive=lambda: True)


def test_a_server_whose_headers_never_end_is_given_up():
    """Each byte comes in time and the last never does: the question has one limit for all."""
    limits = SessionLimits(request_seconds=0.5, tries=1)

    with (
        serving(drips_its_head) as endpoint,
        ServerSession(endpoint, limits) as session,
        pytest.raises(CheckFailed, match=r"0\.5 s"),
    ):
        session.get("/v1/models")


def test_a_server_whose_health_never_comes_is_given_up(monkeypatch):
    monkeypatch.setattr(client, "_PROBE_SECONDS", 0.2)

    with serving(drips_its_head) as endpoint, pytest.raises(CheckFailed, match=r"0\.5 s"):
        wait_until_healthy(endpoint, "/health", 0.5)


CHAT = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}
ECHO = {
    "choices": [
        {
            "text": "One two",
            "logprobs": {
                "tokens": ["One", " two", "x"],
                "token_logprobs": [None, -1.0, -1.0],
                "text_offset": [0, 3, 7],
            },
        }
    ]
}
STREAM = {"choices": [{"delta": {"content": "hi"}}]}
LLAMA = {
    "/tokenize": {"tokens": [1, 2, 3]},
    "/apply-template": {"prompt": "One two"},
    "/completion": {"completion_probabilities": [{"top_logprobs": [{"id": 2, "logprob": -1.0}]}]},
}
ODD = (None, True, 5, "x", [], {}, [None], [[]], [{}], float("inf"), 10**400)


def places(value: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield here
    rows = enumerate(value) if isinstance(value, list) else ()
    for key, one in value.items() if isinstance(value, dict) else rows:
        yield from places(one, (*here, key))


def changed(value: Any, place: tuple[Any, ...], odd: Any) -> Any:
    """Return a copy of a JSON value with something else at a place of it."""
    if not place:
        return odd
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[place[0]] = changed(value[place[0]], place[1:], odd)
    return copy


def asked(session: ServerSession, kind: str) -> None:
    served = Served(name="support", chat=kind != "/v1/completions")
    item = Item(
        messages=({"role": "user", "content": "One"},),
        expected=("a",),
        line=1,
        choices=("a", "b"),
        plain=kind != "/apply-template",
    )
    if kind == "stream":
        load_test(session, served, [item], 1, 1, 4, Silent())
        smoke._stream(session, served)
    elif kind == "/v1/chat/completions":
        ask(session, served, item, 4)
    else:
        ask_server(session, served, Task(items=(item,), metric="choice"), Silent())


@pytest.mark.parametrize(
    ("kind", "right"),
    [("/v1/chat/completions", CHAT), ("/v1/completions", ECHO), ("stream", STREAM), *LLAMA.items()],
)
def test_a_server_that_answers_with_something_else(kind, right):
    """Each part of a right answer is another value in turn: it is said, never a bug of ours."""
    said: dict[str, Any] = {}

    def behave(handler: Any, _: Any) -> None:
        if kind == "stream":
            data = json.dumps(said[kind]).encode()
            return handler.stream(b"data: " + data + b"\n\ndata: [DONE]\n\n")
        return handler.send(200, said.get(handler.path, {}))

    with openai_servers() as start:
        endpoint = start(behave).endpoint
        limits = SessionLimits(request_seconds=60, tries=1)
        with ServerSession(endpoint, limits) as session:
            for place in places(right):
                for odd in ODD:
                    said.clear()
                    said.update(LLAMA if kind in LLAMA else {})
                    said[kind] = changed(right, place, odd)
                    with suppress(WeightsmithError):
                        asked(session, kind)


def test_a_server_is_healthy_whatever_its_health_answer_goes_on_to_say():
    """Its body has no end: the status is what counts, and nobody reads on."""
    with serving(never_ends_its_body) as endpoint:
        assert wait_until_healthy(endpoint, "/health", 60) < 60
