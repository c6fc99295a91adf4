"""Flags made from a section of the recipe: a new option is its field and the code that uses it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, cast

import pytest
from invoke.collection import Collection
from pydantic import Field
from weightsmith.api.commands.merge import open_sources
from weightsmith.api.commands.recipes import given
from weightsmith.cli.command import command
from weightsmith.cli.program import Weightsmith
from weightsmith.cli.sections import Flags
from weightsmith.core.jobs import write_job
from weightsmith.core.merge_options import Merge
from weightsmith.core.ports import Runner
from weightsmith.merging.combining.combination import Combination
from weightsmith.recipe.schema import Quantize, Recipe, Serve
from weightsmith.recipe.section import Flag, FlagFields
from weightsmith.stages.merge import inputs, merge
from weightsmith.steps.destinations import InStore

from tests.fakes.memory import memory_tools
from tests.fakes.tiny import write_adapter, write_model


@dataclass(frozen=True, slots=True, kw_only=True)
class More(Merge):
    """A merge with one more option."""

    strength: float = field(
        default=1.0, metadata={"ge": 0, "le": 2, "description": "Factor on `every` delta."}
    )


class MoreRecipe(Recipe):
    """A recipe with it."""

    merge: More = More()


class Builder:
    """Keeps the jobs that it is given."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []

    def prepare(self, *_given: object) -> None:
        """Have everything."""

    def run(self, job: Any, _progress: object) -> dict[str, Any]:
        """Do nothing."""
        self.jobs.append(job)
        return {"seconds": 0.0}


def run(flags: Flags, *words: str) -> tuple[int, Any]:
    """Run a command that has only these flags; return its exit code and what its body got."""
    taken = []

    @command(flags)
    def example(asked: Any) -> tuple[Any, str]:
        """Take options."""
        taken.append(asked)
        return {}, ""

    namespace = Collection()
    namespace.add_task(example)
    program = Weightsmith(name="weightsmith", version="0", namespace=namespace)
    try:
        program.run(["weightsmith", "example", *words])
    except SystemExit as end:
        return int(end.code or 0), None
    return 0, taken[0] if taken else None


