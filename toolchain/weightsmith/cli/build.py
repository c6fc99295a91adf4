"""`build` and `plan`: the whole pipeline, run or foreseen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.cli.command import command
from weightsmith.cli.flags import SERVED
from weightsmith.cli.sections import Flags, given
from weightsmith.core.escape import joined
from weightsmith.core.values import Json
from weightsmith.recipe.run_options import RunOptions
from weightsmith.recipe.schema import Quantize, Serve

if TYPE_CHECKING:  # imported when it is called: the list of commands must appear at once
    from weightsmith.building.record import Built
    from weightsmith.recipe.file import RecipeFile

_SERVE = Flags(section=Serve, only=SERVED, over_recipe=True)
_QUANTIZE = Flags(section=Quantize, only=("allow_low_bits", "allow_text_only"), over_recipe=True)
_RUN = Flags(section=RunOptions)


@command(
    many=("target", "adapter", "set", "kind"),
    sections={"serve": _SERVE, "quantize": _QUANTIZE, "run": _RUN},
)
def build(
    *,
    target: Sequence[str] = (),
    recipe: str = "",
    from_: str = "",
    key: str = "",
    run: RunOptions,
    push: bool = False,
    load: bool = False,
    layout: str = "",
    base: str = "",
    adapter: Sequence[str] = (),
    serve: Serve,
    set: Sequence[str] = (),  # noqa: A002 - the flag's name
    kind: Sequence[str] = (),
    quantize: Quantize,
    force: bool = False,
    locked: bool = False,
    update_lock: bool = False,
    dist: str = "dist",
) -> tuple[Mapping[str, Json], str]:
    """Build, check and publish the images of a recipe (or of --base and --adapter)."""
    from weightsmith.building.build import build as build_all
    from weightsmith.building.progress import progress_for
    from weightsmith.building.request import BuildRequest
    from weightsmith.building.targets import chosen_targets
    from weightsmith.building.wiring import keep_clean, open_tools
    from weightsmith.commands.arguments import required, sources_of
    from weightsmith.commands.requests import layout_folder
    from weightsmith.core.errors import UsageError
    from weightsmith.steps.delivery import Outputs

    required(dist=dist)
    _one_lock(locked=locked, update_lock=update_lock, from_=from_)
    if key and not from_:
        raise UsageError(
            "--key needs --from: it is the public key that the image's signature must match",
            hint="--sign-key signs the images of this build",
        )
    if from_:
        keep_clean([base], dist=dist, cache=run.cache)
        base, recipe, locked = (
            "",
            _recipe_again(from_, base, key, dist, set, run.insecure),
            not base,
        )
    file = recipe_file(recipe, base, adapter, _settings(serve, set, quantize, kind))
    layout = layout_folder(layout)
    keep_clean(sources_of(file), dist=dist, layout=layout, cache=run.cache)
    targets = chosen_targets(file, tuple(target), to_build=True)
    with open_tools(run, progress_for()) as tools:
        request = BuildRequest(
            file=file,
            targets=targets,
            outputs=Outputs(
                load=load,
                layout=Path(layout).absolute() if layout else None,
                push=push,
                force=force,
                tag_digest=push,
            ),
            dist=Path(dist).absolute(),
            engine_answers=tools.images_in_engine,
            locked=locked,
            update_lock=update_lock,
        )
        result = {built.target.name: _facts(built) for built in build_all(request, tools)}
    lines = [line for name, facts in result.items() for line in _lines(name, facts)]
    return {"targets": result}, joined(lines)


def _facts(built: Built) -> dict[str, Json]:
    """Return what is printed of a target's image."""
    return {
        "image": built.published.reference,
        "digest": built.published.digest,
        "verdict": built.verdict,
        "unproven": built.unproven,
        "scores": {name: score.score for name, score in built.scores.items()},
        "sameness": built.sameness,
        "verdicts": [v.facts for result in built.results for v in result.verdicts],
        "forms": {
            kind: {
                "reference": form.reference,
                "digest": form.digest,
                "uploaded_bytes": form.uploaded_bytes,
                "mounted": form.mounted,
            }
            for kind, form in built.forms.items()
        },
        "platforms": {
            platform: {"digest": digest, "started": platform == built.started}
            for platform, digest in built.published.platforms.items()
        },
        "uploaded_bytes": built.published.uploaded_bytes,
        "stages": built.stages,
        "report": built.report,
    }


def _lines(name: str, facts: Mapping[str, Any]) -> Iterator[str]:
    yield f"{name}: {facts['image']}@{facts['digest']}"
    for platform, image in facts["platforms"].items() if len(facts["platforms"]) > 1 else ():
        tested = "started and tested" if image["started"] else "not started"
        yield f"  {platform}: {image['digest']}, {tested}"
    for kind, form in facts["forms"].items():
        yield f"  {kind}: {form['reference']}@{form['digest']}"
    if scores := ", ".join(f"{who} {score:.3f}" for who, score in facts["scores"].items()):
        yield f"  scores: {scores}"
    if same := ", ".join(f"{who} {share:.3f}" for who, share in facts["sameness"].items()):
        yield f"  answers equal to the reference's: {same}"
    yield from (f"  NOT PROVEN: {reason}" for reason in facts["unproven"])
    yield f"  report: {facts['report']}"


