"""Artifact, ServingConfig and bases -> images, assembled in memory without writing files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from operator import attrgetter

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.platforms import host_platform
from weightsmith.core.ports import Store
from weightsmith.core.resources import engine_source
from weightsmith.core.safe_parse import parse_file
from weightsmith.core.thin import MANIFEST
from weightsmith.core.values import (
    LORA,
    SAFETENSORS,
    Artifact,
    Checkpoint,
    Digest,
    Sources,
    StageInputs,
    Stream,
    Tree,
    plain,
)
from weightsmith.evaluating.results import Result, of_adapter, recipe_of_adapter, verdict_of
from weightsmith.models.facts import ModelFacts, read_facts
from weightsmith.models.gguf_config import gguf_models, projector_of
from weightsmith.models.reshard import HASHED_AT_ONCE, Memo, Resharded, is_numbered, reshard
from weightsmith.models.safetensors import read_header
from weightsmith.oci.image import DEFAULT_PLATFORM, Healthcheck, Image, ImageConfig, host_image
from weightsmith.oci.layers import Member, TarLayer
from weightsmith.oci.limits import check_layers
from weightsmith.oci.modelpack import (
    ModelDescription,
    described,
    model_pack,
    ollama_model,
    tar_model_pack,
)
from weightsmith.oci.references import Reference
from weightsmith.oci.streams import first_collision
from weightsmith.oci.weights import (
    LARGEST_ANYWHERE,
    fastest_layer,
    max_weight_layers,
    weight_layers,
)
from weightsmith.provenance.attest import (
    ImageInputs,
    ImageMaterials,
    ReplayFile,
    facts_of,
    index_of_materials,
    license_name,
    public_recipe,
)
from weightsmith.provenance.labels import (
    ARTIFACT,
    ENGINE_LABEL,
    LICENSES,
    PLAN,
    PREFIX,
    TESTED,
    VERDICT,
    assemble_in_roles,
    engine_version,
    labels,
    plan_label,
    reference,
    replay_labels,
    result_labels,
)
from weightsmith.quantizers import of_format
from weightsmith.quantizers.quality.result import QualityResult
from weightsmith.recipe.schema import ADAPTER
from weightsmith.serving.devices import is_cpu
from weightsmith.serving.engine import projector_in
from weightsmith.serving.healthcheck import NAME, WEIGHTS
from weightsmith.serving.memory import parse_size
from weightsmith.serving.parameters import parameters
from weightsmith.serving.plan import ServingConfig, ServingPlan
from weightsmith.steps.bases import (
    ENGINE,
    OWN,
    base_images,
    base_inputs,
    base_reference,
    bases_of,
    data_base,
    platforms_of,
    public_base,
)
from weightsmith.steps.destinations import InStore, layers_in
from weightsmith.steps.healthcheck import (
    has_program,
    healthcheck_layers,
    list_weights,
    reads_weights,
)
from weightsmith.steps.outputs import network_in_jobs
from weightsmith.steps.replays import recorded_replay
from weightsmith.steps.sharing import own_files
from weightsmith.steps.sizes import ForeseenTree
from weightsmith.steps.stage_result import StageResult, Timer, unrecorded
from weightsmith.steps.step import (
    Foreseen,
    ForeseenWeights,
    Foresight,
    PlanRow,
    Results,
    State,
    Step,
    TargetStep,
    Trial,
    UnforeseenStep,
)
from weightsmith.steps.thin import grown, mounted_base, plan_thin, thin_parts
from weightsmith.steps.tools import Tools

USER = "65532:65532"
"""The unprivileged user of images, as a number because an image may have no user database."""
STARTED, MADE = "started and tested on this machine", "made, not started on this machine"
_PLAIN_BITS = 16
_LICENSE = re.compile(r"(LICEN[CS]E|NOTICE|USE_POLICY)(\.(txt|md))?")
_LARGEST_LICENSE = 1 << 20
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_DIGESTS = "digests.json"
_IN_LAYERS, _ATTENTION, _OWN = 1, 2, 3
"""Weights files from the bottom, above tables."""
_FILES = ("modelpack", "modelpack-tar", "ollama", ADAPTER)
"""Kinds that hold files for a model runner."""


def bake(
    prepare: Callable[[], ImageInputs],
    name: str,
    tools: Tools,
    *,
    push: bool = False,
    earlier: Sequence[str] = (),
    results: tuple[Result, ...] = (),
) -> StageResult[tuple[ImageMaterials, ...]]:
    """Return the image for each platform of the base: base, weight layers and a settings layer.

    Without a base, for each platform that the inputs name. A ModelPack is one artifact for all
    platforms.

    `prepare` returns the inputs; it takes minutes if a base is assembled here. The weight
    layers are the same for every kind of image. The store caches layer digests, so an unchanged
    file is not hashed again. `earlier` are the layers of the previous image; if the layers are the
    same, the outcome is cached. `results` are what it was tested with before.

    Raises UsageError for more than 125 layers, for a file that cannot be split to fit a layer,
    and with `push` for a layer that the registry of `name` does not accept; InputRefused for a
    base whose files would hide the weights below it.
    """
    timer = Timer("bake", name, tools)
    inputs = prepare()
    digests = _Digests(inputs, tools.store)
    split = _cut(inputs, digests.memo)
    whole = inputs.recipe is not None and reads_weights(inputs.recipe)
    looked_at = (
        inputs.config
        and inputs.healthcheck
        and not inputs.thin
        and (whole or not inputs.engine.tells_size)
    )
    model_dir, memo = inputs.engine.model_dir, digests.memo
    listed = list_weights(split, model_dir, memo, whole=whole) if looked_at else b""
    inputs = replace(inputs, weights=listed)
    below: list[tuple[Image | None, str]] = [(base, base.platform) for base in inputs.bases]
    if not below:  # what holds no image is for all platforms at once
        wanted = () if inputs.kind in _FILES else inputs.platforms
        below = [(None, platform) for platform in sorted(set(wanted)) or [DEFAULT_PLATFORM]]
    made = tuple(_made(inputs, split, base, each, results, digests.memo) for base, each in below)
    layers = host_image(index_of_materials(made)).layers
    if split.contents:
        digests.keep()
    if push:
        sizes = [(layer.file or layer.digest.short, layer.size) for layer in layers]
        check_layers(sizes, Reference.parse(name).registry)
    # The replay set lies on top of what was published, since the image was asked after this.
    own = [layer.digest for layer in layers]
    return timer.done(made, cached=own == list(earlier)[: len(own)])


def _cut(inputs: ImageInputs, memo: Memo) -> Resharded:
    """Return the artifact's files as they lie in the image."""
    tree, limit = inputs.artifact.tree, largest_file(inputs.largest_layer)
    if inputs.thin or inputs.kind == ADAPTER or limit is None:
        return Resharded(tree, {})
    # `auto` splits where it can and refuses nothing.
    return reshard(tree, limit, memo, strict=inputs.largest_layer is not None)


