"""Metrics: pure functions that judge answers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, TypeAlias, get_args

from weightsmith.core import time_limits
from weightsmith.core.apart import on_a_main_thread
from weightsmith.core.errors import CheckFailed, UsageError
from weightsmith.core.safe_parse import check_pattern, parse
from weightsmith.core.time_limits import TooLong, cpu_limit
from weightsmith.core.values import Json, JsonValue, Score
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.json_schemas import reference_error
from weightsmith.evaluating.pictures import named_part
from weightsmith.evaluating.tool_calls import (
    Call,
    are_expected,
    calls_text,
    composed,
    is_found,
    read_calls,
    without_thoughts,
)
from weightsmith.recipe.schema import Scoring

_Asked: TypeAlias = tuple[str, Sequence[str], dict[str, Json], str, str]
"""Metric, expected answers, an answer with further facts, its question's tools, and tolerance."""
METRICS: tuple[str, ...] = get_args(Scoring.model_fields["metric"].annotation)
_FENCE = re.compile(r"```(?:json)?[^\S\n]*\n", re.IGNORECASE)
_SEPARATOR = (
    "[,_' \N{RIGHT SINGLE QUOTATION MARK}\N{NO-BREAK SPACE}\N{NARROW NO-BREAK SPACE}\N{THIN SPACE}]"
)
"""What may stand between thousands."""
# Not after a digit and a blank: `2 3 5 101` is a list.
_THOUSANDS = rf"(?<!\d )\d{{1,3}}({_SEPARATOR})\d{{3}}(?:\1\d{{3}})*(?!\d|\1\d)"
_NUMBER = re.compile(
    rf"(?:(?<![\w.])[-+])?(?:(?:{_THOUSANDS}|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
    r"(?:[eE][-+]?\d{1,3}\b)?",
    re.ASCII,
)
SECONDS_EACH = 0.5
"""CPU time that every answer has; a schema takes some milliseconds."""


def judge(metric: str, expected: str | Sequence[str], answer: str, tolerance: str = "0") -> bool:
    """Return whether an answer is right; several expected answers are alternatives.

    contains: the answer contains the expected text, ignoring case and the amount of white space.
    exact: the answer is the expected text, ignoring surrounding white space. regex: `re.search`
    finds the pattern in the answer; of `{"not": [pattern, …]}`, none. All three compose letters and
    their accents first (Unicode's form C). numeric: the answer's last number is at most `tolerance`
    from the expected one: an amount, or a share as in `2%`. choice: the answer, the most likely of
    the item's choices, is an expected one. json-schema: the answer, which may be in a Markdown
    fence, is JSON that matches the schema. command: judged elsewhere, by the user's program.
    tool-call: the answer makes exactly the expected calls, in any order.
    """
    alternatives = (expected,) if isinstance(expected, str) else expected
    match metric:
        case "contains":
            return any(_loose(text) in _loose(answer) for text in alternatives)
        case "exact" | "choice":
            return any(_composed(text) == _composed(answer) for text in alternatives)
        case "regex":
            return any(_matches(text, answer) for text in alternatives)
        case "numeric":
            return any(_is_near(text, answer, tolerance) for text in alternatives)
        case "tool-call":
            return any(are_expected(text, _calls(answer)) for text in alternatives)
        case "json-schema":
            return any(_is_valid(text, answer) for text in alternatives)
        case _:
            raise UsageError(f"unknown metric {metric!r}", hint=f"one of: {', '.join(METRICS)}")


def check_metric(metric: str, items: Iterable[Item], path: str = "") -> None:
    """Raise UsageError with file and line for an unknown metric, or items that do not fit it.

    That is, items without choices, or with an invalid pattern or schema. Without a `path`, it has
    the line alone.
    """
    if metric not in METRICS:
        raise UsageError(f"unknown metric {metric!r}", hint=f"one of: {', '.join(METRICS)}")
    for item in items:
        where = f"{path}:{item.line}" if path else f"line {item.line}"
        if metric == "choice" and not item.choices:
            raise UsageError(
                f"{where} has no choices, which metric choice needs",
                hint='give "choices": ["…", "…"], and expected as one of them',
            )
        for expected in item.expected:
            if metric == "json-schema":
                _check_schema(expected, where)
            elif metric == "regex":
                for pattern in _forbidden(expected) or (expected,):
                    if not pattern:
                        raise UsageError(
                            f"{where}: an empty pattern is in every answer",
                            hint='give "expected": {"not": "what must not be in an answer"}',
                        )
                    _check_pattern(pattern, where)
            elif metric == "numeric" and not _NUMBER.fullmatch(expected.strip()):
                raise UsageError(
                    f"{where}: expected {expected[:60]!r} is not a number",
                    hint='give a number, as in "expected": 12.5, "tolerance": 0.1',
                )


