"""Which of an engine's parsers read a model's tool calls and thoughts, by its chat template.

Without them, vLLM answers `tool_choice: auto` with HTTP 400, and thoughts stand in the answer.

A template names the marks that the model was trained to write around a call, and most marks are
read by one parser only; where several read them, the table has the one that vLLM's recipes name for
the family (https://github.com/vllm-project/recipes) first. Where no row fits, or several, the
engine's own parsers read back what the template writes (stages/parsers.py). That each parser reads
what its templates render is shown with them in tests/real/test_parsers.py; a started image shows it
with the model's own template and tokenizer (evaluating/round_trip.py). vLLM's own `auto` (pull
request 34809) is not released.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weightsmith.core.errors import UsageError
from weightsmith.core.json_objects import JsonObject
from weightsmith.core.values import JsonValue
from weightsmith.models.facts import ModelFacts
from weightsmith.models.templates import has_tools, writes_thoughts
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.options import OptionList, plain_name

AUTO, NONE = "auto", "none"
TOOL_PARSER, REASONING_PARSER = "tool-call-parser", "reasoning-parser"
"""The engines' own options."""
NO_CALL = "no call"
"""The name of the chat without a call, which a parser must leave as it is."""
CALL_AFTER_THOUGHTS = "a call after thoughts"
"""The name of the chat that is read whole alone: servers put streams of both together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How models of a family write calls, and which parser of an engine reads that."""

    name: str
    """vLLM's name of the parser; "" if it has none."""
    marks: tuple[str, ...]
    """Each is in the template."""
    types: tuple[str, ...] = ()
    """Beginnings of `model_type`; () for any."""
    sglang: str = ""
    """SGLang's name; "" if it has none."""

    def fits(self, template: str, model_type: str) -> bool:
        """Return whether a template is of this dialect."""
        right = not self.types or model_type.startswith(self.types)
        return right and all(mark in template for mark in self.marks)

    def of(self, engine: str) -> str:
        """Return an engine's name of the parser; "" if it has none."""
        return self.sglang if engine == "sglang" else self.name


TOOLS = (
    Dialect(name="openai", sglang="gpt-oss", marks=("<|channel|>", "<|message|>")),
    Dialect(name="gemma4", sglang="gemma4", marks=("<|tool_call>", "<tool_call|>")),
    Dialect(name="kimi_k2", sglang="kimi_k2", marks=("<|tool_calls_section_begin|>",)),
    # Kimi K2's first template declares tools, and never renders a call.
    Dialect(name="kimi_k2", sglang="kimi_k2", marks=("tool_declare", "<|im_middle|>")),
    Dialect(name="deepseek_v32", sglang="deepseekv32", marks=("｜DSML｜", "function_calls")),
    Dialect(name="deepseek_v4", sglang="deepseekv4", marks=("｜DSML｜",)),
    Dialect(name="deepseek_v3", sglang="deepseekv3", marks=("<｜tool▁calls▁begin｜>", "```json")),
    Dialect(name="deepseek_v31", sglang="deepseekv31", marks=("<｜tool▁calls▁begin｜>",)),
    # GLM 4.7 has no line break after the name.
    Dialect(name="glm45", sglang="glm45", marks=("<arg_key>", "{function-name}\n")),
    Dialect(name="glm47", sglang="glm47", marks=("<arg_key>",)),
    Dialect(name="minimax_m2", sglang="minimax-m2", marks=("<minimax:tool_call>",)),
    Dialect(name="seed_oss", marks=("<seed:tool_call>",)),
    Dialect(name="step3p5", sglang="step3p5", marks=("<function=",), types=("step3",)),
    Dialect(name="qwen3_coder", sglang="qwen3_coder", marks=("<function=", "<parameter=")),
    Dialect(name="granite4", sglang="hermes", marks=("<tool_call>", "<|start_of_role|>")),
    Dialect(name="granite", marks=("<|tool_call|>",)),
    # SGLang's reads `[TOOL_CALLS] [`, as Mistral Small 2409 writes, and `[TOOL_CALLS]NAME[ARGS]`.
    Dialect(name="mistral", marks=("[TOOL_CALLS][",)),
    Dialect(name="mistral", sglang="mistral", marks=("[TOOL_CALLS]",)),
    Dialect(name="llama4_pythonic", sglang="pythonic", marks=("<|python_start|>",)),
    Dialect(name="lfm2", sglang="lfm2", marks=("<|tool_call_start|>",)),
    Dialect(name="internlm", marks=("<|action_start|>", "<|plugin|>")),
    Dialect(name="jamba", marks=("<tool_calls>",), types=("jamba",)),
    Dialect(name="hunyuan_a13b", sglang="hunyuan", marks=("<tool_calls>",), types=("hunyuan",)),
    Dialect(name="phi4_mini_json", marks=("<|tool|>", "<|/tool|>")),
    Dialect(name="olmo3", marks=("<function_calls>",), types=("olmo",)),
    Dialect(name="ernie45", marks=("<tool_call>",), types=("ernie4_5",)),
    Dialect(name="hermes", sglang="qwen25", marks=("<tool_call>",)),
    Dialect(name="llama3_json", sglang="llama3", marks=("<|eot_id|>", '"parameters": ')),
)
"""The first that fits counts."""

