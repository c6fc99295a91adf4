"""The replay set of an image: questions, and the answers by which it is known elsewhere.

The set is the file `REPLAY` in the image. `weightsmith prove` asks it, and so does the program
`healthcheck` in the image. docs/reference/replay.md describes the file and the rule, for both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from weightsmith.core.errors import InputRefused
from weightsmith.core.json_objects import OMITTED, JsonObject
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Digest, JsonValue, canonical, key_of
from weightsmith.evaluating import replay_numbers

REPLAY = "/etc/weightsmith/replay.json"
"""The set's path in an image."""
EARLIER = ".replay.json"
"""Beside a recipe, after its name: the set of an image that was made of it, which a build keeps if
it still holds. Of a recipe with several targets, the target's name precedes it."""
VERSION, WITH_NUMBERS = 1, 2
"""Of sets whose answers are texts, and of those with numbers."""
MOST_QUESTIONS = 32
LARGEST = 1 << 20
"""Bytes of the file."""
MOST_TOKENS = 1024
"""Of one answer."""
_TEXTS = ("/v1/chat/completions", "/v1/completions")
PATHS = (*_TEXTS, *replay_numbers.PATHS)
CALL = "tool_calls"
"""How an answer finishes that calls a tool: the server takes the call out of its text."""
IMAGE = "image"
"""Whose answers they are: the tested image's own."""
_AGAIN = "take the set from the image, or from the build's folder"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayToken(JsonObject):
    """A token of an expected answer."""

    text: str
    """As the server names it; "" for one that ends the answer."""
    end: int
    """Bytes of the answer in UTF-8 up to and with this token."""
    margin: float
    """By how many nats it was likelier than the next best token."""
    logprob: float | None = None
    """Its log-probability in nats; None if the answer is not the tested image's own."""
    room: float | None = None
    """By how many nats rounding may move that; None without it."""
    id: int | None = None
    """Its number in the vocabulary, if the server says it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayQuestion(JsonObject):
    """A request, and the answer that is expected."""

    id: str
    """Short and unique in the set."""
    path: str
    """One of `PATHS`."""
    request: Mapping[str, Any]
    """The exact body; of a text greedy, not a stream, with log-probabilities."""
    answer: str
    """The text of the answer, without what a server's parser took out of it."""
    finish: str
    """`stop`, `length` for an answer that was cut at `max_tokens`, or `CALL`."""
    tokens: tuple[ReplayToken, ...]
    numbers: tuple[float, ...] = field(default=(), metadata=OMITTED)
    """Of a model that does not chat, in place of a text: `replay_numbers.numbers_in`."""
    room: float = field(default=0.0, metadata=OMITTED)
    """How far they may move: of vectors by 1 - cosine, else each number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySet(JsonObject):
    """Questions with the answers that an image gave, or should give."""

    version: int = VERSION
    model: str
    """The name under which the server has the model."""
    reference: str = IMAGE
    """Whose answers they are: `image`, or what stands for an image that was not started."""
    tolerance: float
    """The margin in nats up to which rounding may put another token in a token's place."""
    questions: tuple[ReplayQuestion, ...]
    weight_bytes: int = field(default=0, metadata=OMITTED)
    """Bytes of the model's tensors, as the tested image's server said them; 0 if it did not."""

    @property
    def data(self) -> bytes:
        """The bytes of the file."""
        return canonical(self.to_json()) + b"\n"

    @property
    def digest(self) -> Digest:
        """The digest of the file."""
        return Digest.of(self.data)

    @property
    def digests(self) -> bytes:
        """The bytes of a file that tells no question: the set's digest, and each question's."""
        return (
            canonical(
                {
                    "version": self.version,
                    "model": self.model,
                    "reference": self.reference,
                    "tolerance": self.tolerance,
                    "set": self.digest,
                    "digests": [key_of(one.to_json()) for one in self.questions],
                }
            )
            + b"\n"
        )


