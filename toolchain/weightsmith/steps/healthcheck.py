"""The layer with the program by which an image's health is checked, and its replay set asked.

It is the same in all images of an engine and a platform, and works without Python, shell and curl.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from weightsmith.core.errors import EnvironmentFailure
from weightsmith.core.values import FileEntry, JsonValue, canonical, key_of
from weightsmith.models.facts import ModelFacts
from weightsmith.models.reshard import HASHED_AT_ONCE, Memo, Resharded, beginning_of
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.tar import source_date_epoch
from weightsmith.recipe.schema import Recipe
from weightsmith.serving.devices import is_cpu
from weightsmith.serving.engine import Engine
from weightsmith.serving.healthcheck import BEGINNING, FOLDER, NAME, WITH_WEIGHTS
from weightsmith.steps.bases import base_inputs
from weightsmith.steps.tools import Tools


def wants_probe(recipe: Recipe) -> bool:
    """Say whether a recipe's images are to be asked when they start.

    So it is unless no set can come of it, its questions are secret, or `replay.probe` is off.
    """
    replay = recipe.replay
    asks = recipe.evaluate or replay.data or any(one.evaluate for one in recipe.adapters)
    return bool(asks) and replay.probe and replay.keep == "questions"


def probes_replay(recipe: Recipe, model: ModelFacts) -> bool:
    """Say whether manifests of a recipe's images ask the set when a container starts."""
    return wants_probe(recipe) and model.task.kind != "other"


def reads_weights(recipe: Recipe) -> bool:
    """Say whether that probe compares all bytes of the weights, too."""
    return wants_probe(recipe) and recipe.replay.read_weights


def has_program(recipe: Recipe, model: ModelFacts, device: str) -> bool:
    """Say whether images of a recipe have the program: as their health check, or for that probe."""
    return is_cpu(device) or probes_replay(recipe, model)


def healthcheck_layers(
    engine: Engine,
    platforms: Iterable[str],
    tools: Tools,
    *,
    optional: bool,
    whole_weights: bool = False,
) -> Mapping[str, TarLayer]:
    """Return the engine's program's layer for each platform, compiled once on this machine.

    `optional`: the image's own health check is another, so the recipe can do without it. With
    `whole_weights` it compares all bytes of the weights, whatever the engine. Raises
    EnvironmentFailure if the compiler cannot be downloaded or fails.
    """
    try:
        program = NAME if engine.tells_size and not whole_weights else WITH_WEIGHTS
        return {each: _layer(program, each, tools) for each in platforms}
    except EnvironmentFailure as error:
        without = "; `replay: {probe: false}` in the recipe does without the program" * optional
        raise EnvironmentFailure(error.message, hint=error.hint + without) from None


def list_weights(split: Resharded, folder: str, memo: Memo, *, whole: bool) -> bytes:
    """Return the list of the image's files of weights in a folder, with sizes and beginnings.

    A file's beginning is its first MiB: its header, and for most formats some of its weights. So
    a probe knows in a second whether a server has read the weights that were tested. `whole` adds
    the SHA-256 of all bytes, which it then reads.
    """
    tree = split.tree

    def row(file: FileEntry) -> JsonValue:
        content = split.contents.get(file.path) or tree.source(file.path)
        key = key_of(["beginning", BEGINNING, file.digest])
        digest = memo(key, lambda: beginning_of(content, BEGINNING))
        begins = digest.removeprefix("sha256:")
        digests = {"begins": begins, **({"sha256": file.digest.hex} if whole else {})}
        return {"path": f"{folder}/{file.path}", "size": file.size, **digests}

    files = [file for file in tree.files if file.path.endswith((".safetensors", ".gguf"))]
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        rows = list(pool.map(row, files))
    return canonical({"version": 1, "files": rows}) + b"\n"


def _layer(program: str, platform: str, tools: Tools) -> TarLayer:
    stage = base_inputs(NAME, platform)

    def make(folder: Path) -> Mapping[str, JsonValue]:
        tools.make_engine_files(NAME, platform, folder, tools.progress)
        return {}

    tree = tools.store.produce(stage.key, stage.note, make).tree
    members = tuple(
        Member(
            path=f"{FOLDER.strip('/')}/{NAME if file.path == program else file.path}",
            size=file.size,
            mode=0o755 if file.path == program else 0o644,
            source=tree.source(file.path),
            digest=file.digest,
        )
        for file in tree.files
        if file.path == program or file.path not in (NAME, WITH_WEIGHTS)
    )
    return TarLayer(members=members, epoch=source_date_epoch(), memo=tools.store.memo)
