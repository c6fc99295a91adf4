"""Checkpoint -> the parsers of its calls and thoughts, where its chat template does not tell.

The table of serving/parsers.py decides by a template's marks. Where no row fits, or for calls
several do, vLLM's own parsers read back what the template writes, with the model's own tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.jobs import Input, ReadCallsJob, Row
from weightsmith.core.platforms import host_platform
from weightsmith.core.resources import builder_pins
from weightsmith.core.safe_parse import parse
from weightsmith.core.time_limits import job_seconds
from weightsmith.core.values import (
    Checkpoint,
    Digest,
    JsonValue,
    StageInputs,
    Tree,
    Writable,
    canonical,
)
from weightsmith.evaluating.round_trip import CALLS, TOOLS
from weightsmith.evaluating.tool_calls import Call
from weightsmith.models.facts import ModelFacts, read_facts
from weightsmith.models.templates import has_tools, writes_thoughts
from weightsmith.serving.parsers import (
    AUTO,
    CALL_AFTER_THOUGHTS,
    NO_CALL,
    REASONING_PARSER,
    TOOL_PARSER,
    ParserChoice,
    ReadBack,
    choice_of,
    choice_of_thoughts,
    fitting,
    fitting_thoughts,
    is_set,
    thoughts_of,
)
from weightsmith.serving.vllm import known_options
from weightsmith.steps.bases import OWN, base_image, base_inputs, base_reference
from weightsmith.steps.destinations import InStore
from weightsmith.steps.stage_result import StageResult, Timer, unrecorded
from weightsmith.steps.step import Foreseen, ForeseenWeights, Foresight, Results, Step, TargetStep
from weightsmith.steps.tools import Tools

BUILDER = "merge"
"""Its Python loads the engine's packages; its own are not used."""
_FILE = "parsers.json"
PACKAGES = "usr/local/lib/python3.11/dist-packages"
_MEMORY = 4 << 30
_THOUGHT = "First I look at the map."
THINKING: Mapping[str, JsonValue] = {
    "said": {
        "role": "assistant",
        "content": "Take the second bridge",
        "reasoning_content": _THOUGHT,
        "reasoning": _THOUGHT,
    },
    "thoughts": _THOUGHT,
}
"""What parsers of thoughts are asked."""
_KEPT = (
    "tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template",
    "config.json", "bpe.", "sentencepiece", "source.spm", "spiece", "tekken", "tiktoken",
)  # fmt: skip
"""Beginnings of the names of the files that decide how a template is rendered and read."""


def chats() -> tuple[Row, ...]:
    """Return what the template renders: a call, several, none, and one after thoughts."""
    rows: list[Row] = [
        {"name": name, "said": _message(calls), "calls": [list(call) for call in calls]}
        for name, calls in CALLS.items()
    ]
    said = {"role": "assistant", "content": 'Rain in "Łódź" [likely], {"days": 3} of it.'}
    rows.append({"name": NO_CALL, "said": said, "calls": []})
    calls = next(iter(CALLS.values()))
    thinking = {**_message(calls), "reasoning_content": _THOUGHT, "reasoning": _THOUGHT}
    rows.append(
        {
            "name": CALL_AFTER_THOUGHTS,
            "said": thinking,
            "calls": [list(call) for call in calls],
            "thoughts": _THOUGHT,
        }
    )
    return tuple(parse(json.dumps(rows)))


def _message(calls: Sequence[Call]) -> Mapping[str, JsonValue]:
    """Return an answer with calls as templates get it: servers parse arguments before."""
    made: list[JsonValue] = [
        {
            "id": f"call{number:05}",
            "type": "function",
            "function": {"name": name, "arguments": dict(given)},
        }
        for number, (name, given) in enumerate(calls)
    ]
    return {"role": "assistant", "content": "", "tool_calls": made}