class _Digests:
    """A memo of what is cut, which a shared cache has too.

    So a machine learns the digests of layers without the weights, and pushes an image of layers
    that the registry has. Those of weights that are here are not taken from elsewhere.
    """

    def __init__(self, inputs: ImageInputs, store: Store) -> None:
        tree = inputs.artifact.tree
        facts = {"artifact": tree.digest, "largest_layer": inputs.largest_layer}
        self._inputs = StageInputs(stage="cut", recipe_number=1, inputs=facts)
        self._memo, self._to = store.memo, InStore(store)
        self._known: dict[str, str] = {}
        far = any(isinstance(tree.source(file.path), Stream) for file in tree.files)
        if far and (found := self._to.find(lambda: self._inputs)):
            with suppress(OSError, ValueError, TypeError, AttributeError):  # it is untrusted
                known = parse_file(found.path(_DIGESTS))
                self._known = {key: Digest(text) for key, text in known.items()}

    def memo(self, key: str, make: Callable[[], str]) -> str:
        """Return the digest cached under a key; make and cache it if there is none."""
        self._known[key] = text = self._known.get(key) or self._memo(key, make)
        return text

    def keep(self) -> None:
        """Store them."""
        self._to.document(lambda: self._inputs, _DIGESTS, lambda _: dict(self._known))