def _check_pattern(pattern: str, where: str) -> None:
    try:
        check_pattern(composed(pattern))
    except ValueError as error:
        raise UsageError(
            f"{where}: invalid regular expression {pattern[:60]!r}: {error}",
            hint="escape special characters with a backslash, or use metric contains",
        ) from None


def _forbidden(expected: str) -> tuple[str, ...]:
    """Return the patterns of `{"not": pattern}` or `{"not": [pattern, …]}`; () if it is not one."""
    if not expected.startswith('{"not": '):
        return ()
    try:
        value = parse(expected)
    except ValueError:
        return ()
    found = value.get("not") if isinstance(value, dict) and len(value) == 1 else None
    patterns = [found] if isinstance(found, str) else found
    if not isinstance(patterns, list) or not all(isinstance(one, str) for one in patterns):
        return ()
    return tuple(patterns)


def _calls(answer: str) -> list[Call]:
    """Return the calls that an answer was read as; none if it is text."""
    try:
        return [(row["name"], row["arguments"]) for row in parse(answer)]
    except (ValueError, TypeError, KeyError):
        return []


def _matches(expected: str, answer: str) -> bool:
    if forbidden := _forbidden(expected):
        return not any(is_found(pattern, answer) for pattern in forbidden)
    return is_found(expected, answer)


def _is_near(expected: str, answer: str, tolerance: str) -> bool:
    """Return whether an answer's last number is near enough; exact, so that 0.1 + 0.2 is 0.3."""
    numbers = list(_NUMBER.finditer(answer.replace("\N{MINUS SIGN}", "-")))
    if not numbers:
        return False
    texts = expected.strip(), numbers[-1][0]
    wanted, found = (Decimal(re.sub(_SEPARATOR, "", text)) for text in texts)
    allowed = Decimal(tolerance.removesuffix("%"))
    if tolerance.endswith("%"):
        allowed *= abs(wanted) / 100
    return abs(found - wanted) <= allowed


def _check_schema(schema: str, where: str) -> None:
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    hint = 'write the schema itself: "expected": {"type": "object", …}'
    try:
        value = parse(schema)
        validator: Any = validator_for(value)  # whose stubs lack the checker
        # With the checker, patterns within must be ones, too.
        validator.check_schema(value, format_checker=validator.FORMAT_CHECKER)
    except SchemaError as error:
        raise UsageError(
            f"{where}: expected is not a valid JSON schema: {error.message}", hint=hint
        ) from None
    # The first two for "$schema": 5, the last two for patterns that Python cannot read.
    except (AttributeError, TypeError, ValueError, RecursionError, OverflowError):
        raise UsageError(f"{where}: expected is not a valid JSON schema", hint=hint) from None
    if wrong := reference_error(value):
        raise UsageError(
            f"{where}: expected is a JSON schema whose {wrong}",
            hint="put each definition into the schema itself, under $defs, and let no $ref lead"
            " back to itself",
        )


def _is_valid(schema: str, answer: str) -> bool:
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    text = answer.strip()
    begin = _FENCE.match(text)
    if begin and len(text) >= begin.end() + 3 and text.endswith("```"):
        text = text[begin.end() : -3]
    try:
        value = parse(text, pairs=False)
    except ValueError:
        return False
    parsed = parse(schema)
    # With an empty registry the library does not fetch references to other documents.
    validator = validator_for(parsed)(parsed, registry=Registry())
    try:
        return bool(validator.is_valid(value))
    except Unresolvable as error:
        raise UsageError(
            f"the JSON schema has an unresolvable reference: {error}",
            hint="put the definition into the schema itself, under $defs",
        ) from None
    except RecursionError:
        raise UsageError(
            "the JSON schema refers to itself without an end",
            hint="let each $ref lead into a property or an element",
        ) from None