@dataclass(frozen=True, eq=False, kw_only=True)
class ParsersStep(TargetStep[ParserChoice, ParserChoice]):
    """Chooses the parsers of calls and thoughts by vLLM's own, where the table is undecided."""

    name = "parsers"

    checkpoint: Step[Checkpoint, ForeseenWeights]

    @property
    def options(self) -> Writable:
        """Whose parsers, and whether the recipe names some."""
        serve = self.file.recipe.serve
        return [self.of.target.engine.name, serve.tool_parser, serve.reasoning_parser]

    def foresee(self, seen: Foresight) -> Foreseen[ParserChoice]:
        """Return what was found, or that it will be found."""
        weights = seen[self.checkpoint]
        if not self._undecided(weights.model):
            return Foreseen(value=ParserChoice())
        if why := self._obstacle(seen.tools):
            return Foreseen(value=self._stands(weights.model, why))
        entry = None
        if weights.tree:
            entry = seen.tools.store.find(self._inputs(weights.model, weights.tree).key)
        if entry is None:
            will = "the build lets vLLM's own parsers read what it writes"
            stands = self._stands(weights.model, will)
            return Foreseen(value=replace(stands, asks=True))
        found = parse(entry.tree.path(_FILE).read_text("utf-8"))
        return Foreseen(value=self._chosen(weights.model, found))

    def run(self, have: Results, tools: Tools) -> StageResult[ParserChoice]:
        """Return the parser that reads what the template writes; the table's if none was asked."""
        checkpoint = have[self.checkpoint]
        model = read_facts(checkpoint.tree.texts)
        if not self._undecided(model):
            return unrecorded(ParserChoice())
        if why := self._obstacle(tools):
            return unrecorded(self._told(self._stands(model, why), tools))
        timer = Timer(self.name, self.target, tools)
        try:
            found = InStore(tools.store).document(
                partial(self._inputs, model, checkpoint.tree),
                _FILE,
                partial(self._read, model, checkpoint, tools),
            )
        except EnvironmentFailure as error:
            tools.progress.warn(f"{self.target}: {error.message}")
            stands = self._told(self._stands(model, "they could not be asked"), tools)
            return timer.done(stands, cached=False)
        choice = self._told(self._chosen(model, found.value), tools)
        return timer.done(choice, cached=found.cached)

    def _told(self, choice: ParserChoice, tools: Tools) -> ParserChoice:
        tools.progress.note(f"{self.target}: {choice.note}")
        return choice

    def _undecided(self, model: ModelFacts) -> bool:
        """Say whether the table leaves the parser of calls open, or that of thoughts."""
        return self._of_calls(model) or self._of_thoughts(model)

    def _of_calls(self, model: ModelFacts) -> bool:
        """Say whether the table has no row, or several, for a template with tools."""
        engine, serve = self.of.target.engine, self.file.recipe.serve
        if not engine.has_parsers or serve.tool_parser not in ("", AUTO):
            return False
        if is_set(serve.extra, TOOL_PARSER) or model.task.kind != "generate":
            return False
        return has_tools(model.chat_template) and len(fitting(model, engine.name)) != 1

    def _of_thoughts(self, model: ModelFacts) -> bool:
        """Say whether the table has no row for a template that writes thoughts."""
        engine, serve = self.of.target.engine, self.file.recipe.serve
        if not engine.has_parsers or serve.reasoning_parser not in ("", AUTO):
            return False
        if is_set(serve.extra, REASONING_PARSER) or model.task.kind != "generate":
            return False
        return writes_thoughts(model.chat_template) and not fitting_thoughts(model, engine.name)

    def _obstacle(self, tools: Tools) -> str:
        """Return why the engine's own parsers cannot be asked; "" if they can."""
        engine = self.of.target.engine
        if engine.name != "vllm":
            return f"{engine.title}'s own parsers are not asked"
        if self._makes_engine or tools.store.find(self._engine.key):
            return ""
        return "vLLM's packages are not here, so its own parsers are not asked"

    @property
    def _engine(self) -> StageInputs:
        return base_inputs(self.of.target.engine.base.cpu.removeprefix(OWN))

    @property
    def _makes_engine(self) -> bool:
        """Whether the image is of the packages that are asked, so that the build has them."""
        engine, recipe = self.of.target.engine, self.file.recipe
        base = base_reference(engine, recipe.serve.gpu or "", recipe.image.base)
        wanted = recipe.image.platforms
        return base == engine.base.cpu and (not wanted or host_platform() in wanted)

    def _inputs(self, model: ModelFacts, tree: Tree) -> StageInputs:
        """Return what is read depends on: template, tokenizer, engine, and the parsers' names."""
        files = {one.path: one.digest for one in tree.files if one.path.startswith(_KEPT)}
        parsers, thoughts = self._asked(model)
        reasoners = self._reasoners(model)
        of_thoughts: list[JsonValue] = [[list(reasoners), THINKING]] if reasoners else []
        asked: JsonValue = [list(parsers), thoughts, list(chats()), TOOLS, *of_thoughts]
        return StageInputs(
            stage=self.name,
            recipe_number=self.recipe_number,
            inputs={
                "template": Digest.of(model.chat_template.encode()),
                "tokenizer": Digest.of(canonical({k: str(v) for k, v in files.items()})),
                "engine": self._engine.key,
                "asked": Digest.of(canonical(asked)),
                "builder": builder_pins(BUILDER),
            },
        )

    def _reasoners(self, model: ModelFacts) -> tuple[str, ...]:
        """Return the parsers of thoughts that are asked."""
        both = _words("reasoning-parser")
        return tuple(sorted(both)) if self._of_thoughts(model) else ()

    def _asked(self, model: ModelFacts) -> tuple[tuple[str, ...], str]:
        """Return the parsers that are asked, those of the family first, and that of thoughts."""
        if not self._of_calls(model):
            return (), ""
        both, builds = _words("tool-call-parser"), known_options(cpu=True)
        first = [one for one in fitting(model, "vllm") if one in both]
        thoughts = thoughts_of(model, "vllm", builds, self.file.recipe.serve.reasoning_parser)
        return tuple(dict.fromkeys([*first, *sorted(both)])), thoughts

    def _read(
        self, model: ModelFacts, checkpoint: Checkpoint, tools: Tools, folder: Path
    ) -> JsonValue:
        engine = self.of.target.engine
        if (entry := tools.store.find(self._engine.key)) is None:
            base_image(engine.base.cpu, engine.name, tools)
            entry = tools.store.find(self._engine.key)
        if entry is None:
            raise EnvironmentFailure("vLLM's packages could not be made", hint="see its log")
        packages = entry.tree.root / PACKAGES
        tools.runner.prepare(BUILDER, tools.progress)
        parsers, thoughts = self._asked(model)
        job = ReadCallsJob(
            builder=BUILDER,
            model=Input.checkpoint(checkpoint),
            packages=Input(path=packages),
            parsers=parsers,
            thoughts=thoughts,
            tools=tuple(parse(json.dumps(TOOLS))),
            chats=chats(),
            reasoners=self._reasoners(model),
            thinking=parse(json.dumps(THINKING)),
            output=folder,
            memory_bytes=_MEMORY,
            seconds=job_seconds(0),
        )
        found: Mapping[str, JsonValue] = tools.runner.run(job, tools.progress)
        return dict(found)

    def _chosen(self, model: ModelFacts, read: JsonValue) -> ParserChoice:
        found = ReadBack.from_json(read)
        calls, thoughts = ParserChoice(), ParserChoice()
        if self._of_calls(model):
            calls = choice_of(found, fitting(model, self.of.target.engine.name))
        if self._of_thoughts(model):
            thoughts = choice_of_thoughts(found)
        return ParserChoice(
            tools=calls.tools,
            thoughts=thoughts.thoughts,
            note="; ".join(filter(None, (calls.note, thoughts.note))),
        )

    def _stands(self, model: ModelFacts, why: str) -> ParserChoice:
        """Return that the table's answer stands."""
        first, *others = fitting(model, self.of.target.engine.name) or ("",)
        what = f"{' and '.join([first, *others])} fit" if others else "no known form fits"
        taken = f"; {first} is taken" if first else ""
        about = "tool calls" if self._of_calls(model) else "thoughts"
        if about == "thoughts":
            what, taken = "no known form fits", ""
        elif self._of_thoughts(model):
            about += " and thoughts" if not first else ""
        return ParserChoice(note=f"{about}: {what} the chat template; {why}{taken}")


def _words(option: str) -> frozenset[str]:
    """Return an option's words of both builds: CPUs' packages may be of an earlier version."""
    known, builds = known_options(), known_options(cpu=True)
    return frozenset(known.words[option]) & frozenset(builds.words[option])
