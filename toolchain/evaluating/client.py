"""Asks an OpenAI-compatible server, and gives up in time."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import httpx

from toolchain.errors import CheckFailed, WeightsmithError
from toolchain.evaluating.items import Item
from toolchain.ports import Endpoint, Progress
from toolchain.values import Json

_POLL_SECONDS = 0.25
_LOG_LINES = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What an answer may cost, in seconds and bytes."""

    request_seconds: float = 120.0
    """From sending a question to the last byte of its answer."""
    tries: int = 3
    pause_seconds: float = 1.0
    """Before the second try; doubled before each further one."""
    answer_bytes: int = 4 << 20


class _TryAgain(Exception):
    """A failure that another try may not meet."""


class _Refused(Exception):
    """A failure that every try would meet."""


def wait_until_healthy(
    endpoint: Endpoint, health_path: str, limit_seconds: float, *, poll: float = _POLL_SECONDS
) -> float:
    """Return the seconds until the server answered 200 on its health path.

    Raises CheckFailed with the server's last log lines when it dies or the time is over.
    """
    started = time.monotonic()
    last = "nothing answered"
    with httpx.Client(base_url=endpoint.url, timeout=5.0, trust_env=False) as http:
        while (waited := time.monotonic() - started) < limit_seconds:
            if not endpoint.alive():
                raise _died(endpoint, f"before it was ready, after {waited:.1f} s")
            try:
                status = http.get(health_path).status_code
            except httpx.HTTPError as error:
                last = type(error).__name__
            else:
                if status == httpx.codes.OK:
                    return time.monotonic() - started
                last = f"the last answer was HTTP {status}"
            time.sleep(poll)
    raise CheckFailed(
        f"the server was not ready after {limit_seconds:g} s: {last}{_log(endpoint)}",
        hint="a large model on a slow disk may need longer",
    )


def check_served_name(endpoint: Endpoint, served_name: str, limits: Limits | None = None) -> None:
    """Raise CheckFailed unless the server lists the model by that name."""
    answer = _ask(endpoint, "GET", "/v1/models", None, limits or Limits())
    rows = answer.get("data")
    names = [str(row.get("id")) for row in rows if isinstance(row, dict)] if rows else []
    if served_name not in names:
        raise CheckFailed(
            f"the server has no model {served_name!r}; it serves {', '.join(names) or 'nothing'}",
            hint="is this the right port, and the right image?",
        )


def chat(
    endpoint: Endpoint,
    served_name: str,
    item: Item,
    max_tokens: int,
    limits: Limits | None = None,
) -> Mapping[str, Json]:
    """Return `{answer, finish_reason}` of one greedy chat request.

    Raises CheckFailed, after retries where they may help, when the server fails, hangs, sends
    half an answer or too large a one; and with its last log lines when it died.
    """
    body = {
        "model": served_name,
        "messages": [dict(message) for message in item.messages],
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 0,
        "stream": False,
    }
    answer = _ask(endpoint, "POST", "/v1/chat/completions", body, limits or Limits())
    try:
        choice = answer["choices"][0]
        content = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        raise CheckFailed(
            f"the server's answer has no message: {_excerpt(json.dumps(answer))}",
            hint="does it speak the OpenAI chat API?",
        ) from None
    return {
        "answer": content if isinstance(content, str) else "",
        "finish_reason": choice.get("finish_reason"),
    }


def ask_all(
    endpoint: Endpoint,
    served_name: str,
    items: Sequence[Item],
    max_tokens: int,
    progress: Progress,
    limits: Limits | None = None,
) -> tuple[str, ...]:
    """Return the greedy answers of a server, in order, asked one at a time.

    One at a time because batching changes the order of sums, and so an answer that is nearly a
    tie. Raises what `chat` raises.
    """
    answers = []
    for number, item in enumerate(items, start=1):
        answers.append(str(chat(endpoint, served_name, item, max_tokens, limits)["answer"]))
        progress.advance(number, len(items), "items")
    return tuple(answers)


def _ask(
    endpoint: Endpoint, method: str, path: str, body: Json, limits: Limits
) -> Mapping[str, Json]:
    pause = limits.pause_seconds
    for attempt in range(1, limits.tries + 1):
        try:
            return _once(endpoint, method, path, body, limits)
        except _Refused as refusal:
            raise _failed(endpoint, path, str(refusal)) from None
        except _TryAgain as failure:
            if not endpoint.alive():
                raise _died(endpoint, f"while it was asked {path}") from None
            if attempt == limits.tries:
                raise _failed(endpoint, path, f"{failure} ({attempt} tries)") from None
        time.sleep(pause)
        pause *= 2
    raise AssertionError("a request is tried at least once")


def _once(
    endpoint: Endpoint, method: str, path: str, body: Json, limits: Limits
) -> Mapping[str, Json]:
    deadline = time.monotonic() + limits.request_seconds
    read = bytearray()
    try:
        with httpx.stream(
            method,
            endpoint.url + path,
            json=body,
            timeout=httpx.Timeout(limits.request_seconds, connect=10.0),
            trust_env=False,
        ) as response:
            for part in response.iter_bytes():
                read += part
                if len(read) > limits.answer_bytes:
                    raise _Refused(f"the answer is larger than {limits.answer_bytes} bytes")
                # httpx limits each read, not their sum: a dripping server would never end.
                if time.monotonic() > deadline:
                    raise _TryAgain(f"no whole answer in {limits.request_seconds:g} s")
            status = response.status_code
    except httpx.TimeoutException:
        raise _TryAgain(f"no answer in {limits.request_seconds:g} s") from None
    except httpx.HTTPError as error:
        raise _TryAgain(f"{type(error).__name__}: {error}") from None
    return _parsed(status, bytes(read))


def _parsed(status: int, read: bytes) -> Mapping[str, Json]:
    text = read.decode("utf-8", "replace")
    if status >= httpx.codes.INTERNAL_SERVER_ERROR or status == httpx.codes.TOO_MANY_REQUESTS:
        raise _TryAgain(f"HTTP {status}: {_excerpt(text)}")
    if status != httpx.codes.OK:
        raise _Refused(f"HTTP {status}: {_excerpt(text)}")
    try:
        answer = json.loads(text)
    except ValueError:
        raise _TryAgain(f"half an answer: {_excerpt(text)}") from None
    if not isinstance(answer, dict):
        raise _Refused(f"an answer that is no object: {_excerpt(text)}")
    return answer


def _failed(endpoint: Endpoint, path: str, what: str) -> WeightsmithError:
    return CheckFailed(
        f"{endpoint.url}{path}: {what}{_log(endpoint)}",
        hint="ask the server by hand with curl; its log says more",
    )


def _died(endpoint: Endpoint, when: str) -> WeightsmithError:
    return CheckFailed(
        f"the server stopped {when}{_log(endpoint)}",
        hint="its last lines say why; too little memory is a common cause",
    )


def _log(endpoint: Endpoint) -> str:
    lines = endpoint.logs(_LOG_LINES).strip()
    return f"\n{lines}" if lines else ""


def _excerpt(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= 200 else flat[:199] + "…"
