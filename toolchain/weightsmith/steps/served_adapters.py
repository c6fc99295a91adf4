"""Adapters that an image serves beside their base, unmerged."""

from __future__ import annotations

import re
from functools import lru_cache
from math import prod
from pathlib import Path

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.safe_parse import read_json
from weightsmith.core.values import (
    AdapterSnapshot,
    Artifact,
    Checkpoint,
    Digest,
    JsonValue,
    Sources,
    Tree,
)
from weightsmith.merging.adapter_config import REFUSED, UNMERGED, read_adapter_config
from weightsmith.merging.claims import require_all_targeted
from weightsmith.merging.tying import is_head
from weightsmith.models.facts import read_facts
from weightsmith.models.safetensors import read_header
from weightsmith.models.templates import own_template
from weightsmith.recipe.file import RecipeFile
from weightsmith.recipe.schema import ADAPTER, Recipe
from weightsmith.recipe.sources import last_name
from weightsmith.serving.engine import ServedAdapter
from weightsmith.serving.targets import Target
from weightsmith.steps.drafting import FOLDER as DRAFT
from weightsmith.steps.sizes import ForeseenTree

FOLDER = "adapters"
"""Subfolder of the base that contains the adapters."""
_OWNED = 3
"""Slashes of `hf://owner/name`."""
_FACTOR = re.compile(r"(?P<module>.+)\.lora_[AB]\.weight")
_EXPERT = re.compile(r"\.experts\.\d+\.")


def unmerged_adapters(
    file: RecipeFile, target: Target, sources: Sources
) -> tuple[ServedAdapter, ...]:
    """Return the adapters that a target serves unmerged; () for a merged target.

    Raises UsageError if the recipe cannot evaluate them separately, InputRefused for adapters that
    cannot be served.
    """
    if not target.format.unmerged:
        return ()
    if len(sources.adapters) > 1 and file.recipe.evaluate:
        raise UsageError(
            f"{target.name} serves {len(sources.adapters)} adapters separately, but the recipe's"
            " `evaluate` tests them together",
            hint="give each adapter its own `evaluate`",
        )
    found = served_adapters(sources, gguf="gguf" in target.engine.accepts)
    if isinstance(sources.base.tree, ForeseenTree):
        return found
    for adapter in sources.adapters:
        own = adapter.snapshot
        _require_all_targeted(sources.base.tree.root, own.tree.root, own.digest)
    folders = tuple(adapter.snapshot.tree.root for adapter in sources.adapters)
    digests = tuple(adapter.snapshot.digest for adapter in sources.adapters)
    _require_fit(sources.base.tree.root, folders, digests)
    return found


def how_asked(
    file: RecipeFile, target: Target, sources: Sources, number: int
) -> tuple[str, dict[str, JsonValue]]:
    """Return name and further fields of a request that an adapter is to answer; both may be empty.

    An image that serves several adapters unmerged is told which one; others have one alone.
    """
    if not target.format.unmerged or len(sources.adapters) < 2:
        return "", {}
    if fields_of := target.engine.adapter_fields:
        return "", dict(fields_of(number))
    return unmerged_adapters(file, target, sources)[number].name, {}


def chat_template(target: Target, sources: Sources, checkpoint: Checkpoint) -> str | None:
    """Return the chat template of what a target serves; None without one."""
    return own_template(served_checkpoint(target, sources, checkpoint).texts)


def served_checkpoint(target: Target, sources: Sources, checkpoint: Checkpoint) -> Tree:
    """Return the files of the checkpoint that a target serves: with adapters apart, the base."""
    return sources.base.tree if target.format.unmerged else checkpoint.tree


@lru_cache(maxsize=4096)
def _require_all_targeted(base: Path, adapter: Path, _digest: Digest) -> None:
    """Do so once for each adapter: a build asks for its adapters more than once."""
    require_all_targeted(base, adapter)


@lru_cache(maxsize=256)
def _require_fit(base: Path, adapters: tuple[Path, ...], _digests: tuple[Digest, ...]) -> None:
    """Refuse adapters whose names, ranks or shapes are not the base's, as a merge would.

    Engines leave out a layer that they do not have, and fail at other shapes. The tensors of a
    quantized base have other shapes.
    """
    from weightsmith.merging.plan import make_plan  # slow to import

    if read_facts(base).packing:
        return
    try:
        make_plan(base, [(adapter, 1.0) for adapter in adapters])
    except InputRefused as refused:
        raise InputRefused(
            refused.message,
            hint="name the base that the adapter was trained on, or export it again with PEFT's "
            "save_pretrained",
        ) from refused


def base_weight_bytes(artifact: Artifact) -> int:
    """Return the bytes of an artifact's weights, without what lies beside them."""
    apart = (f"{FOLDER}/", f"{DRAFT}/") if artifact.format.unmerged else (f"{DRAFT}/",)
    files = (entry for entry in artifact.tree.files if not entry.path.startswith(apart))
    # `texts`, since a shared cache fetches the weights for `root`.
    return Tree(root=artifact.tree.texts, files=tuple(files)).weight_bytes