def layer_limit(text: str) -> int | None:
    """Return `image.max_layer_size` in bytes; 0 for `none`, None for `auto`.

    Raises UsageError for what is not a size.
    """
    if text == "auto":
        return None
    return parse_size(text) if text not in ("none", "") else 0


def largest_file(limit: int | None) -> Callable[[int], int] | None:
    """Return what `reshard` gets for a result of `layer_limit`; None if files stay whole."""
    if limit is None:
        return fastest_layer
    return (lambda _: limit) if limit else None


def _made(
    inputs: ImageInputs,
    split: Resharded,
    base: Image | None,
    platform: str,
    results: tuple[Result, ...],
    memo: Memo,
    started: str = "",
) -> ImageMaterials:
    """Return one platform's image with its materials; the labels of others name the `started`."""
    if inputs.kind in _FILES:
        image = _files(inputs, split, results, memo)
        return ImageMaterials(inputs=inputs, split=split, base=None, image=image, results=results)
    config, model_dir = inputs.config, inputs.engine.model_dir
    stand_in = started if base and base.platform != started else ""
    first = base if inputs.order == "weights-first" and not inputs.thin else None
    if first and (found := first_collision(first, [model_dir.strip("/")], memo)):
        raise InputRefused(
            f"the base {inputs.base_name or 'image'} has /{found}, which would hide weights "
            "below it",
            hint="use the order engine-first, or another base",
        )
    thin = inputs.thin
    below = len(base.layers) if base else 0
    weights = thin.weights if thin else _weights(inputs, split, below, memo)
    license_ = license_name(inputs, split.tree)
    labels = {
        ARTIFACT: split.tree.digest,
        **({LICENSES: license_} if license_ else {}),
        **({ENGINE_LABEL: inputs.engine.name} if config else {}),
        **inputs.labels,
        **result_labels(results, stand_in),
    }
    inside = {path: text.encode() for path, text in config.image_files.items()} if config else {}
    inside |= {WEIGHTS: inputs.weights} if inputs.weights else {}
    settings = tuple(
        Member.of_bytes(path.lstrip("/"), data) for path, data in sorted(inside.items())
    )
    programs = (thin.program if thin else {}, inputs.healthcheck) if config else ()
    program = [parts[platform] for parts in programs if parts]
    replay = (inputs.replay.layer,) if inputs.replay and settings else ()
    if replay and inputs.replay:
        labels |= replay_labels(inputs.replay.made)
    added = ImageConfig(user=USER, labels=labels)
    if config:
        added = replace(
            added,
            env=dict(sorted(config.env.items())),  # an order that survives the label
            entrypoint=(*(thin.entrypoint if thin else ()), *config.entrypoint) or None,
            cmd=config.command,
            ports=(config.port,),
            healthcheck=Healthcheck(command=config.healthcheck) if config.healthcheck else None,
        )
    image = assemble_in_roles(
        weights,
        (*program, TarLayer(members=settings), *replay) if settings else (),
        added,
        base,
        inputs.base_name,
        order="engine-first" if thin else inputs.order,
        version=engine_version(base.labels) if base and config else "",
        platform=platform,
    )
    return ImageMaterials(
        inputs=inputs, split=split, base=base, image=image, results=results, stand_in=stand_in
    )


def _weights(
    inputs: ImageInputs, split: Resharded, layers_below: int, memo: Memo
) -> tuple[TarLayer, ...]:
    layers = weight_layers(
        split.tree,
        inputs.engine.model_dir,
        memo=memo,
        most=max_weight_layers(layers_below),
        largest=LARGEST_ANYWHERE if inputs.largest_layer is None else inputs.largest_layer,
        contents=split.contents,
        order=_order(inputs, split),
    )
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        list(pool.map(attrgetter("digest"), layers))  # which the layers remember
    return layers


def _order(inputs: ImageInputs, split: Resharded) -> Mapping[str, int]:
    """Return the order of weights files: what fewer adapters change is further below.

    Above all is what these adapters change, then attention, which some change alone.
    """
    own: frozenset[str] = frozenset()
    if inputs.sources:
        own = own_files(split, inputs.artifact, inputs.changed)
    found = dict.fromkeys(own, _OWN)
    for path, (name, *_) in split.tensors.items():
        if path not in own and is_numbered(name):
            found[path] = _ATTENTION if "att" in name else _IN_LAYERS
    return found


