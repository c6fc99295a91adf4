"""How fast a started image writes the tokens of one answer.

An answer of one token and one of many are asked for in turn, of the same prompt, which is in the
server's cache by then: what the second takes longer is the time of its further tokens. Other work
on the machine only slows a server, so the shortest time of each is taken.
"""

from __future__ import annotations

from collections.abc import Callable

from weightsmith.core.errors import CheckFailed
from weightsmith.core.safe_parse import parse
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.session import ServerSession, excerpt

_TOKENS = 64
_ROUNDS = 3
_PROMPT = Item(
    messages=({"role": "user", "content": "Tell me about the river."},), expected=(), line=0
)


def decoding_speed(
    session: ServerSession, served: Served, context: int, clock: Callable[[], float]
) -> float:
    """Return the tokens per second of one request after its first token, to three digits.

    `context` is the server's, in tokens. Raises CheckFailed if the server refuses the question,
    does not count tokens, or ends all answers early.
    """
    asked = session.adding({"ignore_eos": True})  # as vLLM, SGLang and llama.cpp call it

    def timed(tokens: int) -> tuple[float, int]:
        began = clock()
        answer = asked.try_post(served.path, served.body(_PROMPT, tokens))
        seconds = clock() - began
        if answer.status != 200:
            raise _unmeasured(f"HTTP {answer.status}: {excerpt(answer.text)}")
        try:
            found = parse(answer.text)["usage"]["completion_tokens"]
        except (ValueError, LookupError, TypeError):
            found = 0
        return seconds, found if type(found) is int else 0

    many = max(2, min(_TOKENS, context // 2))
    rounds = [(timed(1), timed(many)) for _ in range(_ROUNDS + 1)][1:]
    few, most = (min(one[place] for one in rounds) for place in (0, 1))
    tokens, seconds = most[1] - few[1], most[0] - few[0]
    if few[1] < 1 or tokens < 1 or seconds <= 0:
        raise _unmeasured(
            f"of answers of 1 and {many} tokens, the server counts {few[1]} and {most[1]}"
        )
    return float(f"{tokens / seconds:.3g}")


def _unmeasured(why: str) -> CheckFailed:
    return CheckFailed(
        f"its speed cannot be measured: {why}",
        hint="leave auto.prefer out, or name another auto.engine",
        details={"asked": False},
    )
