"""Metric `choice`: the continuation with the highest likelihood on a server.

A prompt is continued as text, as in lm-evaluation-harness (after one space, no chat template);
messages are rendered by the model's chat template if it has one and the server can apply it.

vLLM and SGLang echo the prompt with log-probabilities. llama.cpp does not, but gives the next
token's, so a choice is scored token by token with a cached prompt. Constraining the answer to the
choices would score another distribution.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence

from weightsmith.core.errors import CheckFailed, UsageError
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Json, JsonValue
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.session import ServerSession, excerpt

Scorer = Callable[[Item, str], float]
"""Returns the log-likelihood (natural logarithm) of a choice of an item."""

_COMPLETIONS = "/v1/completions"
_FEW, _MANY = 128, 16
_MALFORMED = (ArithmeticError, LookupError, TypeError, ValueError)
"""What reading a response raises that is not as it should be."""
_LONG_LIST = 64 << 20
"""Maximum size of a response that lists every token of a vocabulary."""


def spaced(context: str, choice: str) -> str:
    """Return a choice with a space before it, unless context or choice already has one."""
    apart = not context or context[-1].isspace() or choice[:1].isspace()
    return choice if apart else f" {choice}"


def choose(item: Item, scores: Sequence[float]) -> Mapping[str, JsonValue]:
    """Return the most likely choice as the answer, with all log-likelihoods."""
    best = max(range(len(scores)), key=lambda place: scores[place])
    return {
        "answer": item.choices[best],
        "log_likelihoods": [round(score, 5) for score in scores],
    }


def supports_echo(session: ServerSession, served: Served) -> bool:
    """Return whether a server returns log-probabilities of prompt tokens."""
    probe = session.try_post(_COMPLETIONS, _echo(served.name, "One two three"))
    return _token_scores(probe.text) is not None


def scorer(session: ServerSession, served: Served) -> Scorer:
    """Return a function that scores choices on this server, by a method that it supports.

    Raises CheckFailed with the server's response if it supports none.
    """
    probe = session.try_post(_COMPLETIONS, _echo(served.name, "One two three"))
    if _token_scores(probe.text) is not None:
        return lambda item, choice: _by_echo(session, served, item, choice)
    tokenized = session.try_post("/tokenize", {"content": "One two"})
    if tokenized.status == 200 and '"tokens"' in tokenized.text:  # llama.cpp
        return lambda item, choice: _by_steps(session, served, item, choice)
    raise CheckFailed(
        f"{session.endpoint.shown} does not return log-probabilities of prompts, which metric"
        f" choice needs; {_COMPLETIONS} with echo and logprobs: HTTP {probe.status}:"
        f" {excerpt(probe.text)}",
        hint="use vLLM, SGLang or llama.cpp, evaluate the checkpoint with --model, or use metric"
        " contains",
    )


def _echo(served_name: str, prompt: str | Sequence[int]) -> dict[str, JsonValue]:
    return {
        "model": served_name,
        "prompt": prompt,
        "max_tokens": 1,  # some servers reject 0
        "temperature": 0.0,
        "seed": 0,
        "logprobs": 1,
        "echo": True,
    }


def _token_scores(text: str) -> tuple[list[str], list[float | None], list[int]] | None:
    """Return tokens, log-probabilities and text offsets of an echoed prompt, or None."""
    try:
        scored = parse(text)["choices"][0]["logprobs"]
        tokens, rows = list(scored["tokens"]), list(scored["token_logprobs"])
        scores = [None if row is None else float(row) for row in rows]
    except _MALFORMED:
        return None
    # A single token is the generated one: the prompt was not echoed.
    texts = all(isinstance(token, str) for token in tokens)
    if not texts or len(tokens) < 2 or len(tokens) != len(scores):
        return None
    offsets = scored.get("text_offset")
    given = isinstance(offsets, list) and all(type(offset) is int for offset in offsets)
    if not given or len(offsets) != len(tokens):
        offsets, place = [], 0
        for token in tokens:
            offsets.append(place)
            place += len(token)
    return tokens, scores, offsets


def _by_echo(session: ServerSession, served: Served, item: Item, choice: str) -> float:
    context = item.prompt
    whole = context + spaced(context, choice)
    asked: str | list[int] = whole
    before: list[int] = []
    if not item.plain:  # messages by token ids: vLLM's /tokenize applies the chat template
        before = _tokenized(session, served, served.question(item))
        reply = _tokenized(session, served, {"prompt": choice, "add_special_tokens": False})
        asked = [*before, *reply]
    scored = _token_scores(json.dumps(session.post(_COMPLETIONS, _echo(served.name, asked))))
    if scored is None or (not item.plain and len(scored[1]) < len(asked)):
        raise session.failed(_COMPLETIONS, "the response has no log-probabilities of the prompt")
    tokens, scores, offsets = scored
    if not item.plain:
        return sum(score for score in scores[len(before) : len(asked)] if score is not None)
    # A begin token may precede the text, with or without text of its own.
    shift = offsets[0]
    total = 0.0
    for token, score, offset in zip(tokens, scores, offsets, strict=True):
        begins = offset - shift
        if begins < len(whole) and begins + len(token) > len(context) and score is not None:
            total += score
    return total


def _tokenized(session: ServerSession, served: Served, what: Mapping[str, JsonValue]) -> list[int]:
    answer = session.try_post("/tokenize", {"model": served.name, **what})
    try:
        return [int(token) for token in parse(answer.text)["tokens"]]
    except _MALFORMED:
        raise UsageError(
            f"{session.endpoint.shown} cannot apply its chat template outside of chat requests"
            f" (/tokenize: HTTP {answer.status})",
            hint='for metric choice use "prompt" instead of "messages", or use --model',
        ) from None


def _by_steps(session: ServerSession, served: Served, item: Item, choice: str) -> float:
    """Score a choice token by token: llama.cpp returns only next-token probabilities.

    With the prompt cache, each step computes one token.
    """
    if item.plain:
        context = item.prompt
        tail = spaced(context, choice)
    else:
        asked: Mapping[str, Json] = served.question(item)
        if served.chat:
            asked = session.post("/apply-template", asked)
        if not isinstance(asked.get("prompt"), str):
            raise session.failed("/apply-template", "the response has no prompt")
        context, tail = asked["prompt"], choice
    pieces = []
    for text in (context, context + tail):
        body: JsonValue = {"content": text, "add_special": True, "parse_special": True}
        answer = session.post("/tokenize", body)
        try:
            pieces.append([int(token) for token in answer["tokens"]])
        except _MALFORMED:
            raise session.failed("/tokenize", "the response has no list of tokens") from None
    before, whole = pieces
    shared = next(
        (n for n, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before)
    )
    return sum(_next_score(session, whole[:n], whole[n]) for n in range(shared, len(whole)))


def _next_score(session: ServerSession, prefix: Sequence[int], token: int) -> float:
    """Return a token's log-probability after a prefix, requesting more tokens until it is listed.

    Raises CheckFailed if the server never lists it.
    """
    count = _FEW
    while True:
        body: dict[str, JsonValue] = {
            "prompt": list(prefix),
            "n_predict": 1,
            "n_probs": count,
            "temperature": 0.0,
            "cache_prompt": True,
        }
        scored = session.post("/completion", body, most=_LONG_LIST)
        try:
            rows = scored["completion_probabilities"][0]["top_logprobs"]
            listed = {int(row["id"]): float(row["logprob"]) for row in rows}
        except _MALFORMED:
            raise session.failed("/completion", "the response has no log-probabilities") from None
        if token in listed:
            score = listed[token]
            return score if math.isfinite(score) else -1e3
        if len(rows) < count:
            raise session.failed("/completion", f"token {token} has no log-probability")
        count *= _MANY