@command(
    many=("target", "adapter", "set", "kind"),
    sections={"serve": _SERVE, "quantize": _QUANTIZE, "run": _RUN},
)
def plan(
    *,
    target: Sequence[str] = (),
    recipe: str = "",
    run: RunOptions,
    push: bool = False,
    load: bool = False,
    layout: str = "",
    base: str = "",
    adapter: Sequence[str] = (),
    serve: Serve,
    set: Sequence[str] = (),  # noqa: A002 - the flag's name
    kind: Sequence[str] = (),
    quantize: Quantize,
    force: bool = False,
    locked: bool = False,
    update_lock: bool = False,
    measure: bool = False,
    dist: str = "dist",
) -> tuple[Mapping[str, Json], str]:
    """Show what `build` would do: stages, which are cached or why not, memory, disk, time."""
    from weightsmith.building.explain import forecast
    from weightsmith.building.targets import chosen_targets
    from weightsmith.building.wiring import keep_clean, open_tools
    from weightsmith.commands.arguments import required, sources_of
    from weightsmith.commands.plan import table
    from weightsmith.commands.requests import layout_folder
    from weightsmith.core.ports import Silent
    from weightsmith.steps.delivery import Outputs

    required(dist=dist)
    _one_lock(locked=locked, update_lock=update_lock)
    file = recipe_file(recipe, base, adapter, _settings(serve, set, quantize, kind))
    layout = layout_folder(layout)
    keep_clean(sources_of(file), layout=layout, cache=run.cache)
    place = Path(layout).absolute() if layout else None
    outputs = Outputs(load=load, layout=place, push=push, force=force)
    targets = chosen_targets(file, tuple(target))
    with open_tools(run, Silent(), uploads=False) as tools:
        folder = Path(dist).absolute()
        lock = {"locked": locked, "update_lock": update_lock}
        options = {**lock, "measure": measure}
        result = forecast(file, targets, folder, tools, outputs=outputs, **options)
    return result, table(result)


def _settings(
    serve: Serve, settings: Sequence[str], quantize: Quantize, kinds: Sequence[str]
) -> list[str]:
    """Return what --set and flags set of the recipe; what is last takes effect."""
    outputs = [f"outputs.kinds=[{', '.join(kinds)}]"] if kinds else []
    return [*settings, *given("serve", serve), *given("quantize", quantize), *outputs]


def _one_lock(*, locked: bool, update_lock: bool, from_: str = "") -> None:
    """Raise UsageError for flags that want the lock both kept and written again."""
    from weightsmith.core.errors import UsageError

    if update_lock and (locked or from_):
        raise UsageError(
            f"--update-lock and {'--locked' if locked else '--from'} exclude each other",
            hint="give only one of them",
        )


def _recipe_again(
    source: str, base: str, key: str, dist: str, settings: Sequence[str], insecure: bool
) -> str:
    """Return the recipe file of an image that was built before."""
    from weightsmith.building.progress import progress_for
    from weightsmith.building.wiring import make_registry
    from weightsmith.commands.rebuild import recipe_of_image
    from weightsmith.commands.verify import key_path

    with make_registry(insecure=insecure) as registry:
        folder, told = Path(dist).absolute(), progress_for()
        return str(recipe_of_image(source, base, key_path(key), folder, registry, told, settings))


def recipe_file(
    recipe: str, base: str, adapters: Sequence[str], settings: Sequence[str]
) -> RecipeFile:
    """Return the recipe of a file, or the one that --base and --adapter describe."""
    from weightsmith.core.errors import UsageError
    from weightsmith.recipe.file import RecipeFile, check_recipe, read_recipe, with_settings

    if not base:
        if adapters:
            raise UsageError("--adapter needs --base", hint="or name both in a recipe")
        return read_recipe(Path(recipe or "recipe.yaml"), settings)
    if recipe:
        raise UsageError("--recipe and --base exclude each other", hint="use --set base.source=…")
    data = with_settings(
        {
            "name": _name_of(adapters[-1] if adapters else base),
            "base": {"source": base},
            "adapters": [{"source": source} for source in adapters],
        },
        settings,
    )
    return RecipeFile(recipe=check_recipe(data, "the command line"), folder=Path())


def _name_of(source: str) -> str:
    """Return a recipe name from a source's last part."""
    last = source.rstrip("/").rpartition("/")[2].partition("==")[0].lower()
    cleaned = "".join(c if c.isascii() and c.isalnum() else "-" for c in last).strip("-")
    return "-".join(part for part in cleaned.split("-") if part) or "model"


COMMANDS = (build, plan)
