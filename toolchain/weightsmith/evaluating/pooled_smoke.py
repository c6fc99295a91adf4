"""Smoke test of a started image whose model does not chat: vectors, scores of pairs, labels.

What users will do: one text, one that is too long, the planned number at once, SIGTERM while texts
are read, restart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Event

from weightsmith.core.errors import CheckFailed
from weightsmith.core.values import Json, JsonValue
from weightsmith.evaluating.client import check_served_name
from weightsmith.evaluating.session import ServerSession, excerpt
from weightsmith.evaluating.smoke import (
    MOST_AT_ONCE,
    Asking,
    CameLate,
    Promise,
    Smoke,
    answered,
    stopped,
)
from weightsmith.serving.pooling import ASKED

_UNIT = 1e-2
"""How far the length of a vector may be from 1, where it is said to be 1."""
_WORDY = 32
"""More tokens than a word and its separator have with any vocabulary; a pair has two texts."""
_MALFORMED = (LookupError, TypeError, ValueError, AttributeError)


def check_pooling(smoke: Smoke, session: ServerSession, promise: Promise) -> None:
    """Check a healthy server of a model that does not chat.

    Raises CheckFailed with the check's name and the server's last log lines.
    """

    def listed() -> str:
        check_served_name(session, promise.served.name)
        return f"serves {promise.served.name}"

    smoke.check("model list", session, listed)
    smoke.check(promise.task.kind, session, lambda: ask_pooled(session, promise))
    smoke.check("context limit", session, lambda: _context(session, promise))
    count = min(promise.max_num_seqs, MOST_AT_ONCE)
    smoke.check(f"{count} requests at once", session, lambda: _at_once(session, promise, count))


def ask_pooled(session: ServerSession, promise: Promise) -> str:
    """Ask once, and return what the answer is; raise CheckFailed if it is none of its kind."""
    path, body = ASKED[promise.task.kind]
    answer = session.post(path, {"model": promise.served.name, **body})
    try:
        return _seen(answer, body, promise)
    except _MALFORMED as error:
        why = f"{type(error).__name__}: {error}; it answered {excerpt(str(answer))}"
        raise session.failed(path, f"the answer is no {promise.task.kind}: {why}") from None


def _seen(answer: Mapping[str, Json], asked: Mapping[str, JsonValue], promise: Promise) -> str:
    """Return what a sound answer says; raises ValueError and its like for any other."""
    labels = promise.task.labels
    match promise.task.kind:
        case "embed":
            (row,) = answer["data"]
            vector = _numbers(row["embedding"])
            if promise.width and len(vector) != promise.width:
                raise ValueError(f"a vector of {len(vector)} numbers, not {promise.width}")
            length = math.hypot(*vector)
            if not length or (promise.task.sentence.normalizes and abs(length - 1) > _UNIT):
                raise ValueError(f"a vector of the length {length:g}")
            return f"{len(vector)} numbers, length {length:.3f}"
        case "rerank":
            rows, documents = answer["results"], asked["documents"]
            scores = _numbers([row["relevance_score"] for row in rows])
            places = sorted(row["index"] for row in rows)
            if not isinstance(documents, list) or places != list(range(len(documents))):
                raise ValueError("not each document has a score")
            return f"scores {', '.join(f'{score:.4f}' for score in scores)}"
        case "classify":
            (row,) = answer["data"]
            scores = _numbers(row["probs"])
            if len(scores) != len(labels) or row["label"] not in labels:
                raise ValueError(f"{len(scores)} scores, label {row['label']!r}")
            return f"{row['label']} of {len(labels)} labels"
        case _:
            (row,) = answer["data"]
            tokens = [_numbers(one) for one in row["data"]]
            if not tokens or {len(one) for one in tokens} != {len(labels)}:
                raise ValueError(f"not {len(labels)} scores for each token")
            return f"{len(tokens)} tokens, {len(labels)} labels each"


def _numbers(values: Json) -> list[float]:
    found = [float(value) for value in values if not isinstance(value, bool)]
    if not found or len(found) != len(values) or not all(map(math.isfinite, found)):
        raise ValueError("not all are finite numbers")
    return found


def _long(promise: Promise, words: int) -> dict[str, JsonValue]:
    """Return a request with texts of so many words."""
    _, body = ASKED[promise.task.kind]
    text = " ".join(f"word {number % 10}" for number in range(words // 2 + 1))
    changed = {key: [text] if isinstance(value, list) else text for key, value in body.items()}
    return {"model": promise.served.name, **changed}


def _context(session: ServerSession, promise: Promise) -> str:
    path, _ = ASKED[promise.task.kind]
    # At least one token per word with any vocabulary.
    answer = session.try_post(path, _long(promise, promise.max_model_len + 64))
    said = excerpt(answer.text)
    if not session.endpoint.alive():
        raise session.failed(path, "the server stopped after a too long text")
    if answer.status < 400:  # llama.cpp's encoders answer 500
        raise session.failed(
            path, f"a text longer than {promise.max_model_len} tokens got HTTP {answer.status}"
        )
    return f"HTTP {answer.status}: {said}"


def _at_once(session: ServerSession, promise: Promise, count: int) -> str:
    with ThreadPoolExecutor(count) as pool:
        for one in [pool.submit(ask_pooled, session, promise) for _ in range(count)]:
            one.result()
    return f"{count} answers"


def _end(session: ServerSession, stop: Callable[[float], int | None], promise: Promise) -> str:
    """Stop the server while it reads a text: the request must be answered.

    A lost one counts as late, and is tried again. A server may have accepted a text and not begun
    to read it: then llama.cpp answers 503, and vLLM's engine refuses what its front end hands over
    after SIGTERM (0.32, v1/engine/core.py, `_reject_add_in_shutdown`). Nothing that a server says
    tells when it has begun, and a text is read too quickly to ask.
    """
    path, _ = ASKED[promise.task.kind]
    body, sent = _long(promise, max(1, promise.max_model_len // _WORDY)), Event()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(answered, session, path, body, sent)
        sent.wait()
        session.get("/v1/models")  # servers accept in this order: the other is running by now
        end = stopped(stop(promise.grace_seconds), promise.grace_seconds)
        try:
            return f"{end}; {running.result()}"
        except CheckFailed as error:
            raise CameLate(error.message, hint=error.hint) from None


POOLING = Asking(once=ask_pooled, end=_end)
