"""What the images of a model are made of, and the evidence of it.

That is statements, bills of materials, answers and adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

from weightsmith.core.errors import CacheLost, WeightsmithError
from weightsmith.core.resources import builder_pins
from weightsmith.core.thin import ThinModel
from weightsmith.core.values import (
    Artifact,
    Blob,
    Checkpoint,
    Digest,
    FileEntry,
    JsonValue,
    Scores,
    Sources,
    Tree,
    plain,
    tree_digest,
    without_passwords,
)
from weightsmith.evaluating.pictures import FOLDER, Picture
from weightsmith.evaluating.replay import REPLAY, ReplaySet
from weightsmith.evaluating.results import Result, main_scores, named, unproven_of, verdicts_of
from weightsmith.models.facts import ModelFacts, read_facts
from weightsmith.models.gguf_config import gguf_models
from weightsmith.models.reshard import Resharded
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.oci.image import Image, ImageOrIndex, Order, index_of
from weightsmith.oci.layers import TITLE, Member, TarLayer
from weightsmith.provenance import statements
from weightsmith.provenance.bills import (
    MEDIA_TYPE,
    MODEL_BILL,
    SPDX_BILL,
    Ancestor,
    BilledModel,
    license_of,
    ml_bom,
)
from weightsmith.provenance.evidence import (
    ADAPTER_TYPE,
    DRAFTED,
    EVALUATION_TYPE,
    NUMBER,
    SPDX_TYPE,
    UNMERGED,
    Evidence,
    resource_of,
    titled,
)
from weightsmith.provenance.labels import public_name, without_secrets
from weightsmith.provenance.spdx import spdx_document
from weightsmith.provenance.statements import (
    BASE_FILES,
    CONTENTS,
    MOUNTED,
    Resource,
    Statement,
    file_resources,
    provenance,
    tree_resource,
)
from weightsmith.recipe.schema import Card, Recipe
from weightsmith.serving.engine import Engine
from weightsmith.serving.plan import ServingConfig

_LARGEST_CORPORA = 16 << 20
"""Characters of the documents that are attached with an evaluation."""
_NO_DATE = "1970-01-01T00:00:00Z"
"""Of an artifact without one, whose digest depends on none."""
_ASKED = ("messages", "pictures", "choices", "tolerance", "tools", "parts", "grades", "is_set")
"""What a record keeps of a question beside its text and what is expected."""
_MOST_PICTURES = 256 << 20
"""Bytes of a build's pictures that are attached to its image; of more, none are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinParts:
    """What a thin image has instead of merged weights."""

    model: ThinModel
    weights: tuple[TarLayer, ...]
    """The base's layers, as in an image of the base alone, and a layer of what is its own."""
    program: Mapping[str, TarLayer]
    """Platform -> our modules and kernels."""
    base_files: Digest
    """Of the base's files as they lie in the image: large ones may be split."""
    entrypoint: tuple[str, ...]
    """What comes before the engine's."""

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """The files in the layers of weights, as `verify` names them."""
        return tuple(
            FileEntry(path=one.path.removeprefix("models/"), size=one.size, digest=one.digest)
            for layer in self.weights
            for one in layer.members
            if one.digest
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayFile:
    """What an image has of its replay set."""

    made: ReplaySet
    secret: bool

    @property
    def layer(self) -> TarLayer:
        """The layer with the set, or with its digests."""
        data = self.made.digests if self.secret else self.made.data
        return TarLayer(members=(Member.of_bytes(REPLAY.lstrip("/"), data),))


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInputs:
    """A model, the process that serves it, and the base for each platform.

    Sources, checkpoint and recipe are known only in `build`, not in `bake`.
    """

    name: str
    version: str
    artifact: Artifact
    """As quantized, as merged, or a base and adapters that were not."""
    base_weights: Artifact | None = None
    """Of adapters that were not merged, the base that they lie beside."""
    engine: Engine
    config: ServingConfig | None
    """None for an image that only holds weights, for other containers to mount."""
    bases: tuple[Image, ...]
    """One per platform; () for an image from scratch."""
    undrafted: Artifact | None = None
    """The artifact without what drafts for it; None if nothing does."""
    platforms: tuple[str, ...] = ()
    """The platforms of an image from scratch; () for `DEFAULT_PLATFORM` alone."""
    base_name: str
    """The base's name in the image's labels; "" for a folder on this machine."""
    kind: str = "image"
    """One of `recipe.KINDS`."""
    labels: Mapping[str, str]
    """All labels that do not follow from the other inputs."""
    order: Order = "engine-first"
    largest_layer: int | None = 0
    """Bytes. 0: files stay as they are. None: by the model's size."""
    layers_below: int = 0
    """Layers of the base of the image whose layers this kind shares."""
    context: int = 0
    """Tokens that a runner should make room for; 0 for its own default."""
    parameters: Mapping[str, JsonValue]
    """What the user asked for, as the image's statement records it."""
    licensed: Tree | None = None
    """The model's folder, if the artifact lacks its licence files."""
    sources: Sources | None = None
    changed: frozenset[str] = frozenset()
    """Tensors of the merged checkpoint that depend on the adapters; none if nothing is merged."""
    apart: frozenset[str] = frozenset()
    """Tensors of the merged checkpoint that other images of its base do not have."""
    checkpoint: Checkpoint | None = None
    recipe: Recipe | None = None
    thin: ThinParts | None = None
    """Of an image that merges where it starts; its artifact is what it merges."""
    replay: ReplayFile | None = None
    """What it answered when it was tested; None before."""
    healthcheck: Mapping[str, TarLayer] = field(default_factory=dict)
    """Platform -> the layer of the program that asks the replay set; {} for none."""
    weights: bytes = b""
    """The list of files of weights that this program looks at; empty for none."""
    quantizer_builder: str = ""
    network_in_jobs: bool = False
    """Whether a job that made any of it had network access, because the user allowed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMaterials:
    """One platform's image and its materials."""

    inputs: ImageInputs
    split: Resharded
    """The artifact's files in the image, where safetensors files are cut by kind of matrix."""
    base: Image | None
    image: Image
    results: tuple[Result, ...] = ()
    """What the started image was tested with; () before it was."""
    stand_in: str = ""
    """Platform of the image that was started in place of this one; "" if there is none such."""

    @property
    def unproven(self) -> tuple[str, ...]:
        """Why its having passed shows nothing; () if it was started and shows something."""
        missing = f"it was not started: the image for {self.stand_in} was, with the same weights"
        return (*([missing] if self.stand_in else []), *unproven_of(self.results))

    @property
    def scores(self) -> Scores:
        """The scores of the first task."""
        return main_scores(self.results)

    @property
    def served(self) -> Artifact:
        """The artifact with the files that are in the image."""
        return replace(self.inputs.artifact, tree=self.split.tree)


def evidence(made: ImageMaterials, base_documents: Sequence[Attachment]) -> Evidence:
    """Return an image's statements and documents; equal images have equal evidence.

    `base_documents` are the bills of materials of the base.
    """
    billed = _billed(made)
    form = made.inputs.recipe.image.sbom if made.inputs.recipe else "cyclonedx"
    bill = ml_bom(billed, "1.7" if form == "cyclonedx-1.7" else "1.6")
    documents = [titled(MEDIA_TYPE, MODEL_BILL, bill), *base_documents]
    if form == "spdx":
        created = str(made.image.settings.get("created") or _NO_DATE)
        documents.append(titled(SPDX_TYPE, SPDX_BILL, spdx_document(billed, created)))
    if made.results:
        document = titled(EVALUATION_TYPE, "evaluation.json", evaluation(made.results))
        parts = (*document.parts, *_pictures(made.results))
        documents.append(replace(document, parts=parts))
    documents += _adapters(made.inputs.sources)
    found = [*_made(made), _baked(made, documents)]
    if any("image" in one.scores for one in made.results):
        found.append(
            statements.statement(
                [statements.image_resource(made.image.manifest_blob)],
                statements.TEST_RESULT,
                test_result(made.results, made.unproven),
            )
        )
    return Evidence(statements=tuple(found), documents=tuple(documents))


def _pictures(results: Sequence[Result]) -> list[AttachmentPart]:
    """Return the questions' pictures, each once; none if they are too large together."""
    found = {one.seen.file: one for result in results for one in result.task.task.pictures}
    if sum(one.size for one in found.values()) > _MOST_PICTURES:
        return []
    return [
        AttachmentPart(
            blob=Blob(digest=one.digest, size=one.size, media_type=f"image/{one.kind}"),
            open=partial(_bytes_of, one),
            annotations={TITLE: f"{FOLDER}/{name}"},
        )
        for name, one in sorted(found.items())
    ]


def _bytes_of(picture: Picture) -> Iterator[bytes]:
    yield picture.read()


def public_recipe(recipe: Recipe) -> Mapping[str, JsonValue]:
    """Return a recipe without paths, secrets, push targets and default values."""
    found = dict(recipe.model_dump(mode="json", exclude_defaults=True, by_alias=True))
    found.setdefault("adapters", [])
    for places in ("image", "outputs"):
        found.pop(places, None)
    return {key: _without_folders(inner, key) for key, inner in without_secrets(found).items()}


def _without_folders(value: JsonValue, key: str = "") -> JsonValue:
    if isinstance(value, dict):
        return {k: _without_folders(inner, k) for k, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner, key) for inner in value]
    files = ("source", "data", "training", "corpus", "probes", "imatrix", "mix")
    return public_name(value) if key in files and isinstance(value, str) and value else value