def score_answers(
    answers: Sequence[str | Mapping[str, JsonValue]],
    items: Sequence[Item],
    metric: str,
    tolerance: str = "0",
) -> Score:
    """Return the score of answers in the items' order.

    An answer is a text, or a mapping with `answer` and further facts to keep. A question whose
    pattern or schema takes too long on its answer is answered wrongly, and `unjudged` says so.
    """
    if len(answers) != len(items):
        raise CheckFailed(
            f"got {len(answers)} answers for {len(items)} questions",
            hint="the evaluation was cut short; run it again",
        )
    check_metric(metric, items)
    asked: list[_Asked] = [
        (
            metric,
            list(item.expected),
            {"answer": answer} if isinstance(answer, str) else dict(answer),
            item.tools,
            item.tolerance or tolerance,
        )
        for item, answer in zip(items, answers, strict=True)
    ]
    rows: list[dict[str, JsonValue]] = []
    for item, (facts, ok, took) in zip(items, on_a_main_thread(_verdicts, asked), strict=True):
        why = f"line {item.line}: metric {metric} exceeded {took:g} s of CPU time"
        row: dict[str, JsonValue] = {
            **request_row(item),
            "expected": list(item.expected),
            **({"choices": list(item.choices)} if item.choices else {}),
            **({"tolerance": item.tolerance} if item.tolerance else {}),
            **({"tools": parse(item.tools)} if item.tools else {}),
            **facts,
            "ok": ok,
            **({"unjudged": why} if took else {}),
        }
        rows.append(row)
    right = sum(bool(row["ok"]) for row in rows)
    share = right / len(rows) if rows else 0.0
    return Score(score=share, n=len(rows), metric=metric, per_item=tuple(rows))


def _verdicts(asked: Sequence[_Asked]) -> list[tuple[dict[str, Json], bool, float]]:
    """Return each answer as it was read, whether it is right, and its CPU time if that ran out."""
    found: list[tuple[dict[str, Json], bool, float]] = []
    left = time_limits.FOREIGN_SECONDS
    if any(metric == "json-schema" for metric, *_ in asked):
        _check_schema("{}", "")  # which imports its library, in nobody's time
    for metric, expected, facts, tools, tolerance in asked:
        seconds = max(SECONDS_EACH, min(left, time_limits.FOREIGN_SECONDS / 4))
        read, ok, took = {k: v for k, v in facts.items() if k != "calls"}, False, 0.0
        try:
            with cpu_limit(seconds):  # readers of calls, patterns and schemas may take forever
                read = _read(facts, tools)
                # An expected "no call", or a pattern, may fit what is no answer at all.
                ok = "error" not in read and judge(metric, expected, str(read["answer"]), tolerance)
        except TooLong:
            left -= seconds
            took = seconds
        found.append((read, ok, took))
    return found


def request_row(item: Item) -> dict[str, JsonValue]:
    """Return the prompt of a record's row; its messages and pictures if it has more than that."""
    if item.plain and not item.pictures:
        return {"prompt": item.prompt}
    shown: list[JsonValue] = [
        {"name": one.name, "file": one.seen.file, "size": [one.seen.width, one.seen.height]}
        for one in item.pictures
    ]
    messages: JsonValue = item.in_parts(named_part)
    return {
        "prompt": item.prompt,
        "messages": messages,
        **({"pictures": shown} if shown else {}),
    }


def _read(facts: dict[str, Json], tools: str) -> dict[str, Json]:
    """Return an answer without its thoughts; of a question with tools, the calls that it makes.

    `raw` is then the answer as it was written, and `parser` says that the server's parser left a
    call in the text: its fault, and not the model's.
    """
    if "error" in facts:
        return facts
    text, thoughts = without_thoughts(str(facts["answer"]))
    if thoughts:  # where its tokens end is no longer known
        kept = {k: v for k, v in facts.items() if k not in ("token_ends", "margins")}
        facts = {**kept, "answer": text, "thoughts": thoughts}
    if not tools:
        return facts
    names = [str(tool["function"]["name"]) for tool in parse(tools)]
    left = read_calls(text, names)
    if "calls" not in facts:  # of a reference
        return {**facts, "answer": calls_text(left) if left else text, "raw": text}
    calls: list[Call] = []
    for row in facts.pop("calls"):
        try:
            given = parse(str(row["arguments"] or "{}"))
        except ValueError:
            given = None
        # An answer that was cut off at its limit has half a call, by nobody's fault.
        if not isinstance(given, dict) and facts.get("finish_reason") != "length":
            facts["parser"] = f"the arguments of a call are no JSON: {str(row['arguments'])[:200]}"
        # These are no expected ones, not even where none are expected.
        unread = {"no JSON": str(row["arguments"])[:200]}
        calls.append((str(row["name"]), given if isinstance(given, dict) else unread))
    if left and not calls:
        facts["parser"] = "the server's parser left a call in the text"
    return {**facts, "answer": calls_text(calls) if calls else text, "raw": text}


def _composed(text: str) -> str:
    return composed(text).strip()


def _loose(text: str) -> str:
    return " ".join(_composed(text).casefold().split())
