"""The file of a replay set: what is read back, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.core.values import key_of
from weightsmith.evaluating.replay import LARGEST, read_replay

from tests.fakes.replays import a_set


def test_what_is_written_is_read_back() -> None:
    made = a_set()

    assert read_replay(made.data, "replay.json") == made


def test_the_file_of_secret_questions_has_no_word_of_them() -> None:
    made = a_set()
    told = json.loads(made.digests)

    assert told["set"] == made.digest
    assert told["digests"] == [key_of(one.to_json()) for one in made.questions]
    assert b"Who are you" not in made.digests
    assert b"Lantern" not in made.digests
    with pytest.raises(InputRefused, match="digests of questions"):
        read_replay(made.digests, "replay.json")


def changed(change: Callable[[Any], object]) -> bytes:
    value = json.loads(a_set().data)
    change(value)
    return json.dumps(value).encode()


WRONG: dict[str, Callable[[Any], object]] = {
    "version 2": lambda v: v.update(version=2),
    "0 questions": lambda v: v.update(questions=[]),
    "33 questions": lambda v: v.update(questions=v["questions"] * 33),
    "a tolerance of -1": lambda v: v.update(tolerance=-1),
    "not unique": lambda v: v.update(questions=v["questions"] * 2),
    "path is not one of": lambda v: v["questions"][0].update(path="http://other/v1/completions"),
    "model is no name": lambda v: v["questions"][0]["request"].update(model=["bot"]),
    "not greedy": lambda v: v["questions"][0]["request"].update(temperature=1),
    "asks for a stream": lambda v: v["questions"][0]["request"].update(stream=True),
    "max_tokens": lambda v: v["questions"][0]["request"].update(max_tokens=1 << 30),
    "0 tokens": lambda v: v["questions"][0].update(tokens=[]),
    "ends at 0, after 1": lambda v: v["questions"][0]["tokens"][1].update(end=0),
    "its answer does not": lambda v: v["questions"][0].update(answer="I'm Lantern. And"),
    "negative margin": lambda v: v["questions"][0]["tokens"][0].update(margin=-0.1),
    "positive logprob": lambda v: v["questions"][0]["tokens"][0].update(logprob=0.1),
    "logprob without room": lambda v: v["questions"][0]["tokens"][0].update(room=None),
    "is not a list": lambda v: v.update(questions={}),
    "is not an object": lambda v: v["questions"][0].update(tokens=[[]]),
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_set_is_refused_by_name(said: str) -> None:
    with pytest.raises(InputRefused, match=f"^replay.json is no replay set.*{said}"):
        read_replay(changed(WRONG[said]), "replay.json")


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\xff", b" " * (LARGEST + 1)], ids=repr)
def test_what_is_no_set_is_refused(data: bytes) -> None:
    with pytest.raises(InputRefused, match="no replay set"):
        read_replay(data, "replay.json")