def test_a_new_option_is_one_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is a flag with help, a key of the recipe, part of the job and of the result's key."""
    flags = Flags(section=More)
    code, options = run(flags, "--strength", "0.5", "--method", "cat")
    assert (code, options) == (0, More(strength=0.5, method="cat"))
    run(flags, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert "--strength=STRING factor on every delta" in shown
    assert run(flags, "--strength", "3", "--json") == (2, None)
    assert json.loads(capsys.readouterr().out)["error"]["message"].startswith("--strength 3: ")

    row = MoreRecipe.model_json_schema()["$defs"]["More"]["properties"]["strength"]
    assert (row["default"], row["maximum"]) == (1.0, 2)

    runner = Builder()
    tools = replace(memory_tools(tmp_path), runner=cast("Runner", runner))
    base, adapter = write_model(tmp_path / "base"), write_adapter(tmp_path / "a", seed=1)
    sources = open_sources(base, [adapter], [1.0], tools.store)
    assert inputs(sources, options).key != inputs(sources, More(method="cat")).key
    merge(sources, options, InStore(tools.store), tools)
    (job,) = runner.jobs
    assert json.loads(write_job(job))["job"]["options"]["strength"] == 0.5
    assert Combination.of(job.options).method == "cat"


@pytest.mark.parametrize(
    ("section", "words", "wanted"),
    [
        (Merge, (), {}),
        (Merge, ("--density", "0.2", "--method", "ties"), {"density": 0.2, "method": "ties"}),
        (Merge, ("--rank", "8", "--seed=3"), {"rank": 8, "seed": 3}),
        (Quantize, ("--group-size", "64"), {"group_size": 64}),
        (Quantize, ("--group-size", "0"), {"group_size": "auto"}),
        (Quantize, ("--no-zero-point", "--allow-low-bits"),
         {"zero_point": False, "allow_low_bits": True}),
        (Quantize, ("--keep-module", "q_proj", "--keep-module", "v_proj"),
         {"keep": ("q_proj", "v_proj")}),
        (Quantize, ("--tensor-type", "attn_v=q8_0", "--tensor-type", "a=b=c"),
         {"tensor_types": {"attn_v": "q8_0", "a": "b=c"}}),
        (Serve, ("--max-model-len", "4096", "--gpu-count", "2"),
         {"max_model_len": 4096, "gpu_count": 2}),
        (Serve, ("--max-model-len", "auto"), {}),
    ],
)  # fmt: skip
def test_texts_become_values(
    section: type[Any], words: tuple[str, ...], wanted: dict[str, Any]
) -> None:
    code, options = run(Flags(section=section), *words)

    assert code == 0
    assert options == section(**wanted)


@pytest.mark.parametrize(
    ("section", "words", "said"),
    [
        (Merge, ("--method", "mean"), ("sequential", "dare_ties_svd")),
        (Merge, ("--seed", "x"), ("a whole number",)),
        (Merge, ("--density", "half"), ("a number",)),
        (Quantize, ("--group-size", "7"), ("auto", "32", "64", "128")),
        (Serve, ("--max-model-len", "long"), ("a whole number", "auto")),
        (Serve, ("--gpu-memory", "lots"), ()),
    ],
)
def test_a_wrong_value_names_its_flag_and_the_choices(
    section: type[Any],
    words: tuple[str, ...],
    said: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(Flags(section=section), *words, "--json") == (2, None)

    error = json.loads(capsys.readouterr().out)["error"]
    assert error["message"].startswith(f"{' '.join(words)}: ")
    assert all(text in error["message"] for text in said)
    assert error["hint"]


def test_a_flag_goes_before_the_recipe_even_with_the_default() -> None:
    """`--gpu-count 1` changes a recipe that says 4; what is not given changes nothing."""
    flags = Flags(section=Serve, over_recipe=True)
    _, options = run(flags, "--gpu-count", "1", "--max-model-len", "auto")

    assert given("serve", options) == ["serve.gpu_count=1", 'serve.max_model_len="auto"']


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A command's request: flags of its own, and some of a section."""

    source: Annotated[str, Flag(positional=True), "where from"]
    out: Annotated[Path, "where to"]
    spare: Annotated[Path | None, Flag(needed=lambda given: "times" in given), "where else"] = None
    times: Annotated[int, Field(ge=1), "how often"] = 2
    names: Annotated[tuple[str, ...], Flag("name"), "who"] = ()
    folder: Annotated[Path, "where"] = Path("dist")
    loud: Annotated[bool, "how"] = True
    options: Annotated[Merge, FlagFields(only=("seed", "method"))]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ((), {}),
        (("--name", "a", "--name", "b", "--no-loud"), {"names": ("a", "b"), "loud": False}),
        (("--times", "3", "--spare", "s"), {"times": 3, "spare": Path("s")}),
        (("--seed", "7"), {"options": Merge(seed=7)}),
    ],
)
def test_a_request_is_read_with_its_parts(words: tuple[str, ...], wanted: dict[str, Any]) -> None:
    code, asked = run(Flags(section=Asked), "here", "--out", "there", *words)

    plain = {"source": "here", "out": Path("there"), "options": Merge()}
    assert (code, asked) == (0, Asked(**{**plain, **wanted}))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "missing: --out"),
        (("--times", "3"), "missing: --out, --spare"),
        (("--out", "", "--folder", ""), "missing: --out, --folder"),
        (("--out", "o", "--spare", "s", "--times", "0"), "--times 0: input should be greater"),
        (("--out", "o", "--spare", "s", "--times", "x"), "--times x: expected a whole number"),
    ],
)
def test_what_a_request_lacks_is_said_at_once(
    words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(Flags(section=Asked), "here", *words, "--json") == (2, None)
    assert json.loads(capsys.readouterr().out)["error"]["message"].startswith(said)
