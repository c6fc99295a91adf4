"""Asking a server a replay set: the set is made of one's answers, and another's are held to it.

The rule by which answers are compared stands in docs/reference/replay.md; the program in the image
follows it too.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Literal, TypeAlias

from weightsmith.core.errors import CheckFailed, EnvironmentFailure
from weightsmith.core.json_objects import OMITTED, JsonObject
from weightsmith.core.ports import Progress
from weightsmith.core.values import Json, JsonValue
from weightsmith.evaluating import replay_numbers
from weightsmith.evaluating.client import Served, require_model, weight_bytes
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.replay import (
    CALL,
    LARGEST,
    WITH_NUMBERS,
    ReplayQuestion,
    ReplaySet,
    ReplayToken,
)
from weightsmith.evaluating.session import ServerSession, Unanswered

Verdict: TypeAlias = Literal["proven", "different", "not shown"]
LONGEST = 64
"""Tokens of an answer in a set: what follows shows little more, and takes the pod's time."""
LEAST_TOLERANCE, MOST_TOLERANCE = 1.0, 3.0
"""Nats. Between llama.cpp's instruction sets, log-probabilities of a Q4_K_M file moved by up to 0.5
times the rest of the probability, and tokens changed at margins of up to 0.3."""
_CERTAIN = 0.03
"""Of a token that is all but certain, the part of the tolerance by which it may move."""
_DIGITS = 4
_FAR = 1e6
"""Stands for a distance that has no number."""
_HALF = 0.5
_NUMBERS_DIFFER = (
    "usually another pooling, another prompt before texts, another adapter or head, or weights that"
    " were not loaded whole"
)
_ALL_DIFFER = (
    "most answers differ: usually another chat template, another tokenizer, another adapter, or"
    " weights that were not loaded whole"
)
UNSURE = (
    "no answer has a token, before it parts, of which the tested image was sure: any model might"
    " answer so"
)
_SOME_DIFFER = (
    "a part of the answers differs: usually another quantization under the same name, a damaged"
    " layer, a kernel that computes this format wrongly, or tensor parallelism"
)


