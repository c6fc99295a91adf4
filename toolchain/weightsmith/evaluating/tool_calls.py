"""Tool calls and thoughts in the text of an answer, and whether the calls are the expected ones.

References answer in text, as the model wrote it; a server returns calls that its parser found. Both
are judged alike, so these readers read the forms that models write (the marks are those of
`serving/parsers.py`). Where a server's text still holds a call, its parser has failed, and not the
model. References do not go through the engine's parser, which would hide its faults.
"""

from __future__ import annotations

import ast
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

from weightsmith.core.errors import UsageError
from weightsmith.core.safe_parse import check_pattern, parse
from weightsmith.core.values import Json, JsonValue
from weightsmith.evaluating.json_schemas import reference_error

ANOTHER_PARSER = (
    "another serve.tool_parser may read it: vLLM and SGLang have one for each form, llama.cpp goes"
    " by the chat template alone"
)
"""What to do where a server left a call in the text."""
_MOST_CALLS = 100
Call: TypeAlias = tuple[str, Mapping[str, JsonValue]]
"""Name of the tool, and its arguments."""

_THOUGHTS = (
    re.compile(r"\A\s*(?:<think>)?(.*)</think>\s*", re.DOTALL),
    re.compile(r"\A\s*\[THINK\](.*)\[/THINK\]\s*", re.DOTALL),
    re.compile(r"\A\s*<\|channel>thought(.*?)<channel\|>\s*", re.DOTALL),
    re.compile(r"\A\s*<seed:think>(.*)</seed:think>\s*", re.DOTALL),
    re.compile(r"\A\s*<\|channel\|>analysis<\|message\|>(.*?)<\|end\|>", re.DOTALL),
)
_UNENDED = re.compile(
    r"\A\s*(?:<think>|\[THINK\]|<\|channel>thought|<seed:think>|<\|channel\|>analysis<\|message\|>)"
    r"(.*)\Z",
    re.DOTALL,
)


def without_thoughts(text: str) -> tuple[str, str]:
    """Return an answer without the thoughts before it, and these; ("", thoughts) if they go on."""
    for pattern in _THOUGHTS:
        if found := pattern.match(text):
            return text[found.end() :], found[1].strip()
    if found := _UNENDED.match(text):
        return "", found[1].strip()
    return text, ""


def read_calls(text: str, names: Sequence[str]) -> tuple[Call, ...]:
    """Return the calls to these tools in an answer's text; () if it has none."""
    for reader in _READERS:
        try:
            found = tuple(reader(text))
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue  # it is of another form, or the model was cut off
        if found and all(name in names for name, _ in found):
            return found
    return ()


def calls_text(calls: Sequence[Call]) -> str:
    """Return calls as one text: a JSON list of `{name, arguments}`, with sorted keys."""
    rows = [{"name": name, "arguments": dict(given)} for name, given in calls]
    return json.dumps(rows, sort_keys=True, ensure_ascii=False)


def _object(value: JsonValue, *keys: str) -> Call:
    """Return a call of a JSON object with a name, and arguments under one of these keys."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise TypeError("no call")
    given: Json = next((value[key] for key in keys if key in value), {})
    given = parse(given) if isinstance(given, str) else given
    if not isinstance(given, dict):
        raise TypeError("no arguments")
    return value["name"], given


def _between(begin: str, end: str, text: str) -> list[str]:
    return re.findall(f"{re.escape(begin)}(.*?)(?:{re.escape(end)}|\\Z)", text, re.DOTALL)


def _value(text: str) -> JsonValue:
    """Return a parameter's value: JSON, else the text itself."""
    try:
        found: JsonValue = parse(text)
    except ValueError:
        return text
    return found


def _hermes(text: str) -> Iterator[Call]:
    for inner in _between("<tool_call>", "</tool_call>", text):
        yield _object(parse(inner), "arguments", "parameters")