THOUGHTS = (
    Dialect(name="openai_gptoss", sglang="gpt-oss", marks=("<|channel|>", "<|message|>")),
    Dialect(name="gemma4", sglang="gemma4", marks=("<|channel>", "<channel|>")),
    Dialect(name="mistral", sglang="mistral", marks=("[THINK]",)),
    Dialect(name="seed_oss", marks=("<seed:think>",)),
    Dialect(name="granite", marks=("Here is my thought process",)),
    Dialect(name="kimi_k2", sglang="kimi_k2", marks=("</think>", "<|im_middle|>")),
    Dialect(name="deepseek_v4", sglang="deepseek-v4", marks=("</think>", "｜DSML｜"),
            types=("deepseek_v4",)),
    # Thinking is a switch since V3.1: `</think>` after the prompt ends what never began.
    Dialect(name="deepseek_v3", sglang="deepseek-v3", marks=("</think>", "thinking", "<｜User｜>")),
    Dialect(name="deepseek_r1", sglang="deepseek-r1", marks=("</think>", "<｜User｜>")),
    Dialect(name="glm45", sglang="glm45", marks=("</think>", "[gMASK]")),
    Dialect(name="minimax_m2", sglang="minimax", marks=("</think>", "<minimax:tool_call>")),
    Dialect(name="step3p5", sglang="step3p5", marks=("</think>",), types=("step3",)),
    Dialect(name="nemotron_v3", sglang="nemotron_3", marks=("</think>",), types=("nemotron",)),
    Dialect(name="ernie45", marks=("</think>",), types=("ernie4_5",)),
    Dialect(name="hunyuan_a13b", sglang="hunyuan", marks=("</think>",), types=("hunyuan",)),
    Dialect(name="olmo3", sglang="deepseek-r1", marks=("</think>",), types=("olmo",)),
    Dialect(name="mimo", sglang="mimo", marks=("</think>",), types=("mimo",)),
    Dialect(name="qwen3", sglang="qwen3", marks=("</think>", "enable_thinking")),
    Dialect(name="qwen3", sglang="qwen3", marks=("</think>",), types=("qwen3",)),
    Dialect(name="deepseek_r1", sglang="deepseek-r1", marks=("</think>",)),
)  # fmt: skip
"""The same for thoughts."""


def fitting(model: ModelFacts, engine: str) -> tuple[str, ...]:
    """Return an engine's parsers for calls whose marks are in a model's template, best first."""
    found = (d.of(engine) for d in TOOLS if d.fits(model.chat_template, model.model_type))
    return tuple(dict.fromkeys(filter(None, found)))