def _files(inputs: ImageInputs, split: Resharded, results: tuple[Result, ...], memo: Memo) -> Image:
    """Return the model's files in the form of a model runner, with the labels as annotations."""
    license_ = license_name(inputs, split.tree)
    labels = {
        ARTIFACT: split.tree.digest,
        **({LICENSES: license_} if license_ else {}),
        **inputs.labels,
        **result_labels(results),
    }
    if inputs.kind == "ollama":
        return _for_ollama(inputs, split, labels)
    if inputs.kind == ADAPTER:
        return _adapter(inputs, split, labels)
    format_, facts = inputs.artifact.format, _facts(inputs)
    sees_images = bool(facts and facts.sees_images)
    if gguf_models(file.path for file in split.tree.files):  # these only with a projector
        sees_images = projector_in(split.tree) is not None
    description = ModelDescription(
        name=inputs.name,
        version=inputs.version,
        family=facts.model_type if facts else "",
        licenses=(license_,) if license_ else (),
        format=format_.suffix.removeprefix("."),
        parameters=_count(facts),
        precision=facts.stated_dtype if facts else "",
        quantization=format_.name if format_.bits_per_weight < _PLAIN_BITS else "",
        sees_images=sees_images,
        described=described(labels),
    )
    if inputs.kind == "modelpack":
        return model_pack(split.tree, description, labels, split.contents)
    return tar_model_pack(_weights(inputs, split, inputs.layers_below, memo), description, labels)


def _adapter(inputs: ImageInputs, split: Resharded, labels: Mapping[str, str]) -> Image:
    """Return an adapter's files as a ModelPack, each a layer of its own bytes."""
    facts, license_ = _facts(inputs), license_name(inputs, split.tree)
    tensors = read_header(split.tree.header("adapter_model.safetensors")).tensors
    description = ModelDescription(
        name=inputs.name,
        version=inputs.version,
        family=facts.model_type if facts else "",
        licenses=(license_,) if license_ else (),
        format="safetensors",
        parameters=sum(prod(tensor.shape) for tensor in tensors),
        precision=_DTYPES.get(tensors[0].dtype, "") if tensors else "",
        described=described(labels),
    )
    return model_pack(split.tree, description, labels, split.contents)


def _facts(inputs: ImageInputs) -> ModelFacts | None:
    """Return what the model is, by its own files, else by the checkpoint that it was made from."""
    found = facts_of(inputs.artifact.tree)
    return found or (facts_of(inputs.checkpoint.tree) if inputs.checkpoint else None)


def _count(facts: ModelFacts | None) -> int:
    with suppress(InputRefused):  # the number is not known for every architecture
        return parameters(facts).all if facts else 0
    return 0


def _for_ollama(inputs: ImageInputs, split: Resharded, labels: Mapping[str, str]) -> Image:
    """Return a GGUF model in Ollama's form; raises UsageError if it is not one GGUF file."""
    entries = {entry.path: entry for entry in split.tree.files}
    files = gguf_models(path for path in entries if "/" not in path)  # without a draft
    projector = projector_of(entries)
    if len(files) != 1:
        raise UsageError(
            f"Ollama takes a model of one GGUF file, and this one has {len(files)}",
            hint="use a target such as llamacpp-q4_k_m, without quantize.split_max_size",
        )
    facts = _facts(inputs)
    base = inputs.sources.base.tree if inputs.sources else None
    trees = filter(None, (split.tree, inputs.licensed, base))
    return ollama_model(
        split.tree,
        entries[files[0]],
        projector=entries.get(projector),
        family=facts.model_type if facts else "llama",
        file_type=inputs.artifact.format.name.upper(),
        parameters=_count(facts),
        context=inputs.context,
        licenses=next(filter(None, map(_licenses, trees)), ()),
        labels=labels,
        contents=split.contents,
    )


def _licenses(tree: Tree) -> tuple[str, ...]:
    names = [file.path for file in tree.files if _LICENSE.fullmatch(file.path)]
    small = [name for name in sorted(names) if tree.path(name).stat().st_size <= _LARGEST_LICENSE]
    return tuple(tree.path(name).read_text("utf-8", "replace") for name in small)