def _made(made: ImageMaterials) -> Iterator[Statement]:
    inputs, artifact = made.inputs, made.inputs.artifact
    sources, checkpoint, recipe = inputs.sources, inputs.checkpoint, inputs.recipe
    alone = inputs.undrafted or artifact
    unmerged, weights = inputs.base_weights is not None, inputs.base_weights or alone
    if sources and checkpoint and recipe and sources.adapters and not unmerged:
        factors = [adapter.weight for adapter in sources.adapters]
        yield provenance(
            "merge",
            file_resources(checkpoint.tree),
            parameters={**asdict(recipe.merge), "weights": factors},
            dependencies=_pinned(sources),
            builder=_builder("merge", checkpoint.details),
        )
    if checkpoint and weights.digest != checkpoint.digest:
        details = {k: v for k, v in weights.details.items() if k in ("options", "calibration")}
        needed = [tree_resource("checkpoint", checkpoint.digest)]
        calibration = weights.details.get("calibration")
        if isinstance(calibration, dict) and (digest := calibration.get("digest")):
            needed.append(tree_resource("calibration", digest))
        name = inputs.quantizer_builder
        yield provenance(
            "quantize",
            file_resources(weights.tree),
            parameters={"format": weights.format.name, **plain(details)},
            dependencies=needed,
            builder=_builder(name, weights.details) if name else [],
        )
    if sources and unmerged:
        converted = weights.format.suffix == ".gguf"
        yield provenance(
            UNMERGED,
            file_resources(artifact.tree),
            parameters={"format": artifact.format.name},
            dependencies=[tree_resource("weights", weights.digest), *_pinned(sources)],
            builder=_builder("gguf", {}) if converted else [],
        )
    if sources and sources.draft and inputs.undrafted:
        draft = sources.draft
        yield provenance(
            DRAFTED,
            file_resources(artifact.tree),
            parameters={},
            dependencies=[
                tree_resource("model", alone.digest),
                tree_resource("draft", draft.digest, draft.pin),
            ],
        )
    if made.served.digest != artifact.digest:
        yield provenance(
            "split",
            file_resources(made.served.tree),
            parameters={},
            dependencies=[tree_resource("artifact", artifact.digest)],
        )