def served_adapters(sources: Sources, *, gguf: bool = False) -> tuple[ServedAdapter, ...]:
    """Return each adapter's name, rank, size, and folder (or file, as `gguf`) in the image.

    A single adapter has no own name: it is served under the model's name. Raises UsageError if
    there is none or one has a weight, InputRefused for adapters that engines cannot apply at run
    time.
    """
    if not sources.adapters:
        raise UsageError("no adapter to serve with the base", hint="add an adapter to the recipe")
    found: list[ServedAdapter] = []
    for adapter in sources.adapters:
        if adapter.weight != 1.0:
            raise UsageError(
                f"adapter {adapter.snapshot.source} has weight {adapter.weight}, but engines"
                " apply it at full weight",
                hint="merge it, or remove the weight",
            )
        name = adapter_name(adapter.snapshot.source, adapter.version)
        place = f"{FOLDER}/{name}.gguf" if gguf else f"{FOLDER}/{name}"
        if any(other.folder == place for other in found):
            raise UsageError(f"two adapters are named {name}", hint="give them different versions")
        rank, tree = _rank(adapter, gguf=gguf), adapter.snapshot.tree
        count, size = _weights(tree.path("adapter_model.safetensors"), tree.digest, gguf=gguf)
        shown = "" if len(sources.adapters) == 1 else name
        found.append(
            ServedAdapter(
                name=shown,
                folder=place,
                rank=rank,
                matrices=count,
                weight_bytes=size,
                uri=_uri(adapter.snapshot.pin),
            )
        )
    return tuple(found)


def _uri(pin: str) -> str:
    """Return the URI by which KServe's downloader gets the pinned files; "" if it cannot.

    Source: kserve_storage 0.21, `hf://owner/model:revision`.
    """
    place, _, commit = pin.partition("@")
    known = place.startswith("hf://") and place.count("/") == _OWNED and commit
    return f"{place}:{commit}" if known else ""


def adapter_name(source: str, version: str) -> str:
    """Return what clients call an adapter: the last part of its source, and its version."""
    name = last_name(source)
    name = f"{name}-{version}" if version else name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "adapter"


def adapter_forms(recipe: Recipe) -> tuple[str, ...]:
    """Return how the tags of adapters' own artifacts end: `adapter`, of several `adapter-NAME`."""
    names = [adapter_name(one.source, one.version) for one in recipe.adapters]
    return tuple(f"{ADAPTER}-{name}" for name in names) if len(names) > 1 else (ADAPTER,)


@lru_cache(maxsize=8192)
def _weights(path: Path, _digest: Digest, *, gguf: bool) -> tuple[int, int]:
    """Return the matrices that an adapter changes, and its bytes; as GGUF, all are in float32.

    Engines stack a layer's experts, so that these are one matrix.
    """
    tensors = read_header(path).tensors
    if not tensors:
        raise InputRefused(
            f"{path} has no tensors", hint="the adapter was saved empty; export it again"
        )
    for one in tensors:
        plain = _FACTOR.fullmatch(one.name)
        if not plain or is_head(plain["module"]):
            raise InputRefused(
                f"{path}: engines do not apply {one.name} unmerged: they take lora_A and lora_B of"
                " layers other than embeddings and heads",
                hint="merge it",
            )
    changed = {_EXPERT.sub(".experts.", one.name.partition(".lora_")[0]) for one in tensors}
    return len(changed), sum(4 * prod(one.shape) if gguf else one.size for one in tensors)


def _rank(adapter: AdapterSnapshot, *, gguf: bool) -> int:
    path = adapter.snapshot.tree.path("adapter_config.json")
    config = read_json(path)
    if (kind := config.get("peft_type")) != "LORA":
        raise InputRefused(
            f"{path}: peft_type is {kind!r}, and engines serve LORA alone unmerged",
            hint=UNMERGED if kind in REFUSED else "merge it",
        )
    for key in ("use_dora", "lora_bias", "use_bdlora", "layer_replication"):
        if config.get(key):
            raise InputRefused(f"{path}: engines do not serve {key} unmerged", hint="merge it")
    # llama.cpp takes one alpha over each tensor's own rank; vLLM 0.32 what PEFT does.
    for key in ("alpha_pattern", "use_rslora") if gguf else ():
        if config.get(key):
            raise InputRefused(
                f"{path}: this engine does not support the scaling by {key}", hint="merge it"
            )
    replaced = config.get("modules_to_save") or config.get("trainable_token_indices")
    if config.get("bias", "none") != "none" or replaced:
        raise InputRefused(
            f"{path}: the adapter replaces parts of the base, which engines cannot do unmerged",
            hint="merge it",
        )
    targets = config.get("target_modules")
    if isinstance(targets, list) and {"embed_tokens", "lm_head"} & set(targets):
        raise InputRefused(
            f"{path}: it changes embeddings, which engines cannot do unmerged", hint="merge it"
        )
    ranks = [config.get("r"), *dict(config.get("rank_pattern") or {}).values()]
    if not all(isinstance(rank, int) and 0 < rank <= 10_000 for rank in ranks):
        raise InputRefused(
            f"{path}: r is {config.get('r')!r}, which is not a valid rank",
            hint="export the adapter again with PEFT's save_pretrained",
        )
    if "lora_alpha" not in config:
        raise InputRefused(
            f"{path} has no lora_alpha, without which engines load no adapter",
            hint="export the adapter again with PEFT's save_pretrained",
        )
    read_adapter_config(path.parent)
    return max(int(rank) for rank in ranks)
