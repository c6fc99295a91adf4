"""Client of an OpenAI-compatible server: health, model list, many questions."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice

import httpx

from weightsmith.core.errors import CheckFailed
from weightsmith.core.network import DeadlineTransport
from weightsmith.core.ports import Endpoint, Progress
from weightsmith.core.values import JsonValue
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.session import ServerSession, died

_POLL_SECONDS = 0.05
_PROBE_SECONDS = 5.0

Ask = Callable[[Item], Mapping[str, JsonValue]]


def wait_until_healthy(
    endpoint: Endpoint, health_path: str, limit_seconds: float, *, poll: float = _POLL_SECONDS
) -> float:
    """Wait until the health path returns 200; return the seconds waited.

    Raises CheckFailed with the server's last log lines if it stops or the time is up.
    """
    started = time.monotonic()
    last = "no response"
    transport = DeadlineTransport()
    with httpx.Client(base_url=endpoint.url, transport=transport, trust_env=False) as http:
        while (waited := time.monotonic() - started) < limit_seconds:
            if not endpoint.alive():
                raise died(endpoint, f"before it was ready, after {waited:.1f} s")
            try:
                # Only read the status: the body may be endless.
                with transport.within(_PROBE_SECONDS), http.stream("GET", health_path) as answer:
                    status = answer.status_code
            except httpx.HTTPError as error:
                last = type(error).__name__
            else:
                if status == httpx.codes.OK:
                    return time.monotonic() - started
                last = f"the last response was HTTP {status}"
            time.sleep(poll)
    lines = endpoint.logs(15).strip()
    raise CheckFailed(
        f"the server was not ready after {limit_seconds:g} s: {last}"
        + (f"\n{lines}" if lines else ""),
        hint="a large model on a slow disk may need more time",
    )


def check_served_name(session: ServerSession, served_name: str) -> None:
    """Raise CheckFailed unless the server lists the model."""
    names = served_names(session)
    if served_name not in names:
        raise CheckFailed(
            f"the server does not serve {served_name!r}, but {', '.join(names) or 'nothing'}",
            hint="check the port and the image",
        )


def served_names(session: ServerSession) -> list[str]:
    """Return the names of the server's models."""
    rows = session.get("/v1/models").get("data")
    if not isinstance(rows, list):
        return []
    return [str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row]


def first_name(session: ServerSession) -> str:
    """Return the server's first model; raise CheckFailed if it lists none."""
    names = served_names(session)
    if not names:
        raise CheckFailed(
            f"{session.endpoint.shown}/v1/models lists no model",
            hint="check that the server is OpenAI-compatible, or name the model with --served-name",
        )
    return names[0]


def ask_all(
    items: Sequence[Item], ask: Ask, progress: Progress, *, concurrency: int = 1
) -> tuple[Mapping[str, JsonValue], ...]:
    """Return the answers in order, each with the `seconds` that it took, or once took.

    One at a time by default, because batching changes the order of sums in a server and so answers
    that are nearly tied. If `ask` raises, the remaining items are not asked.
    """

    def timed(item: Item) -> Mapping[str, JsonValue]:
        began = time.monotonic()
        said = ask(item)
        return {"seconds": round(time.monotonic() - began, 4), **said}

    answers = []
    with _mapping(concurrency) as in_order:
        for number, answer in enumerate(in_order(timed, items), start=1):
            answers.append(answer)
            progress.advance(number, len(items), "items")
    return tuple(answers)


_Map = Callable[
    [Callable[[Item], Mapping[str, JsonValue]], Sequence[Item]], Iterator[Mapping[str, JsonValue]]
]


@contextmanager
def _mapping(concurrency: int) -> Iterator[_Map]:
    """Yield a `map` with `concurrency` calls at once, which submits only a few calls ahead."""
    if concurrency <= 1:
        yield map
        return
    with ThreadPoolExecutor(concurrency) as pool:

        def ahead(
            call: Callable[[Item], Mapping[str, JsonValue]], items: Sequence[Item]
        ) -> Iterator[Mapping[str, JsonValue]]:
            waiting = iter(items)
            pending = [pool.submit(call, item) for item in islice(waiting, 4 * concurrency)]
            while pending:
                yield pending.pop(0).result()
                pending += [pool.submit(call, item) for item in islice(waiting, 1)]

        try:
            yield ahead
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