def _pinned(sources: Sources) -> list[Resource]:
    """Return the base, as `base`, and its adapters, as `adapter:0` and so on."""
    adapters = enumerate(one.snapshot for one in sources.adapters)
    return [
        tree_resource("base", sources.base.digest, sources.base.pin),
        *(tree_resource(f"adapter:{n}", one.digest, one.pin) for n, one in adapters),
    ]


def _builder(name: str, details: Mapping[str, JsonValue]) -> list[Resource]:
    """Return a builder's pins, and the image that the job ran in, if any."""
    found = [Resource(name=f"builder:{name}", digest=builder_pins(name))]
    if image := details.get("builder_image"):
        found.append(Resource(name=f"builder image:{name}", digest=Digest(str(image))))
    return found


def _baked(made: ImageMaterials, documents: Sequence[Attachment]) -> Statement:
    needed = [tree_resource("artifact", made.served.digest)]
    inside = made.served.tree.files
    if (thin := made.inputs.thin) and made.inputs.sources:
        inside = thin.files
        needed.append(tree_resource(CONTENTS, tree_digest(inside)))
        if at := thin.model.mounted:
            digest = Digest(at.partition("@")[2])
            needed.append(Resource(name=MOUNTED, digest=digest, uri=at))
        else:
            needed.append(tree_resource(BASE_FILES, thin.base_files))
    if made.base:
        needed.append(
            Resource(name="base image", digest=made.base.digest, uri=made.inputs.base_name)
        )
    needed += (Resource(name=f"file:{file.path}", digest=file.digest) for file in inside)
    image = statements.image_resource(made.image.manifest_blob)
    network = {"network_in_jobs": True} if made.inputs.network_in_jobs else {}
    return provenance(
        "bake",
        [image, *statements.layer_resources(made.image)],
        parameters={**made.inputs.parameters, **network},
        dependencies=needed,
        byproducts=[*map(resource_of, documents)],
    )


