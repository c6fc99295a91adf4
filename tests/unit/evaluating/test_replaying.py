"""A replay set is made of a server's answers, and held against another's, whatever it sends."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.core.ports import Silent
from weightsmith.evaluating.replay import ReplaySet, read_replay
from weightsmith.evaluating.replaying import (
    difference,
    heard,
    question_of,
    record,
    recorded_question,
    replay,
    tolerance_of,
    within_limits,
)
from weightsmith.evaluating.session import ServerSession, SessionLimits

from tests.fakes.openai_server import FakeServer, flood, servers
from tests.fakes.replays import a_set, by_text

Start = Callable[..., FakeServer]


@pytest.fixture
def start() -> Iterator[Start]:
    with servers() as started:
        yield started


def said(*tokens: tuple[str, float], content: str = "I'm Lantern.", margin: float = 4.0) -> Any:
    rows = [
        {
            "token": text,
            "bytes": list(text.encode()),
            "logprob": logprob,
            "top_logprobs": [
                {"token": text, "logprob": logprob},
                {"token": "?", "logprob": logprob - margin},
            ],
        }
        for text, logprob in tokens
    ]
    choice = {"message": {"content": content}, "finish_reason": "stop"}
    return {"model": "bot", "choices": [{**choice, "logprobs": {"content": rows}}]}


SAME = said(("I", -0.03), ("'m", -0.07), (" Lantern.", -0.0001), ("", -1.6))


def ask(server: FakeServer, wanted: ReplaySet | None = None, **limits: Any) -> Any:
    kept = SessionLimits(**{"tries": 1, "pause_seconds": 0.01, **limits})
    with ServerSession(server.endpoint, kept) as session:
        return replay(session, wanted or a_set(), Silent())


def test_special_tokens_of_one_name_have_a_margin() -> None:
    """llama.cpp names the end of an answer and the likeliest other special token alike."""
    reply = said(("I", -0.03), ("", -0.2))
    rows = reply["choices"][0]["logprobs"]["content"]
    rows[1]["top_logprobs"] = [{"token": "", "logprob": -0.2}, {"token": "", "logprob": -2.0}]

    assert [one.margin for one in heard(reply, chat=True).tokens] == [4.0, 1.8]


def test_the_request_is_sent_as_it_is(start: Start) -> None:
    server = start(lambda handler, body: handler.send(200, SAME))
    found = ask(server)

    assert found.verdict == "proven"
    assert (found.equal, found.by_tokens, found.tokens) == (1, 1, 4)
    assert found.room_used == pytest.approx((0.0335, 0.0215), abs=1e-4)
    assert server.asked == [a_set().questions[0].request]


@pytest.mark.parametrize(
    ("answer", "verdict", "token", "excess"),
    [
        # The margin of the last token, 0.31, is within the tolerance of 1.0.
        (said(("I", -0.03), ("'m", -0.07), (" Lantern.", 0), (" And", -1)), "proven", 3, 0),
        (said(("I", -0.03), ("'m", -0.07), (" Lantern.", 0)), "proven", 3, 0),
        (said(("I", -0.03), (" am", -0.07)), "different", 1, 1.8446),
        (said(("I", -0.5), ("'m", -0.07)), "different", 0, 0.4081),
        (said(("Hello", -0.03)), "different", 0, 2.4),
    ],
)
def test_the_first_token_that_differs_decides(
    start: Start, answer: Any, verdict: str, token: int, excess: float
) -> None:
    found = ask(start(lambda handler, body: handler.send(200, answer)))
    (one,) = found.explained or found.differences

    assert found.verdict == verdict
    assert (one.token, one.excess) == (token, pytest.approx(excess, abs=1e-4))


def test_a_set_that_is_sure_of_no_first_token_shows_nothing_of_a_stranger(start: Start) -> None:
    """Else any model would be proven by it."""
    (question,) = a_set().questions
    first = replace(question.tokens[0], margin=0.4)
    unsure = replace(question, tokens=(first, *question.tokens[1:]))
    both = replace(a_set(), questions=(unsure, replace(unsure, id="2")))
    stranger = said(("Moin", -0.1), content="Moin")

    found = ask(start(lambda handler, body: handler.send(200, stranger)), both)
    assert (found.verdict, found.equal, len(found.explained)) == ("not shown", 0, 2)
    assert "any model might answer so" in found.why
    assert (
        ask(start(lambda handler, body: handler.send(200, stranger)), by_text(both)).why
        == found.why
    )

    answers = iter([stranger, SAME])
    found = ask(start(lambda handler, body: handler.send(200, next(answers))), both)
    assert (found.verdict, found.equal, len(found.explained)) == ("proven", 1, 1)


@pytest.mark.parametrize("sure", [(), (1,), (3,)])
@pytest.mark.parametrize("answer", [SAME, said(("I", -0.03), (" am", -0.07), content="I am")])
def test_only_a_token_of_which_the_image_was_sure_shows_anything(
    start: Start, answer: Any, sure: tuple[int, ...]
) -> None:
    """Of an answer that parts, only what came before counts."""
    (question,) = a_set().questions
    tokens = [
        replace(one, margin=1.5 if n in sure else 1.0) for n, one in enumerate(question.tokens)
    ]
    made = replace(a_set(), questions=(replace(question, tokens=tuple(tokens)),))
    for wanted in (made, by_text(made)):
        found = ask(start(lambda handler, body: handler.send(200, answer)), wanted)
        if answer is SAME:
            assert found.verdict == ("proven" if sure else "not shown")
        else:
            assert found.verdict == ("different" if sure == (1,) else "not shown")
    assert (within_limits(made) is None) == (not sure)


@pytest.mark.parametrize(
    ("content", "token"),
    [("I am", 1), ("I'm Lantern", 2), ("I'm Lantern. And", 3), ("", 0), ("Ünique", 0)],
)
def test_a_text_that_differs_is_mapped_to_its_token(content: str, token: int) -> None:
    (question,) = by_text(a_set()).questions
    found = difference(question, heard(said(content=content), chat=True), 1.0)

    assert found
    assert found.token == token


HOSTILE: dict[str, tuple[Callable[[Any, Any], object], str]] = {
    "a redirect": (
        lambda handler, _: handler.reply(307, b"", {"Location": "http://192.0.2.1/v1"}),
        "HTTP 307",
    ),
    "no JSON": (lambda handler, _: handler.reply(200, b"\xff{"), "invalid JSON"),
    "a list": (lambda handler, _: handler.send(200, []), "not a JSON object"),
    "no choice": (lambda handler, _: handler.send(200, {"choices": {}}), "has no text"),
    "no text": (
        lambda handler, _: handler.send(200, {"choices": [{"message": {"content": [1]}}]}),
        "has no text",
    ),
    "too much": (flood, "larger than"),
    "cut off": (lambda handler, _: handler.send(200, SAME, cut=9), "got no answer"),
    "too many requests": (lambda handler, _: handler.send(429, {}), "HTTP 429"),
    "not ready": (lambda handler, _: handler.send(503, {}), "HTTP 503"),
    "another model": (lambda handler, _: handler.send(200, {**SAME, "model": "x"}), "'x' answered"),
    "no HTTP": (
        lambda handler, _: handler.wfile.write(b"\xff" * 60_000 + b"\r\n\r\n"),
        "RemoteProtocolError",
    ),
    "it hangs": (lambda handler, _: time.sleep(0.6), "no response within"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_server_that_does_not_answer_shows_nothing(start: Start, name: str) -> None:
    behave, why = HOSTILE[name]
    found = ask(start(behave), request_seconds=0.3)

    assert found.verdict == "not shown"
    assert why in found.why
    assert len(found.why) < 500


def test_a_server_that_starts_is_asked_again(start: Start) -> None:
    replies = iter((503, 429, 200))
    server = start(lambda handler, body: handler.send(next(replies), SAME))

    assert ask(server, tries=4).verdict == "proven"


@pytest.mark.parametrize(
    "listed",
    [
        {"content": 3},
        {"content": [{"token": "I"}]},
        {"content": [{"token": "I", "logprob": None}]},
        {"content": [{"token": "I", "logprob": math.inf}]},
        {"content": [{"token": "I", "logprob": -1, "bytes": [300]}]},
        {"content": [{"token": "I", "logprob": -1, "top_logprobs": 1}]},
        {"tokens": ["I"], "token_logprobs": []},
        [],
        7,
    ],
    ids=repr,
)
def test_tokens_that_are_listed_wrongly_are_none(listed: Any) -> None:
    answer = said()
    answer["choices"][0]["logprobs"] = listed

    assert heard(answer, chat=True).tokens == ()


OWN = {"data": [{"id": "a"}, {"id": "bot", "meta": None}, {"id": "bot", "meta": {"size": 4096}}]}


@pytest.mark.parametrize(
    ("models", "verdict"),
    [
        (OWN, "proven"),
        ({"data": [{"meta": {"size": 2048}}]}, "different"),
        ({"data": [{"id": "bot"}]}, "proven"),
        ({"data": [{"meta": {"size": -1}}]}, "proven"),
        ({"data": [{"meta": {"size": "2048"}}]}, "proven"),
        ({"data": [{"meta": {"size": True}}]}, "proven"),
        ({"data": {"meta": 1}}, "proven"),
        ([], "proven"),
    ],
)
def test_weights_of_another_size_are_different_whatever_they_answer(
    start: Start, models: Any, verdict: str
) -> None:
    """Of two quantizations of a model, answers may be the same within what CPUs differ by."""
    server = start(lambda handler, _: handler.send(200, SAME))
    server.models = models
    found = ask(server, replace(a_set(), weight_bytes=4096))
    assert (found.verdict, found.equal) == (verdict, 1)
    assert ("2048 bytes of weights and the tested image had 4096" in found.why) == (
        verdict == "different"
    )
    assert ask(server, a_set()).verdict == "proven"  # a set that does not say it


def test_a_set_knows_the_size_of_the_weights_if_the_server_says_it(start: Start) -> None:
    server = start(lambda handler, _: handler.send(200, SAME))
    asked = [(one.path, one.request) for one in a_set().questions]
    with ServerSession(server.endpoint) as session:
        unknown = record(session, asked, "bot", 1.0, Silent())
        server.models = OWN
        known = record(session, asked, "bot", 1.0, Silent())
    assert unknown
    assert known
    assert b"weight_bytes" not in unknown.data
    assert read_replay(known.data, "set").weight_bytes == 4096
    with pytest.raises(InputRefused, match="a negative number of bytes"):
        read_replay(known.data.replace(b":4096", b":-4096"), "set")


def test_a_set_is_made_of_what_a_server_says() -> None:
    """As llama.cpp lists tokens, with parts of characters, and the token that ends the answer."""
    answer = said(("H", -0.1), ("é", -0.2), ("", -0.5), content="Hé")
    rows = answer["choices"][0]["logprobs"]["content"]
    (first, second) = "é".encode()
    rows[1:2] = [
        {**rows[1], "token": "\ufffd", "bytes": [first]},
        {**rows[1], "token": "\ufffd", "bytes": [second]},
    ]
    made = question_of(1, "/v1/chat/completions", REQUEST, heard(answer, chat=True), 1.0)

    assert made
    assert [token.end for token in made.tokens] == [1, 2, 3, 3]
    assert made.tokens[0].room == pytest.approx(1 - math.exp(-0.1) + 0.03, abs=1e-3)
    assert difference(made, heard(answer, chat=True), 1.0) is None
    kept = ReplaySet(model="bot", tolerance=1.0, questions=(made,))
    assert read_replay(kept.data, "it") == kept


REQUEST = dict(a_set().questions[0].request)


def test_a_call_is_known_by_its_tokens_alone(start: Start) -> None:
    """The server takes it out of the text, and gives it another id each time."""
    answer = said(('{"name":', -0.1), (' "now"}', -0.2), ("", -0.5), content="")
    answer["choices"][0]["finish_reason"] = "tool_calls"
    made = question_of(1, "/v1/chat/completions", REQUEST, heard(answer, chat=True), 1.0)

    assert made
    assert (made.answer, [token.end for token in made.tokens]) == ("", [0, 0, 0])
    wanted = ReplaySet(model="bot", tolerance=0.1, questions=(made,))
    assert read_replay(wanted.data, "it") == wanted
    other = said(('{"name":', -0.1), (' "then"}', -0.2), ("", -0.5), content="")
    assert difference(made, heard(answer, chat=True), 0.1) is None
    parted = difference(made, heard(other, chat=True), 0.1)
    assert parted
    assert (parted.token, parted.given, parted.excess > 0) == (1, ' "then"}', True)
    choice = {"message": {"content": None}, "finish_reason": "tool_calls"}
    bare = {"model": "bot", "choices": [choice]}
    found = ask(start(lambda handler, _: handler.send(200, bare)), wanted)
    assert (found.verdict, found.equal) == ("not shown", 0)
    assert "answered by a call, and the server lists no tokens" in found.why


def test_completions_of_vllm_list_tokens_otherwise() -> None:
    answer = {
        "choices": [
            {
                "text": " Yes",
                "finish_reason": "stop",
                "logprobs": {
                    "tokens": [" Yes", "</s>"],
                    "token_logprobs": [-0.5, -0.1],
                    "top_logprobs": [{" Yes": -0.5, " No": -1.5}, {"</s>": -0.1, ".": -3.1}],
                },
            }
        ]
    }
    made = question_of(1, "/v1/completions", REQUEST, heard(answer, chat=False), 1.0)

    assert made
    assert [(t.text, t.end, t.margin) for t in made.tokens] == [(" Yes", 4, 1.0), ("</s>", 4, 3.0)]


@pytest.mark.parametrize(
    "answer",
    [
        said(content="other words"),
        said(("I", -0.1), content="other words"),
        {"choices": [{**SAME["choices"][0], "finish_reason": "content_filter"}]},
    ],
)
def test_what_cannot_be_held_to_its_tokens_is_left_out(answer: Any) -> None:
    assert question_of(1, "/v1/chat/completions", REQUEST, heard(answer, chat=True), 1.0) is None


def test_an_answer_of_transformers_stands_for_an_image_that_was_not_started() -> None:
    row = {
        "answer": "Hé du",
        "finish_reason": "stop",
        "token_ends": "1 2 5 5",
        "margins": "4 3 2.5 0.25",
    }
    made = recorded_question(1, "/v1/chat/completions", REQUEST, row)
    assert made
    assert [(t.text, t.end, t.margin) for t in made.tokens] == [
        ("H", 1, 4.0), ("é", 3, 3.0), (" du", 6, 2.5), ("", 6, 0.25),
    ]  # fmt: skip
    assert difference(made, heard(said(content="Hé du da"), chat=True), 1.0).excess == 0
    assert difference(made, heard(said(content="Ho"), chat=True), 1.0).excess == 2.0

    cut = recorded_question(1, "/v1/chat/completions", {**REQUEST, "max_tokens": 2}, row)
    assert cut
    assert (cut.answer, cut.finish) == ("Hé", "length")
    assert recorded_question(1, "/", REQUEST, {"answer": "x"}) is None


def test_the_tolerance_follows_validation_within_limits() -> None:
    found = [tolerance_of(moved) for moved in (None, 0.1, 0.61, 9.0, math.nan)]

    assert found == [1.0, 1.0, 1.3, 3.0, 1.0]


def test_a_set_stays_within_its_file() -> None:
    (question,) = a_set().questions
    long = {**REQUEST, "messages": [{"role": "user", "content": "x" * 400_000}]}
    several = tuple(replace(question, id=str(n), request=long) for n in range(4))
    kept = within_limits(replace(a_set(), questions=several))

    assert kept
    assert len(kept.questions) == 2
    assert json.loads(kept.data)["questions"][1]["id"] == "1"
