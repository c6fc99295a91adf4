"""Asks an OpenAI-compatible server: is it ready, what does it serve, what does it answer."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice

import httpx

from weightsmith.errors import CheckFailed
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.session import ServerSession, died, excerpt
from weightsmith.evaluating.timely import Timely
from weightsmith.ports import Endpoint, Progress
from weightsmith.values import Json

_POLL_SECONDS = 0.05
_PROBE_SECONDS = 5.0
_DATED = re.compile(r"-\d{4}-\d\d-\d\d")
"""What hosted servers add to a model's name to say which of its versions answered."""

Ask = Callable[[Item], Mapping[str, Json]]


def wait_until_healthy(
    endpoint: Endpoint, health_path: str, limit_seconds: float, *, poll: float = _POLL_SECONDS
) -> float:
    """Return the seconds until the server answered 200 on its health path.

    Raises CheckFailed with the server's last log lines when it dies or the time is over.
    """
    started = time.monotonic()
    last = "nothing answered"
    transport = Timely()
    with httpx.Client(base_url=endpoint.url, transport=transport, trust_env=False) as http:
        while (waited := time.monotonic() - started) < limit_seconds:
            if not endpoint.alive():
                raise died(endpoint, f"before it was ready, after {waited:.1f} s")
            try:
                # The status is what counts: a body may have no end.
                with transport.within(_PROBE_SECONDS), http.stream("GET", health_path) as answer:
                    status = answer.status_code
            except httpx.HTTPError as error:
                last = type(error).__name__
            else:
                if status == httpx.codes.OK:
                    return time.monotonic() - started
                last = f"the last answer was HTTP {status}"
            time.sleep(poll)
    lines = endpoint.logs(15).strip()
    raise CheckFailed(
        f"the server was not ready after {limit_seconds:g} s: {last}"
        + (f"\n{lines}" if lines else ""),
        hint="a large model on a slow disk may need longer",
    )


def check_served_name(session: ServerSession, served_name: str) -> None:
    """Raise CheckFailed unless the server lists the model by that name."""
    names = served_names(session)
    if served_name not in names:
        raise CheckFailed(
            f"the server has no model {served_name!r}; it serves {', '.join(names) or 'nothing'}",
            hint="is this the right port, and the right image?",
        )


def served_names(session: ServerSession) -> list[str]:
    """Return the models that the server lists."""
    rows = session.get("/v1/models").get("data")
    if not isinstance(rows, list):
        return []
    return [str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row]


def first_name(session: ServerSession) -> str:
    """Return the first model that the server lists; CheckFailed where it lists none."""
    names = served_names(session)
    if not names:
        raise CheckFailed(
            f"{session.endpoint.shown}/v1/models lists no model",
            hint="is it an OpenAI-compatible server? else name the model with --served-name",
        )
    return names[0]


def chat_body(served_name: str, item: Item, max_tokens: int, *, stream: bool = False) -> Json:
    """Return a greedy chat request."""
    return {
        "model": served_name,
        "messages": [dict(message) for message in item.messages],
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 0,
        "stream": stream,
    }


def chat(
    session: ServerSession, served_name: str, item: Item, max_tokens: int
) -> Mapping[str, Json]:
    """Return `{answer, finish_reason}` of one greedy chat request.

    Raises CheckFailed, after retries where they may help, when the server fails, hangs, sends
    half an answer, too large a one or another model's; and with its last lines when it died.
    """
    path = "/v1/chat/completions"
    answer = session.post(path, chat_body(served_name, item, max_tokens))
    check_model(session, path, served_name, answer)
    try:
        choice = answer["choices"][0]
        content = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise CheckFailed(
            f"the server's answer has no message: {excerpt(json.dumps(answer))}",
            hint="does it speak the OpenAI chat API?",
        ) from None
    return {
        # JSON can hold halves of a surrogate pair, which no file can.
        "answer": content.encode("utf-8", "replace").decode() if isinstance(content, str) else "",
        "finish_reason": choice.get("finish_reason"),
    }


def check_model(
    session: ServerSession, path: str, served_name: str, answer: Mapping[str, Json]
) -> None:
    """Raise CheckFailed where an answer says that another model gave it."""
    said = answer.get("model")
    if not isinstance(said, str) or said == served_name:
        return
    if said.startswith(served_name) and _DATED.fullmatch(said.removeprefix(served_name)):
        return
    raise session.failed(path, f"asked for {served_name!r}, the model {said!r} answered")


def ask_all(
    items: Sequence[Item], ask: Ask, progress: Progress, *, concurrency: int = 1
) -> tuple[Mapping[str, Json], ...]:
    """Return what a server answers, in order, each with the `seconds` that it took.

    One at a time by default: batching changes the order of sums in a server, and so an answer
    that is nearly a tie. Raises what `ask` raises; what was not yet asked then stays unasked.
    """

    def timed(item: Item) -> Mapping[str, Json]:
        began = time.monotonic()
        said = ask(item)
        return {**said, "seconds": round(time.monotonic() - began, 4)}

    answers = []
    with _mapping(concurrency) as in_order:
        for number, answer in enumerate(in_order(timed, items), start=1):
            answers.append(answer)
            progress.advance(number, len(items), "items")
    return tuple(answers)


_Map = Callable[
    [Callable[[Item], Mapping[str, Json]], Sequence[Item]], Iterator[Mapping[str, Json]]
]


@contextmanager
def _mapping(concurrency: int) -> Iterator[_Map]:
    """Yield a `map` with so many calls at once, that starts no more than are wanted soon."""
    if concurrency <= 1:
        yield map
        return
    with ThreadPoolExecutor(concurrency) as pool:

        def ahead(
            call: Callable[[Item], Mapping[str, Json]], items: Sequence[Item]
        ) -> Iterator[Mapping[str, Json]]:
            waiting = iter(items)
            pending = [pool.submit(call, item) for item in islice(waiting, 4 * concurrency)]
            while pending:
                yield pending.pop(0).result()
                pending += [pool.submit(call, item) for item in islice(waiting, 1)]

        try:
            yield ahead
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