def _billed(made: ImageMaterials) -> BilledModel:
    inputs, sources = made.inputs, made.inputs.sources
    facts = facts_of((inputs.checkpoint or inputs.artifact).tree)
    ancestors = [(sources.base, "base model", "")] if sources else []
    if sources:
        ancestors += [(one.snapshot, "adapter", one.version) for one in sources.adapters]
        ancestors += [(sources.draft, "draft model", "")] if sources.draft else []
    return BilledModel(
        name=inputs.name,
        version=inputs.version,
        digest=made.served.digest,
        files=made.served.tree.files,
        format=inputs.artifact.format.name,
        model_type=facts.model_type if facts else "",
        architecture=facts.architecture if facts else "",
        license=license_name(inputs, made.split.tree),
        ancestors=[
            Ancestor(
                name=public_name(snapshot.source),
                pin=snapshot.pin,
                digest=snapshot.digest,
                license=license_of(snapshot.tree.texts),
                version=version,
                description=what,
            )
            for snapshot, what, version in ancestors
        ],
        scores=made.scores,
        card=inputs.recipe.card if inputs.recipe else Card(),
    )


def _adapters(sources: Sources | None) -> list[Attachment]:
    return [
        Attachment(
            artifact_type=ADAPTER_TYPE,
            parts=tuple(
                AttachmentPart.of_file(a.snapshot.tree.path(file.path), file.path, file.digest)
                for file in a.snapshot.tree.files
            ),
            annotations={
                key: value
                for key, value in {
                    TITLE: public_name(a.snapshot.source),
                    "org.opencontainers.image.version": a.version,
                    "dev.weightsmith.run_id": without_passwords(a.run_id),
                    NUMBER: str(number),
                }.items()
                if value
            },
        )
        for number, a in enumerate(sources.adapters if sources else ())
    ]


def side_by_side(scores: Scores) -> list[dict[str, JsonValue]]:
    """Return the questions with the answers of every subject."""
    names = [name for name in scores if scores[name].per_item]
    if len({len(scores[name].per_item) for name in names}) > 1:  # a command's own choice of rows
        names = names[-1:]
    rows = zip(*(scores[name].per_item for name in names), strict=True)
    return [
        {
            "prompt": row[0]["prompt"],
            **{key: row[0][key] for key in _ASKED if key in row[0]},
            "expected": row[0]["expected"],
            **{name: answer["answer"] for name, answer in zip(names, row, strict=True)},
            "ok": {name: answer["ok"] for name, answer in zip(names, row, strict=True)},
            **{
                key: {n: a[key] for n, a in zip(names, row, strict=True) if key in a}
                for key in ("raw", "parser", "error", "unjudged", "value")
                if any(key in answer for answer in row)
            },
        }
        for row in rows
    ]