def _functions(text: str) -> Iterator[Call]:
    for name, inner in re.findall(r"<function=([^>\s]+)>(.*?)</function>", text, re.DOTALL):
        rows = re.findall(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", inner, re.DOTALL)
        yield name, {key: _value(value) for key, value in rows}


def _arg_keys(text: str) -> Iterator[Call]:
    for inner in _between("<tool_call>", "</tool_call>", text):
        name = inner.partition("<arg_key>")[0].strip()
        rows = re.findall(
            r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", inner, re.DOTALL
        )
        if not rows and name.startswith("{"):
            raise ValueError("JSON")
        yield name, {key.strip(): _value(value) for key, value in rows}


def _invokes(text: str) -> Iterator[Call]:
    for name, inner in re.findall(r'invoke name="([^"]+)">(.*?)</[^>]*invoke>', text, re.DOTALL):
        pattern = r'parameter name="([^"]+)"(?: string="(true|false)")?>(.*?)</[^>]*parameter>'
        rows = re.findall(pattern, inner, re.DOTALL)
        yield name, {key: v if is_text == "true" else _value(v) for key, is_text, v in rows}


def _listed(text: str) -> Iterator[Call]:
    """Yield calls of a JSON list after a mark: Mistral's, Granite's, Jamba's and Phi's."""
    mark = re.search(r"\[TOOL_CALLS\]|<\|tool_call\|>|<tool_calls>|functools|<TOOLCALL>", text)
    if not mark:
        return
    rest = text[mark.end() :].strip()
    named = re.findall(
        r"([\w.-]+)\[ARGS\](\{.*?\})(?=\s*(?:\[TOOL_CALLS\]|</s>|\Z))", rest, re.DOTALL
    )
    if named:
        yield from ((name, parse(given)) for name, given in named)
        return
    value, _ = json.JSONDecoder().raw_decode(rest)
    for row in value if isinstance(value, list) else [value]:
        yield _object(row, "arguments", "parameters")


def _deepseek(text: str) -> Iterator[Call]:
    for inner in _between("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", text):  # noqa: RUF001
        first, _, rest = inner.partition("<｜tool▁sep｜>")  # noqa: RUF001
        fenced = re.match(r"(.*?)\n```json\n(.*?)\n```", rest, re.DOTALL)
        name, given = (fenced[1], fenced[2]) if fenced else (first, rest)
        yield name.strip(), parse(given)


def _kimi(text: str) -> Iterator[Call]:
    for inner in _between("<|tool_call_begin|>", "<|tool_call_end|>", text):
        name, _, given = inner.partition("<|tool_call_argument_begin|>")
        yield name.strip().removeprefix("functions.").rpartition(":")[0], parse(given)


def _harmony(text: str) -> Iterator[Call]:
    pattern = r"to=functions\.([\w.-]+).*?<\|message\|>(.*?)(?:<\|call\|>|\Z)"
    for name, given in re.findall(pattern, text, re.DOTALL):
        yield name, parse(given)


def _gemma(text: str) -> Iterator[Call]:
    for inner in _between("<|tool_call>call:", "<tool_call|>", text):
        name, _, rest = inner.partition("{")
        quoted = ("{" + rest).split('<|"|>')
        # Every second part is a text; the others are JSON with bare keys.
        parts = [
            json.dumps(part) if n % 2 else re.sub(r"([{,]\s*)([\w.-]+)(\s*):", r'\1"\2"\3:', part)
            for n, part in enumerate(quoted)
        ]
        yield name, parse("".join(parts))


def _pythonic(text: str) -> Iterator[Call]:
    bare = re.sub(r"<\|?/?[\w|]+\|?>", "", text).strip()
    body = ast.parse(bare, mode="eval").body
    for call in body.elts if isinstance(body, ast.List) else []:
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError("no call")
        yield (
            ast.unparse(call.func),
            {str(word.arg): ast.literal_eval(word.value) for word in call.keywords},
        )


def _bare(text: str) -> Iterator[Call]:
    """Yield Llama 3's calls: JSON objects, with nothing else in the answer."""
    rest = re.sub(r"<\|[\w]+\|>", "", text).strip()
    while rest:
        value, end = json.JSONDecoder().raw_decode(rest)
        yield _object(value, "parameters", "arguments")
        rest = rest[end:].lstrip(" ;\n")


_READERS: tuple[Callable[[str], Iterator[Call]], ...] = (
    _hermes, _functions, _arg_keys, _invokes, _listed, _deepseek, _kimi, _harmony, _gemma,
    _pythonic, _bare,
)  # fmt: skip


def check_tools(tools: JsonValue, where: str) -> dict[str, Json]:
    """Return a question's tools, name -> JSON Schema; raise UsageError unless each has one."""
    from jsonschema import SchemaError
    from jsonschema.validators import validator_for

    hint = (
        '"tools": [{"type": "function", "function": {"name": …, "parameters": {"type": "object",'
        ' "properties": …}}}]'
    )
    if not isinstance(tools, list) or not tools:
        raise UsageError(f"{where}: tools is not a list of tools", hint=hint)
    found: dict[str, Json] = {}
    for position, tool in enumerate(tools):
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(function, dict) or not isinstance(name, str) or not name:
            raise UsageError(f"{where}: tools[{position}] has no function with a name", hint=hint)
        schema = function.get("parameters", {})
        try:
            if not isinstance(schema, dict):
                raise SchemaError("it is no object")
            validator_for(schema).check_schema(schema)
        except (SchemaError, AttributeError, TypeError, ValueError, RecursionError) as error:
            said = error.message if isinstance(error, SchemaError) else str(error)
            raise UsageError(
                f"{where}: the parameters of tool {name} are no JSON Schema: {said[:200]}",
                hint=hint,
            ) from None
        if wrong := reference_error(schema):
            raise UsageError(
                f"{where}: the parameters of tool {name} are a JSON Schema whose {wrong}",
                hint="put each definition into the parameters themselves, under $defs",
            )
        if name in found:
            raise UsageError(f"{where}: two tools are called {name}", hint="offer each tool once")
        found[name] = schema
    return found


def tools_text(tools: Json) -> str:
    """Return checked tools as JSON, with fields in the order in which servers render them.

    vLLM and llama.cpp read each tool and write it anew; the order within `parameters` stays. It is
    of weight: a model is trained on one order.
    """
    rows = []
    for tool in tools:
        told = tool["function"]
        first = {key: told[key] for key in ("name", "description", "parameters") if key in told}
        rows.append({"type": "function", "function": {**first, **told}})
    return json.dumps(rows, ensure_ascii=False)


def check_expected(expected: JsonValue, tools: Mapping[str, Json], where: str) -> str:
    """Return the expected calls as JSON; raise UsageError for calls that no answer should make.

    That is, what is no call, or calls no tool of these or with arguments that its schema refuses.
    """
    hint = '"expected": {"name": …, "arguments": {…}}, a list of such calls, or "none"'
    if expected == "none":
        return "[]"
    rows = expected if isinstance(expected, list) else [expected]
    if len(rows) > _MOST_CALLS:
        raise UsageError(f"{where}: expected has more than {_MOST_CALLS} calls", hint=hint)
    for row in rows:
        try:
            name, given = _object(row, "arguments")
        except (ValueError, TypeError):
            raise UsageError(f"{where}: expected is no call of a tool", hint=hint) from None
        if isinstance(row, dict) and (odd := sorted(row.keys() - {"name", "arguments"})):
            raise UsageError(f"{where}: expected has {odd[0]!r}, which no call has", hint=hint)
        if name not in tools:
            raise UsageError(
                f"{where}: expected calls {name}, which tools does not offer",
                hint=f"offered are {', '.join(tools)}",
            )
        _check_arguments(name, given, tools[name], where)
        for rule, text in map(_rule_of, given.values()):
            if rule == "regex":
                try:
                    check_pattern(composed(text))
                except ValueError as error:
                    raise UsageError(
                        f"{where}: invalid regular expression {text[:60]!r}: {error}",
                        hint="escape special characters with a backslash",
                    ) from None
    return json.dumps(rows, sort_keys=True)


def _check_arguments(name: str, given: Mapping[str, Json], schema: Json, where: str) -> None:
    """Raise UsageError for arguments that the tool's schema refuses, but for those with a rule."""
    from jsonschema.validators import validator_for
    from referencing import Registry
    from referencing.exceptions import Unresolvable

    ruled = {key for key, value in given.items() if any(_rule_of(value))}
    validator = validator_for(schema)(schema, registry=Registry())
    try:
        for error in validator.iter_errors(given):
            # Where an argument has a rule, what holds for all together cannot be checked.
            whole = not error.absolute_path and error.validator in (
                "required",
                "additionalProperties",
            )
            part = error.absolute_path and error.absolute_path[0] not in ruled
            if whole or part or not ruled:
                raise UsageError(
                    f"{where}: expected calls {name} with arguments that its parameters do not"
                    f" allow: {error.message[:200]}",
                    hint="correct the call, or the tool's JSON Schema",
                )
    except (Unresolvable, RecursionError) as error:
        raise UsageError(
            f"{where}: the parameters of tool {name} refer to what is not there, or to themselves"
            f" without an end: {str(error)[:200]}",
            hint="put definitions into the schema itself, under $defs",
        ) from None


def _rule_of(wanted: JsonValue) -> tuple[str, str]:
    """Return `contains` or `regex` and its text; ("", "") for an argument that must be equal."""
    if isinstance(wanted, dict) and len(wanted) == 1:
        (rule, text), *_ = wanted.items()
        if rule in ("contains", "regex") and isinstance(text, str):
            return rule, text
    return "", ""


def are_expected(expected: str, calls: Sequence[Call]) -> bool:
    """Return whether an answer makes exactly the expected calls, in any order."""
    wanted = [_object(row, "arguments") for row in parse(expected)]
    if len(wanted) != len(calls):
        return False
    taken: dict[int, int] = {}
    return all(_takes(place, wanted, calls, taken, set()) for place in range(len(wanted)))


def _takes(
    place: int,
    wanted: Sequence[Call],
    calls: Sequence[Call],
    taken: dict[int, int],
    tried: set[int],
) -> bool:
    """Say whether a call is left for an expected one, if others may give theirs up for another.

    An augmenting path: Berge, "Two theorems in graph theory", 1957.
    """
    for number, call in enumerate(calls):
        if number in tried or not _is_call(wanted[place], call):
            continue
        tried.add(number)
        if number not in taken or _takes(taken[number], wanted, calls, taken, tried):
            taken[number] = place
            return True
    return False


def _is_call(wanted: Call, call: Call) -> bool:
    (name, arguments), (other, given) = wanted, call
    return (
        name == other
        and arguments.keys() == given.keys()
        and all(_is_argument(value, given[key]) for key, value in arguments.items())
    )


def composed(text: str) -> str:
    """Return a text in Unicode's form C: é has two spellings."""
    return unicodedata.normalize("NFC", text)


def is_found(pattern: str, text: str) -> bool:
    """Return whether `re.search` finds a pattern in a text, both composed."""
    return re.search(composed(pattern), composed(text)) is not None


def _is_argument(wanted: JsonValue, given: JsonValue) -> bool:
    """Return whether an argument is as expected: equal as JSON, or by `contains` or `regex`.

    These two read a text as it is, and all else as JSON.
    """
    rule, text = _rule_of(wanted)
    said = given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    if rule == "contains":
        return composed(text).casefold() in composed(said).casefold()
    if rule == "regex":
        return is_found(text, said)
    return _equal(wanted, given)


def _equal(one: JsonValue, other: JsonValue) -> bool:
    """Return whether two values are equal as JSON, where 1 is 1.0, and not true."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other
