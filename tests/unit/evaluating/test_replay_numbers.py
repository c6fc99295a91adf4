"""Replay sets of models that do not chat: vectors, scores of documents, and labels."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.core.ports import Silent
from weightsmith.core.vectors import packed
from weightsmith.evaluating import replay_numbers
from weightsmith.evaluating.replay import ReplayQuestion, ReplaySet, read_replay
from weightsmith.evaluating.replay_numbers import (
    LABELS,
    SCORES,
    TOKENS,
    VECTORS,
    distance,
    numbers_in,
    reference_of,
    room_of,
)
from weightsmith.evaluating.replaying import Replayed, described, record, replay
from weightsmith.evaluating.session import ServerSession, SessionLimits

from tests.fakes.openai_server import FakeServer, servers

Start = Callable[..., FakeServer]

VECTOR = (0.6, 0.8, 0.0)


@pytest.fixture
def start() -> Iterator[Start]:
    with servers() as started:
        yield started


def a_set(
    path: str = VECTORS, numbers: tuple[float, ...] = VECTOR, room: float = 1e-3
) -> ReplaySet:
    question = ReplayQuestion(
        id="1", path=path, request={"model": "bot", "input": "a"}, answer="", finish="",
        tokens=(), numbers=numbers, room=room,
    )  # fmt: skip
    return ReplaySet(version=2, model="bot", tolerance=1.0, questions=(question,))


def ask(server: FakeServer, wanted: ReplaySet) -> Replayed:
    with ServerSession(server.endpoint, SessionLimits(tries=1, pause_seconds=0.01)) as session:
        return replay(session, wanted, Silent())


def test_what_is_written_is_read_back() -> None:
    made = a_set()
    assert read_replay(made.data, "replay.json") == made


WRONG: dict[str, Callable[[Any], object]] = {
    "version 1 is not 2": lambda v: v.update(version=1),
    "has 0 numbers": lambda v: v["questions"][0].update(numbers=[]),
    "or no room": lambda v: v["questions"][0].update(room=0),
    "no room": lambda v: v["questions"][0].update(room=-1),
    "beside its numbers": lambda v: v["questions"][0].update(answer="a"),
    "model is no name": lambda v: v["questions"][0].update(request={}),
    "is not greedy": lambda v: v["questions"][0].update(path="/v1/completions"),
    "path is not one of": lambda v: v["questions"][0].update(path="http://other/v1/embeddings"),
    "not a number": lambda v: v["questions"][0].update(numbers=["1"]),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_set_is_refused_by_name(said: str) -> None:
    value = json.loads(a_set().data)
    WRONG[said](value)
    if said == "has 0 numbers":
        value["version"] = 1
    with pytest.raises(InputRefused, match=f"^replay.json is no replay set.*{said}"):
        read_replay(json.dumps(value).encode(), "replay.json")


@pytest.mark.parametrize(
    ("path", "answer", "numbers"),
    [
        (VECTORS, {"data": [{"embedding": [1, 0.1234567]}]}, (1, 0.12346)),
        (
            SCORES,
            {"results": [{"index": 1, "relevance_score": 2}, {"index": 0, "relevance_score": 3}]},
            (3, 2),
        ),
        (LABELS, {"data": [{"label": "x", "probs": [0.25, 0.75]}]}, (0.25, 0.75)),
        (TOKENS, {"data": [{"data": [[0.5, 0.5], [1, 0]]}]}, (0.5, 0.5, 1, 0)),
    ],
)
def test_the_numbers_of_an_answer(path: str, answer: Any, numbers: tuple[float, ...]) -> None:
    assert numbers_in(path, answer) == numbers


@pytest.mark.parametrize("path", replay_numbers.PATHS)
@pytest.mark.parametrize(
    "answer",
    [
        {}, {"data": []}, {"data": [{}, {}]}, {"data": [{"embedding": []}]}, {"data": 1},
        {"data": [{"embedding": ["x"], "probs": [None], "data": [1]}]},
        {"data": [{"embedding": [math.inf], "probs": [math.nan], "data": [[math.inf]]}]},
        {"data": [{"embedding": [10**400], "probs": [True], "data": [[10**400]]}]},
        {"results": [{"index": 3, "relevance_score": 1}]}, {"results": {"index": 0}},
    ],
)  # fmt: skip
def test_an_answer_that_has_none(path: str, answer: Any) -> None:
    with pytest.raises(ValueError, match="response has"):
        numbers_in(path, answer)


def test_distances_are_those_of_numpy() -> None:
    """The oracle is NumPy's own cosine."""
    draw = random.Random(7)
    for _ in range(20):
        one, other = ([draw.gauss(0, 1) for _ in range(50)] for _ in range(2))
        cosine = np.dot(one, other) / np.linalg.norm(one) / np.linalg.norm(other)
        assert distance(VECTORS, one, other) == pytest.approx(1 - cosine)
        largest = float(np.max(np.abs(np.subtract(one, other))))
        assert distance(SCORES, one, other) == pytest.approx(largest)
    assert distance(VECTORS, one, [3 * number for number in one]) == pytest.approx(0, abs=1e-12)
    assert distance(VECTORS, one, [0.0] * 50) == math.inf
    assert distance(VECTORS, one, [1e308] * 50) == math.inf
    assert distance(LABELS, [0.5], [0.5, 0.5]) == math.inf