_RESIZED = (
    "the server has {} bytes of weights and the tested image had {}: usually another quantization"
    " under the same name"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeardToken:
    """A token of an answer."""

    text: str
    data: bytes
    """Its part of the text, perhaps of a character."""
    logprob: float
    margin: float | None
    id: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """An answer, with its tokens where the server lists them."""

    text: str
    finish: str
    tokens: tuple[HeardToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayDifference(JsonObject):
    """Where an answer parts from the set's."""

    question: str
    """Its id in the set."""
    token: int
    """Its number in the answer, from 0."""
    expected: str
    given: str
    """The token in its place, or the text from there on."""
    margin: float
    """Of the expected token, in nats."""
    excess: float
    """Nats beyond what rounding may do; 0 if that explains it."""
    moved: bool = False
    """Whether the token is the same and its log-probability is another."""
    numbers: bool = field(default=False, metadata=OMITTED)
    """Whether it is of a model that does not chat: `token` is the number that moved furthest, and
    `excess` is in the unit of the set's `room`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    """What a server answered to a replay set."""

    verdict: Verdict
    questions: int
    equal: int
    """Answers in which nothing differs."""
    explained: tuple[ReplayDifference, ...] = ()
    """Where answers part at a margin that rounding explains."""
    differences: tuple[ReplayDifference, ...] = ()
    why: str = ""
    """Why nothing is shown, or what the differences usually mean."""
    by_tokens: int = 0
    """Answers that were compared token by token, and not by their text."""
    room_used: tuple[float, float] = (0.0, 0.0)
    """The largest and the mean part of its room by which a token's log-probability moved."""
    seconds: float = 0.0
    tokens: int = 0
    """Written for answers in words, read for numbers."""
    hint: str = ""
    """What to do where a question got no answer."""


def heard(answer: Mapping[str, Json], *, chat: bool) -> Heard:
    """Return the answer in a response; raises ValueError if it has none, or a malformed one."""
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if chat else choice["text"]
        finish = choice.get("finish_reason")
        text = "" if text is None else text  # the server took a call out of it
        if not isinstance(text, str):
            raise TypeError("no text")
    except (LookupError, TypeError, AttributeError):
        raise ValueError("the response has no text") from None
    # JSON can contain lone surrogates, which UTF-8 cannot.
    text = text.encode("utf-8", "replace").decode()
    try:
        tokens = tuple(_tokens(choice.get("logprobs")))
    except (LookupError, TypeError, ValueError, AttributeError):
        tokens = ()
    return Heard(text=text, finish=str(finish), tokens=tokens)


def _tokens(listed: Json) -> Iterator[HeardToken]:
    """Yield the tokens of `logprobs`, as chats have them or as vLLM's completions do."""
    if not listed:
        return
    if rows := listed.get("content"):
        for row in rows:
            others = [(str(one["token"]), one["logprob"]) for one in row.get("top_logprobs") or ()]
            yield _token(row["token"], row["logprob"], others, row.get("bytes"), row.get("id"))
        return
    tops = listed.get("top_logprobs") or ()
    for number, (text, logprob) in enumerate(
        zip(listed["tokens"], listed["token_logprobs"], strict=True)
    ):
        yield _token(text, logprob, list(tops[number].items()) if number < len(tops) else [])


def _token(
    text: Json,
    logprob: Json,
    others: Sequence[tuple[str, float]],
    data: Json = None,
    number: Json = None,
) -> HeardToken:
    if not math.isfinite(logprob):
        raise ValueError("a token has no log-probability")
    # llama.cpp names all special tokens "", so the token itself is left out by its place.
    own = next((n for n, (name, _) in enumerate(others) if name == text), len(others))
    rest = [float(score) for n, (_, score) in enumerate(others) if n != own]
    return HeardToken(
        text=str(text).encode("utf-8", "replace").decode(),
        data=bytes(data) if isinstance(data, list) else str(text).encode("utf-8", "replace"),
        logprob=min(0.0, float(logprob)),
        margin=max(0.0, float(logprob) - max(rest)) if rest else None,
        id=number if type(number) is int else None,
    )


def asked_once(session: ServerSession, question: ReplayQuestion) -> Heard:
    """Send a question's request as it is; raises CheckFailed as the session does."""
    answer = session.post(question.path, dict(question.request), most=LARGEST)
    require_model(session, question.path, answer, str(question.request["model"]))
    try:
        return heard(answer, chat="messages" in question.request)
    except ValueError as error:
        raise session.failed(question.path, str(error)) from None


def numbers_once(session: ServerSession, question: ReplayQuestion) -> tuple[tuple[float, ...], int]:
    """Send a question of a model that does not chat; raises CheckFailed as the session does.

    Returns its numbers, and how many tokens the server says that it read for them.
    """
    answer = session.post(question.path, dict(question.request), most=LARGEST)
    require_model(session, question.path, answer, str(question.request["model"]))
    try:
        return replay_numbers.numbers_in(question.path, answer), _tokens_read(answer)
    except ValueError as error:
        raise session.failed(question.path, str(error)) from None


def _tokens_read(answer: Mapping[str, Json]) -> int:
    """Return what `usage` says, 0 if it says nothing; all servers count the total."""
    usage = answer.get("usage")
    read = usage.get("total_tokens") if isinstance(usage, dict) else None
    return max(read, 0) if type(read) is int else 0


def request_of(
    served: Served, item: Item, most: int, fields: Mapping[str, JsonValue]
) -> dict[str, JsonValue]:
    """Return the body that asks a question greedily, with log-probabilities."""
    wanted: dict[str, JsonValue] = {"logprobs": 2}
    if served.chat:
        wanted = {"logprobs": True, "top_logprobs": 2}
    return {**served.body(item, min(most, LONGEST)), **wanted, **fields}


def tolerance_of(largest_move: float | None) -> float:
    """Return a set's tolerance, from how far rounding the weights moved a logit in validation.

    Two tokens may part by twice that. In tenths of nats, between the limits above.
    """
    moved = 2 * largest_move if largest_move and math.isfinite(largest_move) else 0.0
    return min(MOST_TOLERANCE, max(LEAST_TOLERANCE, math.ceil(moved * 10) / 10))


def question_of(
    number: int, path: str, request: Mapping[str, JsonValue], said: Heard, tolerance: float
) -> ReplayQuestion | None:
    """Return a question with the answer that was heard; None if that cannot be held to it.

    So it is if the server lists no tokens, if they do not make up the text, or if no second token
    was listed.
    """
    joined, text = b"".join(token.data for token in said.tokens), said.text.encode()
    begin = 0 if joined.startswith(text) else joined.rfind(text)
    if begin < 0 or not said.tokens or said.finish not in ("stop", "length", CALL):
        return None
    found, at = list[ReplayToken](), -begin
    for token in said.tokens:
        at += len(token.data)
        if token.margin is None:
            return None
        rest = 1 - math.exp(token.logprob)
        found.append(
            ReplayToken(
                text=token.text,
                end=min(max(at, 0), len(text)),
                margin=round(token.margin, _DIGITS),
                logprob=round(token.logprob, _DIGITS) + 0.0,
                room=round(tolerance * (rest + _CERTAIN), _DIGITS),
                id=token.id,
            )
        )
    return ReplayQuestion(
        id=str(number),
        path=path,
        request=request,
        answer=said.text,
        finish=said.finish,
        tokens=tuple(found),
    )


def recorded_question(
    number: int, path: str, request: Mapping[str, JsonValue], row: Mapping[str, JsonValue]
) -> ReplayQuestion | None:
    """Return a question with an answer that transformers gave; None if it has no margins.

    `row` has `answer`, `finish_reason`, and `token_ends` and `margins` as numbers in a text.
    """
    text, most = row.get("answer"), request["max_tokens"]
    ends = [int(one) for one in str(row.get("token_ends", "")).split()]
    margins = [float(one) for one in str(row.get("margins", "")).split()]
    if not isinstance(text, str) or not isinstance(most, int) or "raw" in row or not ends:
        return None
    if len(ends) != len(margins) or max(ends) > len(text) or not all(map(math.isfinite, margins)):
        return None
    cut = len(ends) > most
    pairs = list(zip(ends, margins, strict=True))[:most]
    text = text[: pairs[-1][0]] if cut else text
    tokens, before = list[ReplayToken](), 0
    for number_, (end, margin) in enumerate(pairs):
        end = len(text) if number_ == len(pairs) - 1 else max(end, before)
        size = len(text[:end].encode())
        tokens.append(
            ReplayToken(text=text[before:end], end=size, margin=round(max(margin, 0.0), _DIGITS))
        )
        before = end
    return ReplayQuestion(
        id=str(number),
        path=path,
        request=request,
        answer=text,
        finish="length" if cut else str(row.get("finish_reason")),
        tokens=tuple(tokens),
    )


def difference(question: ReplayQuestion, said: Heard, tolerance: float) -> ReplayDifference | None:
    """Return where an answer parts from the set's first; None if nothing differs."""
    tokens = question.tokens
    if said.tokens and all(token.logprob is not None for token in tokens):
        found = _by_token(question, said)
        if found is None:
            return None
        place, given, moved = found
    elif said.text == question.answer:
        return None
    else:
        own, other = question.answer.encode(), said.text.encode()
        same = next(
            (n for n, (a, b) in enumerate(zip(own, other, strict=False)) if a != b),
            min(len(own), len(other)),
        )
        places = (n for n, token in enumerate(tokens) if token.end > same)
        place, moved = next(places, len(tokens) - 1), 0.0
        given = other[same:][:80].decode("utf-8", "replace")
    token = tokens[place]
    beyond = moved - (token.room or 0.0) if moved else token.margin - tolerance
    return ReplayDifference(
        question=question.id,
        token=place,
        expected=token.text,
        given=given,
        margin=token.margin,
        excess=round(max(0.0, beyond), _DIGITS),
        moved=bool(moved),
    )


def moved_numbers(
    question: ReplayQuestion, given: Sequence[float]
) -> tuple[float, ReplayDifference | None]:
    """Return by which part of its room an answer moved, and what differs, if that is more."""
    own = question.numbers
    moved = replay_numbers.distance(question.path, own, given)
    used = moved / question.room
    if moved <= question.room:
        return used, None
    pairs = list(zip(own, given, strict=False))
    place = max(range(len(pairs)), key=lambda n: abs(pairs[n][0] - pairs[n][1]))
    said = f"{given[place]:g}" if len(own) == len(given) else f"{len(given)} numbers"
    return used, ReplayDifference(
        question=question.id,
        token=place,
        expected=f"{own[place]:g}" if len(own) == len(given) else f"{len(own)} numbers",
        given=said,
        margin=0.0,
        excess=round(min(moved - question.room, _FAR), _DIGITS + 2),
        moved=True,
        numbers=True,
    )


def _by_token(question: ReplayQuestion, said: Heard) -> tuple[int, str, float] | None:
    """Return the first token that differs: its number, what came, and how far it moved."""
    pairs = zip(question.tokens, said.tokens, strict=False)
    for number, (token, given) in enumerate(pairs):
        if token.text != given.text:
            return number, given.text, 0.0
        moved = abs(given.logprob - (token.logprob or 0.0))
        if moved > (token.room or 0.0):
            return number, given.text, moved
    if len(said.tokens) == len(question.tokens):
        return None
    if len(said.tokens) < len(question.tokens):
        return len(said.tokens), "", 0.0
    return len(question.tokens) - 1, said.tokens[len(question.tokens)].text, 0.0


def _room_used(question: ReplayQuestion, said: Heard) -> Iterator[float]:
    """Yield by which part of its room each token moved, up to one in whose place another came."""
    for token, given in zip(question.tokens, said.tokens, strict=False):
        if token.text != given.text or not token.room or token.logprob is None:
            return
        yield min(abs(given.logprob - token.logprob) / token.room, _FAR)


def _decides(tokens: Sequence[ReplayToken], tolerance: float) -> bool:
    """Return whether another token in the place of one of these would be a fault."""
    return any(token.margin > tolerance for token in tokens)


def replay(session: ServerSession, wanted: ReplaySet, progress: Progress) -> Replayed:
    """Return how a server's answers compare with the set's.

    A server that does not answer a question shows nothing; which one and why is said. Nor do
    answers without a token of which the tested image was sure. One that says that it has weights of
    another size is different, whatever it answers.
    """
    size = weight_bytes(session) if wanted.weight_bytes else 0
    resized = size and size != wanted.weight_bytes
    equal, by_tokens, tokens, decided, began = 0, 0, 0, False, time.monotonic()
    found, used, why, hint = list[ReplayDifference](), list[float](), "", ""
    for number, question in enumerate(wanted.questions, start=1):
        try:
            if question.numbers:
                given, read = numbers_once(session, question)
                part, parted = moved_numbers(question, given)
                tokens += read
                used.append(min(part, _FAR))
                decided |= parted is None
                equal += parted is None
                found += [parted] if parted else []
                progress.advance(number, len(wanted.questions), "questions")
                continue
            said = asked_once(session, question)
        except (CheckFailed, EnvironmentFailure) as error:
            why = f"question {question.id} got no answer: {error.message}"
            # Of an answer that is wrong, the hint would be about the question.
            hint = error.hint if isinstance(error, EnvironmentFailure) else ""
            break
        listed = bool(said.tokens and question.tokens[0].logprob is not None)
        if question.finish == CALL and not listed:
            why = f"question {question.id} is answered by a call, and the server lists no tokens"
            break
        parted = difference(question, said, wanted.tolerance)
        came = question.tokens[: parted.token] if parted else question.tokens
        decided |= _decides(came, wanted.tolerance)
        by_tokens += listed
        used += _room_used(question, said)
        tokens += len(said.tokens) or len(question.tokens)
        equal += parted is None
        found += [parted] if parted else []
        progress.advance(number, len(wanted.questions), "questions")
    wrong = tuple(one for one in found if one.excess > 0)
    count = len(wanted.questions)
    if not (why or wrong or decided):
        why = UNSURE
    verdict: Verdict = "different" if wrong or resized else "not shown" if why else "proven"
    if resized:
        why = _RESIZED.format(size, wanted.weight_bytes)
    elif wrong and wrong[0].numbers:
        why = f"{len(wrong)} of {count} answers differ: {_NUMBERS_DIFFER}"
    elif wrong:
        why = _ALL_DIFFER if len(wrong) > _HALF * count else _SOME_DIFFER
    return Replayed(
        verdict=verdict,
        questions=count,
        equal=equal,
        explained=tuple(one for one in found if not one.excess),
        differences=wrong,
        why=why,
        by_tokens=by_tokens,
        room_used=(round(max(used), _DIGITS), round(fmean(used), _DIGITS)) if used else (0.0, 0.0),
        seconds=round(time.monotonic() - began, 3),
        tokens=tokens,
        hint=hint,
    )


def described(one: ReplayDifference) -> str:
    """Return a difference in a sentence."""
    if one.numbers:
        return (
            f"question {one.question}: {one.given} instead of {one.expected} (number {one.token}),"
            f" {one.excess:g} beyond what rounding explains"
        )
    if one.moved:
        return (
            f"question {one.question}, token {one.token} {one.expected!r}: its log-probability"
            f" moved {one.excess:g} nats further than rounding explains"
        )
    return (
        f"question {one.question}, token {one.token}: {one.given!r} instead of {one.expected!r},"
        f" {one.excess:g} nats beyond what rounding explains"
    )


def record(
    session: ServerSession,
    questions: Sequence[tuple[str, Mapping[str, JsonValue]]],
    model: str,
    tolerance: float,
    progress: Progress,
    references: Sequence[str] = (),
) -> ReplaySet | None:
    """Return the set of a server's own answers to these paths and requests; None if it has none.

    Questions that it refuses, or whose tokens it does not list, are left out. `references` are the
    recorded answers of the float32 reference, for those that are answered by numbers.
    """
    found = list[ReplayQuestion]()
    for number, (path, request) in enumerate(questions, start=1):
        asked = ReplayQuestion(
            id=str(number), path=path, request=request, answer="", finish="", tokens=()
        )
        try:
            if path in replay_numbers.PATHS:
                found.append(replace(asked, numbers=numbers_once(session, asked)[0]))
                progress.advance(number, len(questions), "replay questions")
                continue
            said = asked_once(session, asked)
        except Unanswered:
            continue
        made = question_of(number, path, request, said, tolerance)
        found += [made] if made else []
        progress.advance(number, len(questions), "replay questions")
    size = weight_bytes(session) if found else 0
    whole = ReplaySet(model=model, tolerance=tolerance, questions=tuple(found), weight_bytes=size)
    return within_limits(_with_rooms(whole, references))


def _with_rooms(made: ReplaySet, references: Sequence[str]) -> ReplaySet:
    """Return a set with the room of numbers, the same for all questions at one path."""
    pairs = dict[str, list[tuple[Sequence[float], Sequence[float]]]]()
    for one in made.questions:
        if one.numbers:
            text = references[int(one.id) - 1] if references else ""
            told = replay_numbers.reference_of(one.path, text)
            pairs.setdefault(one.path, []).append((one.numbers, told))
    if not pairs:
        return made
    rooms = {path: replay_numbers.room_of(path, answers) for path, answers in pairs.items()}
    questions = tuple(
        replace(one, room=rooms[one.path]) if one.numbers else one for one in made.questions
    )
    return replace(made, version=WITH_NUMBERS, questions=questions)


def within_limits(made: ReplaySet) -> ReplaySet | None:
    """Return a set without the last of its questions that its file has no room for; None if none.

    The digest depends on the set, so it is small enough, or another question is left out. A set
    that could prove nothing, because the model was sure of no token, is none.
    """
    kept = list(made.questions)
    while kept and (
        len(replace(made, questions=tuple(kept)).data) > LARGEST
        or sum(len(one.numbers) for one in kept) > replay_numbers.MOST
    ):
        kept.pop()
    if not any(one.numbers or _decides(one.tokens, made.tolerance) for one in kept):
        return None
    return replace(made, questions=tuple(kept))