def fitting_thoughts(model: ModelFacts, engine: str) -> tuple[str, ...]:
    """Return the same of an engine's parsers for thoughts."""
    found = (d.of(engine) for d in THOUGHTS if d.fits(model.chat_template, model.model_type))
    return tuple(dict.fromkeys(filter(None, found)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ParserChoice:
    """Which parsers of calls and thoughts the engine's own code chose, and what is said of them."""

    tools: str = ""
    """"" if the table decides."""
    thoughts: str = ""
    """The same."""
    note: str = ""
    asks: bool = False
    """Whether it is not chosen yet: the build asks the engine's own code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadBack(JsonObject):
    """How an engine's own parsers read what a chat template writes: whole, streamed, or both."""

    read: Mapping[str, Mapping[str, tuple[str, ...]]]
    """The calls, by parser and chat."""
    thoughts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """The thoughts, by parser."""
    skipped: Mapping[str, str]
    """By chat, why it was not tried."""


def choice_of(found: ReadBack, first: Sequence[str]) -> ParserChoice:
    """Return the choice by what each parser read back of what the chat template writes.

    `first` are the parsers of the table, best first. One that reads all comes before one that fails
    in a stream. Parsers that read alike are equal for the user: the table's, else the first by
    name. A chat that none reads tells nothing of them, as where the template loses the second call,
    or the parser of thoughts does not fit.
    """
    read = found.read
    rendered = sorted({chat for chats in read.values() for chat in chats})
    tried = [c for c in rendered if any("whole" in chats[c] for chats in read.values())]
    lost = [chat for chat in rendered if chat not in tried]
    if all(chat == NO_CALL for chat in rendered):
        why = "; ".join(sorted(set(found.skipped.values())))
        table = f"; {first[0]} is taken" if first else ""
        return ParserChoice(note=f"tool calls: nothing could be read back: {why}{table}")
    whole = [one for one, chats in read.items() if all("whole" in chats[c] for c in tried)]
    table = f"; {first[0]} is taken by the template's marks" if first else ""
    if not whole or all(chat == NO_CALL for chat in tried):
        return ParserChoice(
            note=f"tool calls: none of {len(read)} parsers of the engine reads what the chat"
            f" template writes ({', '.join(rendered)}){table}"
        )
    streams = [
        one
        for one in whole
        if all("streamed" in read[one][c] for c in tried if c != CALL_AFTER_THOUGHTS)
    ]
    own = [one for one in first if one in whole]
    order = [*(one for one in own if one in streams), *own, *sorted(streams), *sorted(whole)]
    chosen = order[0]
    stream = "" if chosen in streams else ", though not in a stream"
    others = [one for one in whole if one != chosen]
    also = f"; so do {', '.join(others)}" if others else ""
    also += f"; no parser reads {' and '.join(lost)}" if lost else ""
    return ParserChoice(
        tools=chosen,
        note=f"tool calls: of {len(read)} parsers of the engine, {chosen} reads back what the chat"
        f" template writes ({', '.join(tried)}){stream}{also}",
    )


def choice_of_thoughts(found: ReadBack) -> ParserChoice:
    """Return the same for thoughts, whose form the table does not know."""
    read = found.thoughts
    if why := found.skipped.get("thoughts"):
        return ParserChoice(note=f"thoughts: nothing could be read back: {why}")
    whole = sorted(one for one in read if "whole" in read[one])
    streams = [one for one in whole if "streamed" in read[one]]
    if not whole:
        none = f"none of {len(read)} parsers of the engine reads what the chat template writes"
        return ParserChoice(note=f"thoughts: {none}, so they stay in the answers")
    chosen, *others = [*streams, *(one for one in whole if one not in streams)]
    stream = "" if streams else ", though not in a stream"
    also = f"; so do {', '.join(others)}" if others else ""
    return ParserChoice(
        thoughts=chosen,
        note=f"thoughts: of {len(read)} parsers of the engine, {chosen} reads back what the chat"
        f" template writes{stream}{also}",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsers:
    """An engine's parsers for a model; "" for none."""

    tools: str
    thoughts: str
    notes: tuple[str, ...]


def parsers_of(model: ModelFacts, engine: str, known: OptionList, options: ServeOptions) -> Parsers:
    """Return an engine's parsers: those that `serve` names, or by the model's chat template.

    Raises UsageError for a name that the engine's pinned version lacks, and for one beside another
    in `serve.extra`.
    """
    for key, option in (("tool_parser", TOOL_PARSER), ("reasoning_parser", REASONING_PARSER)):
        if getattr(options, key) not in ("", AUTO) and is_set(options.extra, option):
            raise UsageError(
                f"serve.{key} and serve.extra.{option} both say which parser the server has",
                hint="remove one of them",
            )
    template, notes = model.chat_template, list[str]()
    tools, thoughts = options.tool_parser, options.reasoning_parser
    offered = known.words.get("tool-call-parser", ())
    chosen = _named(tools, "tool_parser", offered)
    if tools == NONE and has_tools(template):
        notes.append("serve.tool_parser is none: the server will refuse `tool_choice: auto`")
    if thoughts == NONE and (_of_thoughts(model, engine) or writes_thoughts(template)):
        notes.append(
            "serve.reasoning_parser is none: thoughts stand in the answers; suites judge what"
            " follows a mark such as </think>"
        )
    if tools in ("", AUTO):
        first = next((d for d in TOOLS if d.fits(template, model.model_type)), None)
        if not template:
            pass  # it does not chat
        elif not has_tools(template):
            notes.append("the chat template has no tools, so the server has no parser for calls")
        elif first and first.of(engine) in offered:
            chosen = first.of(engine)
        else:
            what = "the form of its calls is not known here"
            if first:
                what = f"this engine has no parser for calls as {first.name} reads them"
            notes.append(
                f"the chat template has tools, but {what}: the server will refuse `tool_choice:"
                " auto`; serve.tool_parser names a parser"
            )
    reasoning = thoughts_of(model, engine, known, thoughts)
    if thoughts in ("", AUTO) and not reasoning and (lacking := _of_thoughts(model, engine)):
        notes.append(f"thoughts stay in the answers: {known.version} has no parser {lacking}")
    return Parsers(tools=chosen, thoughts=reasoning, notes=tuple(notes))


def thoughts_of(model: ModelFacts, engine: str, known: OptionList, given: str) -> str:
    """Return an engine's parser for thoughts: the given one, or by the template; "" for none."""
    offered = known.words.get("reasoning-parser", ())
    if given not in ("", AUTO):
        return _named(given, "reasoning_parser", offered)
    first = _of_thoughts(model, engine)
    return first if first in offered else ""


def is_set(extra: Mapping[str, JsonValue], option: str) -> bool:
    """Return whether `serve.extra` has an option, in whichever spelling."""
    return any(plain_name(key) == option for key in extra)


def _of_thoughts(model: ModelFacts, engine: str) -> str:
    fits = (d.of(engine) for d in THOUGHTS if d.fits(model.chat_template, model.model_type))
    return next(fits, "")


def _named(given: str, key: str, offered: Sequence[str]) -> str:
    """Return a parser that the recipe names; "" for none of its own choice."""
    if given in ("", AUTO, NONE):
        return ""
    if given not in offered:
        raise UsageError(
            f"serve.{key} is {given!r}, which this engine does not have",
            hint=f"auto, none, or one of: {', '.join(offered)}",
        )
    return given