def test_two_machines_near_the_reference_are_within_the_room() -> None:
    """Each is moved by less than the largest move that the build saw; so says the rule's proof."""
    draw = np.random.default_rng(3)
    truth = draw.normal(size=(8, 64))

    def machine() -> Any:
        moved = draw.normal(size=truth.shape)
        sizes = np.linalg.norm(truth, axis=1, keepdims=True)
        return truth + 0.02 * moved / np.linalg.norm(moved, axis=1, keepdims=True) * sizes

    tested, other = machine(), machine()
    room = room_of(VECTORS, [*zip(tested.tolist(), truth.tolist(), strict=True)])
    moves = [distance(VECTORS, *pair) for pair in zip(tested.tolist(), other.tolist(), strict=True)]
    assert max(moves) <= room < 5 * max(moves)


@pytest.mark.parametrize(
    ("path", "answers", "room"),
    [
        (VECTORS, [((1.0, 0.0), (1.0, 0.0))], 2e-4),  # the least
        (VECTORS, [((1.0, 0.0), (math.cos(0.05), math.sin(0.05)))], 4 * (1 - math.cos(0.05))),
        (VECTORS, [((1.0, 0.0), (math.cos(0.2), math.sin(0.2)))], 0.05),  # the most: few bits
        (VECTORS, [((1.0, 0.0), ())], 2e-4),
        (SCORES, [((0.9, 0.1), (0.9, 0.15))], 0.1),
        (SCORES, [((0.9, 0.1), (0.9, 0.1))], 0.01),
        (SCORES, [((0.9, 0.13), (math.log(9), math.log(1 / 9)))], 0.06),  # of logits, the sigmoid
        (SCORES, [((8.0, -6.0), (0.99, 0.01))], 0.24),  # neither: nothing is known
        (LABELS, [((0.2, 0.8), ())], 0.03),
        (LABELS, [((0.2, 0.8), (0.22, 0.78))], 0.04),
        (LABELS, [((0.2, 0.8), (0.2, 0.8))], 0.01),
        (LABELS, [((0.2, 0.8), (0.2, 0.8)), ((0.5, 0.5), (0.7, 0.3))], 0.25),  # the most
        (LABELS, [((5.0, -3.0), (1.0, 0.0)), ((4.0, -4.0), (1.0, 0.0))], 0.15),  # logits
        (TOKENS, [((0.2, 0.8, 1.0, 0.0), (0.25, 0.75, 1.0, 0.0))], 0.1),
        (TOKENS, [((0.2, 0.8, 1.0, 0.0), (0.25, 0.75))], 0.03),  # not the same tokens
    ],
)
def test_the_room_follows_from_the_reference(path: str, answers: Any, room: float) -> None:
    assert room_of(path, answers) == pytest.approx(room, rel=0.01)