def read_replay(data: bytes, where: str) -> ReplaySet:
    """Return the replay set in a file's bytes; raises InputRefused, which names `where`.

    Refused are sets beyond the limits above, requests that are not greedy, and tokens that do not
    make up their answer.
    """
    try:
        value = parse(data, largest=LARGEST, unique=True)
        if isinstance(value, dict) and "digests" in value and "questions" not in value:
            raise ValueError("it has digests of questions, and not the questions")
        found = ReplaySet.from_json(value)
        _check(found)
    except ValueError as error:
        raise InputRefused(f"{where} is no replay set: {error}", hint=_AGAIN) from None
    return found


def _check(found: ReplaySet) -> None:
    """Raise ValueError, with the place, for what `read_replay` refuses."""
    version = WITH_NUMBERS if any(one.numbers for one in found.questions) else VERSION
    if found.version != version:
        raise ValueError(f"version {found.version} is not {version}")
    if not 0 < len(found.questions) <= MOST_QUESTIONS:
        raise ValueError(f"it has {len(found.questions)} questions, not 1 to {MOST_QUESTIONS}")
    if not 0 <= found.tolerance <= 10 or found.weight_bytes < 0:
        raise ValueError(f"a tolerance of {found.tolerance} nats, or a negative number of bytes")
    if sum(len(one.numbers) for one in found.questions) > replay_numbers.MOST:
        raise ValueError(f"it has more than {replay_numbers.MOST} numbers")
    seen = set[str]()
    for number, one in enumerate(found.questions):
        place = f"questions[{number}]"
        if one.id in seen or not 0 < len(one.id) <= 64 or not one.id.isprintable():
            raise ValueError(f"{place}.id is empty, too long or not unique: {one.id[:80]!r}")
        seen.add(one.id)
        if one.path not in PATHS:
            raise ValueError(f"{place}.path is not one of {', '.join(PATHS)}: {one.path[:80]!r}")
        if one.path in replay_numbers.PATHS:
            _check_numbers(one, place)
            continue
        _check_request(one.request, f"{place}.request")
        if one.numbers or not 0 < len(one.tokens) <= MOST_TOKENS:
            raise ValueError(f"{place} has {len(one.tokens)} tokens, not 1 to {MOST_TOKENS}")
        _check_tokens(one, place)


def _check_numbers(one: ReplayQuestion, place: str) -> None:
    if not isinstance(one.request.get("model"), str) or not one.request["model"]:
        raise ValueError(f"{place}.request.model is no name")
    if not 0 < len(one.numbers) <= replay_numbers.MOST or not all(map(math.isfinite, one.numbers)):
        raise ValueError(f"{place} has {len(one.numbers)} numbers, or not all are finite")
    if one.tokens or one.answer or not (math.isfinite(one.room) and one.room > 0):
        raise ValueError(f"{place} has a text beside its numbers, or no room")


def _check_tokens(one: ReplayQuestion, place: str) -> None:
    size, before = len(one.answer.encode()), 0
    for token in one.tokens:
        if not before <= token.end <= size:
            raise ValueError(f"{place}: a token ends at {token.end}, after {before}")
        if token.margin < 0 or (token.room or 0) < 0 or (token.logprob or 0) > 0:
            raise ValueError(f"{place}: a negative margin or room, or a positive logprob")
        if (token.room is None) != (token.logprob is None):
            raise ValueError(f"{place}: a token has a logprob without room, or room without it")
        before = token.end
    if before != size:
        raise ValueError(f"{place}: its tokens end at byte {before}, and its answer does not")


def _check_request(request: Mapping[str, JsonValue], place: str) -> None:
    if not isinstance(request.get("model"), str) or not request["model"]:
        raise ValueError(f"{place}.model is no name")
    if request.get("temperature") != 0 or request.get("stream", False) is not False:
        raise ValueError(f"{place} is not greedy, or asks for a stream")
    most = request.get("max_tokens")
    if type(most) is not int or not 0 < most <= MOST_TOKENS:
        raise ValueError(f"{place}.max_tokens is not a number from 1 to {MOST_TOKENS}")