Images = tuple[ImageMaterials, ...]
"""One for each platform."""


@dataclass(frozen=True, eq=False, kw_only=True)
class BakeStep(TargetStep[Images, Mapping[str, str]]):
    """Assembles the image of a target on the base that the lock pins; it has no scores yet.

    Foreseen are its platforms, with what becomes of each one's image.
    """

    name = "bake"

    sources: Step[Sources, Sources]
    checkpoint: Step[Checkpoint, ForeseenWeights]
    weights: Step[Artifact, ForeseenWeights]
    undrafted: Step[Artifact, ForeseenWeights] | None = None
    """Those without what drafts for them; None if nothing does."""
    quantized: Step[Artifact, ForeseenWeights]
    """Of a target whose adapters are not merged, the base that they lie beside."""
    quality: Step[QualityResult | None, None]
    config: Step[ServingConfig, ServingPlan]

    def foresee(self, seen: Foresight) -> Foreseen[Mapping[str, str]]:
        """Return the platforms, and a row for each program that is compiled for one of them.

        Those are engines for other machines, and the health check. Raises what `platforms_of` and
        `check_engine_files` do.
        """
        recipe, device = self.file.recipe, seen[self.config].device
        base = base_reference(self.of.target.engine, device, recipe.image.base)
        here, platforms = host_platform(), platforms_of(self.file, base)
        said = {one: STARTED if one == here else MADE for one in platforms}
        asks = has_program(recipe, seen[self.checkpoint].model, device)
        others = [one for one in platforms if base.startswith(OWN) and one != here]
        # Which platforms a registry's base has is known when it was asked.
        asking = [*said] or [DEFAULT_PLATFORM] if asks else []
        name = base.removeprefix(OWN)
        rows = (
            *(self._compiled(name, one, ENGINE, seen) for one in others),
            *(self._compiled(NAME, one, "health check", seen) for one in asking),
        )
        return Foreseen(value=said, rows=rows)

    def _compiled(self, engine: str, platform: str, name: str, seen: Foresight) -> PlanRow:
        cached = seen.tools.store.find(base_inputs(engine, platform).key) is not None
        if not cached:
            seen.tools.check_engine_files(engine, platform)
        source = engine_source(engine)
        takes = source.get("takes", "about ten minutes on four cores")
        why = "" if cached else f"{engine} for {platform} is made once: {takes}"
        disk = 0 if cached else int(str(source.get("room_bytes", 0)))
        return self.row(State(cached=cached, why=why), name=name, disk=disk)

    def run(self, have: Results, tools: Tools) -> StageResult[Images]:
        """Return the image for each platform; raises what `bake` does."""
        name, earlier = reference(self.file.recipe, self.target), layers_in(self.of.folder)
        prepare = partial(self._made_of, have, tools)
        return bake(prepare, name, tools, push=self.of.outputs.push, earlier=earlier)

    def _made_of(self, have: Results, tools: Tools) -> ImageInputs:
        recipe, target, config = self.file.recipe, self.of.target, have[self.config]
        sources, checkpoint = have[self.sources], have[self.checkpoint]
        artifact = have[self.weights]
        device, again = config.plan.device, self.of.update_lock
        base_name, bases = bases_of(self.file, target, device, tools, update_lock=again)
        base_weights = have[self.quantized] if artifact.format.unmerged else None
        made = (base_weights or artifact).format
        merges = bool(sources.adapters) and not artifact.format.unmerged
        planned = tools.merges.planned(sources, recipe.merge) if merges else None
        asked = has_program(recipe, read_facts(checkpoint.tree.texts), device)
        asking = [each.platform for each in bases if asked]
        return ImageInputs(
            name=recipe.name,
            version=recipe.version,
            artifact=artifact,
            undrafted=have[self.undrafted] if self.undrafted else None,
            base_weights=base_weights,
            engine=target.engine,
            config=config,
            bases=bases,
            base_name=public_base(base_name),
            labels=labels(recipe, sources, artifact, have[self.quality], config),
            order=recipe.image.order,
            largest_layer=layer_limit(recipe.image.max_layer_size),
            parameters={"target": target.name, "recipe": public_recipe(recipe)},
            sources=sources,
            changed=planned.changed if planned else frozenset(),
            apart=planned.apart if planned else frozenset(),
            checkpoint=checkpoint,
            recipe=recipe,
            healthcheck=healthcheck_layers(
                target.engine,
                asking,
                tools,
                optional=not is_cpu(device),
                whole_weights=reads_weights(recipe),
            ),
            quantizer_builder=of_format(made.name).builder if made.packed else "",
            network_in_jobs=network_in_jobs(checkpoint, artifact, tools),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class LabelStep(UnforeseenStep[Images]):
    """Adds scores and verdict to the image as labels, and its replay set as a layer on top.

    The labels of platforms whose image was not started name the one that was, and say that these
    are not proven.
    """

    name = "labels"

    image: Step[Images, Mapping[str, str]]
    trial: Step[Trial, None]

    def run(self, have: Results, tools: Tools) -> StageResult[Images]:
        """Return the image as it is published."""
        trial, memo = have[self.trial], tools.store.memo
        replay = self._replay(trial, have[self.image][0].inputs)
        return unrecorded(
            tuple(
                _made(
                    replace(one.inputs, replay=replay),
                    one.split,
                    one.base,
                    one.image.platform,
                    trial.results,
                    memo,
                    trial.started,
                )
                for one in have[self.image]
            )
        )

    def _replay(self, trial: Trial, inputs: ImageInputs) -> ReplayFile | None:
        """Return the set of the image's answers, or of what stands for it; None for none."""
        made = trial.replay
        if made is None and trial.requests and inputs.config:
            format_ = inputs.artifact.format.without_adapters
            made = recorded_replay(
                trial.results,
                trial.requests,
                inputs.config.served_name,
                trial.tolerance,
                packed=format_.packed,
            )
        secret = self.file.recipe.replay.keep == "digests"
        return ReplayFile(made=made, secret=secret) if made else None


@dataclass(frozen=True, eq=False, kw_only=True)
class FormStep(UnforeseenStep[Images]):
    """Assembles another kind of the same weights, such as a volume, of the image's layers."""

    name = "form"
    before_publishing = True

    kind: str
    """In its tag."""
    adapter: int | None = None
    """Of an adapter's own artifact, its number."""
    push: bool
    image: Step[Images, None]
    """As it is published."""
    trial: Step[Trial, None]

    def run(self, have: Results, tools: Tools) -> StageResult[Images]:
        """Return it; raises what `bake` does."""
        name = f"{reference(self.file.recipe, self.target)}-{self.kind}"
        if self.adapter is None:
            prepare, results = partial(self._made_of, have, tools), tuple[Result, ...]()
        else:
            results = of_adapter(have[self.trial].results, self.adapter, self.file.recipe)
            prepare = partial(self._adapter_of, have, self.adapter)
        return unrecorded(bake(prepare, name, tools, push=self.push, results=results).value)

    def _adapter_of(self, have: Results, number: int) -> ImageInputs:
        """Return an adapter's inputs: it was tested beside the base, or merged into it alone."""
        made, trial = have[self.image], have[self.trial]
        image = made[0].inputs
        if image.sources is None or image.recipe is None:
            raise AssertionError("an image built from a recipe has sources")
        base, adapter = image.sources.base, image.sources.adapters[number]
        weights = image.base_weights or Artifact(format=SAFETENSORS, tree=base.tree)
        recipe = recipe_of_adapter(image.recipe, number)
        own, dropped = f"{PREFIX}adapter.{number}.", ("adapter.", "merge.", "quality", "plan")
        left_out = tuple(f"{PREFIX}{name}" for name in dropped)
        labels = {k: v for k, v in image.labels.items() if not k.startswith(left_out)}
        labels |= {
            k.replace(own, f"{PREFIX}adapter.0."): v
            for k, v in image.labels.items()
            if k.startswith(own)
        }
        tested = {TESTED: index_of_materials(made).digest} if trial.started else {}
        return replace(
            image,
            kind=ADAPTER,
            config=None,
            artifact=Artifact(format=LORA, tree=adapter.snapshot.tree),
            base_weights=weights,
            quantizer_builder=image.quantizer_builder if image.base_weights else "",
            sources=Sources(base=base, adapters=(adapter,)),
            changed=frozenset(),
            apart=frozenset(),
            checkpoint=Checkpoint(tree=base.tree),
            recipe=recipe,
            bases=(),
            platforms=(),
            base_name="",
            labels={
                **labels,
                PREFIX + "kind": ADAPTER,
                PREFIX + "format": LORA.name,
                PREFIX + "base.format": weights.format.name,
                VERDICT: verdict_of(of_adapter(trial.results, number, image.recipe)),
                **tested,
            },
            parameters={
                "target": self.target,
                "recipe": public_recipe(recipe),
                "kind": ADAPTER,
            },
        )

    def _made_of(self, have: Results, tools: Tools) -> ImageInputs:
        """Return the image's inputs for this kind, which is not started itself.

        So its labels name the image that was, with that one's scores.
        """
        made, trial = have[self.image], have[self.trial]
        image, base_name = made[0].inputs, data_base(self.kind, "")
        labels = {key: text for key, text in image.labels.items() if key != PLAN}
        tested = {TESTED: index_of_materials(made).digest} if trial.started else {}
        platforms = self.file.recipe.image.platforms
        return replace(
            image,
            kind=self.kind,
            config=None,
            layers_below=max((len(base.layers) for base in image.bases), default=0),
            context=image.config.plan.max_model_len if image.config else 0,
            bases=base_images(base_name, "", tools, platforms=platforms) if base_name else (),
            platforms=platforms,
            base_name=public_base(base_name),
            labels={
                **labels,
                PREFIX + "kind": self.kind,
                **result_labels(trial.results),
                **tested,
                VERDICT: verdict_of(trial.results),
            },
            parameters={**image.parameters, "kind": self.kind},
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class ThinStep(FormStep):
    """Assembles an image that merges where it starts: base and adapters instead of weights.

    What it merges has the digests of the image that was tested, so that one's scores are its own.
    """

    sources: Step[Sources, Sources]
    weights: Step[Artifact, ForeseenWeights]
    """As they were made, without what lies beside them."""
    config: Step[ServingConfig, None]
    """For the folder that it merges into."""

    def foresee(self, seen: Foresight) -> Foreseen[None]:
        """Return nothing; refuses a merge that another machine may do otherwise."""
        sources = seen[self.sources]
        if self.file.recipe.outputs.mount_base:
            mounted_base(sources.base, seen.tools.registry)
        if not isinstance(sources.base.tree, ForeseenTree):
            plan_thin(seen.tools.merges, sources, self.file.recipe.merge)
        return Foreseen(value=None)

    def _made_of(self, have: Results, tools: Tools) -> ImageInputs:
        made, sources = super()._made_of(have, tools), have[self.sources]
        image, recipe = have[self.image][0].inputs, self.file.recipe
        mount = recipe.outputs.mount_base
        parts = thin_parts(
            sources,
            recipe.merge,
            have[self.weights],
            image.artifact,
            *(((), sources.base.digest) if mount else self._base(image, sources, tools.store)),
            image.engine,
            [base.platform for base in image.bases],
            tools,
            mounted=mounted_base(sources.base, tools.registry) if mount else "",
        )
        config = have[self.config]
        manifest = json.dumps(plain(parts.model), indent=2) + "\n"
        return replace(
            made,
            thin=parts,
            bases=image.bases,
            base_name=image.base_name,
            config=replace(config, image_files={**config.image_files, MANIFEST: manifest}),
            labels={**made.labels, PLAN: plan_label(grown(config.plan, parts.model.size))},
        )

    def _base(
        self, image: ImageInputs, sources: Sources, store: Store
    ) -> tuple[tuple[TarLayer, ...], Digest]:
        """Return the base's layers as an image of the base alone has them, and their files'."""
        tree = sources.base.tree
        plain = replace(image, artifact=Artifact(format=SAFETENSORS, tree=tree), sources=None)
        below = max((len(base.layers) for base in image.bases), default=0)
        split = _cut(plain, store.memo)
        return _weights(plain, split, below, store.memo), split.tree.digest