def test_what_the_reference_kept() -> None:
    assert reference_of(VECTORS, packed([0.5, 1])) == (0.5, 1)
    assert reference_of(SCORES, "0.5 1e-3") == (0.5, 0.001)
    assert reference_of(LABELS, "0.25 0.75") == (0.25, 0.75)
    for path, text in ((LABELS, "good"), (VECTORS, "no base64"), (SCORES, "a b"), (VECTORS, "")):
        assert reference_of(path, text) == ()


@pytest.mark.parametrize(
    ("given", "verdict", "said"),
    [
        ([6, 8, 0], "proven", ""),  # of another length, and the same direction
        ([0.6, 0.8, 0.01], "proven", ""),
        ([0.6, 0.8, 0.2], "different", "question 1: 0.2 instead of 0 (number 2)"),
        ([0.6, 0.8], "different", "question 1: 2 numbers instead of 3 numbers"),
        ([0, 0, 0], "different", "question 1"),
        ([1e308, 1e308, 1e308], "different", "question 1"),
        ([], "not shown", ""),
    ],
)
def test_a_server_is_held_to_its_room(
    start: Start, given: list[float], verdict: str, said: str
) -> None:
    server = start(lambda handler, _: handler.send(200, {"data": [{"embedding": given}]}))
    found = ask(server, a_set())
    assert found.verdict == verdict
    assert server.asked == [{"model": "bot", "input": "a"}]
    if said:
        assert described(found.differences[0]).startswith(said)
        assert "another pooling" in found.why
        assert found.room_used[0] > 1
    json.dumps([one.to_json() for one in found.differences], allow_nan=False)


@pytest.mark.parametrize(
    ("usage", "read"),
    [({"prompt_tokens": 5, "total_tokens": 5}, 5), (None, 0), ([], 0), ({"total_tokens": "9"}, 0),
     ({"total_tokens": True}, 0), ({"total_tokens": -1}, 0)],
)  # fmt: skip
def test_its_speed_is_in_tokens_that_it_read(start: Start, usage: Any, read: int) -> None:
    row = {"data": [{"embedding": [0.6, 0.8, 0]}], "usage": usage}
    server = start(lambda handler, _: handler.send(200, row))
    assert ask(server, a_set()).tokens == read


def test_a_label_that_is_as_likely_is_proven(start: Start) -> None:
    wanted = a_set(LABELS, (0.51, 0.49), 0.03)
    rows = iter(([0.49, 0.51], [0.4, 0.6]))
    server = start(lambda handler, _: handler.send(200, {"data": [{"probs": next(rows)}]}))
    assert [ask(server, wanted).verdict for _ in range(2)] == ["proven", "different"]


def test_a_set_is_made_of_what_a_server_says(start: Start) -> None:
    """One room for all questions: the largest move of any."""
    vectors = {"a": [1.0, 0.0], "b": [0.0, 1.0]}

    def answer(handler: Any, body: Any) -> None:
        if body["input"] not in vectors:
            handler.send(400, {"error": "too long"})
            return
        handler.send(200, {"data": [{"embedding": vectors[body["input"]]}]})

    asked = [(VECTORS, {"model": "bot", "input": text}) for text in ("a", "x", "b")]
    turned = [math.sin(0.1), math.cos(0.1)]
    references = [packed([1, 0]), "", packed(turned)]
    with ServerSession(start(answer).endpoint, SessionLimits(tries=1)) as session:
        made = record(session, asked, "bot", 1.0, Silent(), references)
    assert made
    assert [one.id for one in made.questions] == ["1", "3"]
    (room,) = {one.room for one in made.questions}
    assert room == pytest.approx(4 * (1 - math.cos(0.1)), rel=0.01)
    assert made.version == 2
    assert read_replay(made.data, "made") == made
    assert replace(made, version=1).data != made.data