def items_of(results: Sequence[Result]) -> list[dict[str, JsonValue]]:
    """Return all questions of a build's suites, each with its suite's name, if that has one."""
    return [
        {**({"suite": name} if name else {}), **row}
        for one in results
        for name in [one.task.task.name]
        for row in side_by_side(one.scores)
    ]


def evaluation(results: Sequence[Result]) -> dict[str, JsonValue]:
    """Return the whole evaluation: the suites' scores, questions and answers."""
    return {
        "schema": 1,
        "scores": _scores(results[0].scores),
        "suites": [
            {"name": one.task.task.name, "verdict": verdict, "scores": _scores(one.scores)}
            for one, verdict in zip(results, verdicts_of(results), strict=True)
        ],
        "items": items_of(results),
        **({"corpora": corpora} if (corpora := _corpora(results)) else {}),
    }


def _corpora(results: Sequence[Result]) -> dict[str, JsonValue]:
    """Return the documents of each suite that has any, unless they are too many to attach."""
    found = {one.task.task.name: one.task.task.corpus for one in results}
    size = sum(len(text) for corpus in found.values() for _, text in corpus)
    if size > _LARGEST_CORPORA:
        return {}
    return {name: [{"id": k, "text": t} for k, t in rows] for name, rows in found.items() if rows}


def _scores(scores: Scores) -> dict[str, JsonValue]:
    return {who: {"score": s.score, "n": s.n, "metric": s.metric} for who, s in scores.items()}


def test_result(results: Sequence[Result], unproven: Sequence[str]) -> dict[str, JsonValue]:
    """Return in-toto's test result predicate: a published image has passed, perhaps with doubts.

    https://github.com/in-toto/attestation/blob/main/spec/predicates/test-result.md
    """
    passed = []
    for one in results:
        scores, rule = sorted(one.scores.items()), one.task.rule
        rows = [f"{who}: {s.score:.4f} {s.metric}, n={s.n}" for who, s in scores]
        rows += [f"max_drop={rule.max_drop:g}"] if rule.against else []
        rows += ["against=base"] if rule.against == "base" else []
        passed += [named(one.task, row) for row in (*rows, f"min_score={rule.min_score:g}")]
    return {
        "result": "WARNED" if unproven else "PASSED",
        "configuration": [],
        "passedTests": passed,
        **({"warnedTests": [f"not proven: {reason}" for reason in unproven]} if unproven else {}),
        "failedTests": [],
    }


def facts_of(tree: Tree) -> ModelFacts | None:
    """Return what a model is, by its folder or GGUF file; None if it cannot be read."""
    try:
        if tree.has("config.json"):
            return read_facts(tree.texts)
        names = gguf_models(file.path for file in tree.files)
        return read_facts(tree.header(names[0])) if names else None
    except CacheLost:
        raise  # the model could be read elsewhere
    except (OSError, ValueError, WeightsmithError):
        return None


def license_name(inputs: ImageInputs, tree: Tree) -> str:
    """Return the licence: by the recipe, else by the card of the model or of its base.

    An adapter's licence is the adapter's alone, and an engine's the engine's.
    """
    said = (inputs.recipe.card.license or inputs.recipe.base.license) if inputs.recipe else ""
    trees = (tree, *((inputs.sources.base.tree,) if inputs.sources else ()))
    return said or next(filter(None, (license_of(one.texts) for one in trees)), "")


def index_of_materials(made: Sequence[ImageMaterials]) -> ImageOrIndex:
    """Return the image of one platform, or the index of several."""
    return index_of([one.image for one in made])
