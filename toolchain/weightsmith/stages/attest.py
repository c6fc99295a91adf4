"""What an image was made of -> the evidence beside it: statements, bills, answers, adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from weightsmith.checkpoints.gguf_config import gguf_config
from weightsmith.errors import WeightsmithError
from weightsmith.foreign import read_json
from weightsmith.oci.attachments import Part
from weightsmith.oci.image import Image
from weightsmith.oci.manifests import TITLE
from weightsmith.provenance import statements
from weightsmith.provenance.evaluation import evaluation, test_result
from weightsmith.provenance.evidence import (
    ADAPTER_TYPE,
    EVALUATION_TYPE,
    NUMBER,
    Document,
    Evidence,
    document_digest,
    document_name,
)
from weightsmith.provenance.labels import public_name, without_secrets
from weightsmith.provenance.mlbom import (
    MEDIA_TYPE,
    Ancestor,
    ModelFacts,
    engine_bom,
    license_of,
    ml_bom,
)
from weightsmith.provenance.statements import Resource, file_resources, provenance, tree_resource
from weightsmith.recipe import Recipe
from weightsmith.resources import builder_pins, engine_source
from weightsmith.values import (
    Artifact,
    Checkpoint,
    Digest,
    Json,
    Score,
    Sources,
    canonical,
    plain,
    without_passwords,
)

OWN_ENGINE = "engine:"
ENGINE_BILL, MODEL_BILL = "engine.cdx.json", "model.cdx.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageMaterials:
    """An image and what it was made of; sources are known only where it was built, not baked."""

    image: Image
    artifact: Artifact
    """As quantized, or as merged."""
    served: Artifact
    """As it lies in the image: large files may be cut."""
    base: Image | None
    base_name: str
    name: str
    version: str
    parameters: Mapping[str, Json]
    sources: Sources | None = None
    checkpoint: Checkpoint | None = None
    recipe: Recipe | None = None
    quantizer_builder: str = ""
    scores: Mapping[str, Score] = field(default_factory=dict)
    network_in_jobs: bool = False
    """A job that made any of it had the machine's network, because the user allowed it."""
    base_bills: Sequence[Document] = ()
    """Bills of materials that the base's own makers attached to it."""


def evidence(made: ImageMaterials) -> Evidence:
    """Return the statements and documents of an image; the same image has the same."""
    documents = (*_bills(made), *_evaluation(made), *_adapters(made))
    told = [*_merged(made), *_quantized(made), *_split(made), _baked(made, documents)]
    if made.recipe and made.recipe.evaluate and "image" in made.scores:
        wanted = made.recipe.evaluate
        told.append(
            statements.statement(
                [statements.image_resource(made.image.manifest_blob)],
                statements.TEST_RESULT,
                test_result(made.scores, wanted.max_drop, wanted.min_score),
            )
        )
    return Evidence(statements=tuple(told), documents=documents)


def public_recipe(recipe: Recipe) -> Mapping[str, Json]:
    """Return a recipe without paths, secrets and push targets, and without what is default."""
    told = dict(recipe.model_dump(mode="json", exclude_defaults=True, by_alias=True))
    told["base"] = {**told["base"], "source": public_name(recipe.base.source)}
    told["adapters"] = [
        {**row, "source": public_name(str(row["source"]))} for row in told.get("adapters", ())
    ]
    told.pop("image", None)
    named: Mapping[str, Json] = _without_folders(without_secrets(told))
    return named


def _without_folders(value: Json, key: str = "") -> Json:
    """Return a recipe's part with the names of its files, without the paths to them."""
    if isinstance(value, dict):
        return {k: _without_folders(inner, k) for k, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner, key) for inner in value]
    files = ("data", "training", "probes", "imatrix")
    return public_name(value) if key in files and isinstance(value, str) and value else value


def _merged(made: ImageMaterials) -> list[Mapping[str, Json]]:
    sources, checkpoint, recipe = made.sources, made.checkpoint, made.recipe
    if sources is None or checkpoint is None or recipe is None or not sources.adapters:
        return []
    parameters = {
        **recipe.merge.model_dump(mode="json"),
        "weights": [adapter.weight for adapter in sources.adapters],
    }
    return [
        provenance(
            "merge",
            file_resources(checkpoint.tree),
            parameters=parameters,
            dependencies=_source_resources(sources),
            builder=_builder("merge", checkpoint.details),
        )
    ]


def _builder(name: str, details: Mapping[str, Json]) -> list[Resource]:
    """Return the pins that a builder is made of, and the image that the job ran in, if it did."""
    found = [Resource(name=f"builder:{name}", digest=builder_pins(name))]
    if image := details.get("builder_image"):
        found.append(Resource(name=f"builder image:{name}", digest=Digest(str(image))))
    return found


def _source_resources(sources: Sources) -> list[Resource]:
    base = tree_resource("base", sources.base.digest, sources.base.pin)
    adapters = [
        tree_resource(f"adapter:{n}", adapter.snapshot.digest, adapter.snapshot.pin)
        for n, adapter in enumerate(sources.adapters)
    ]
    return [base, *adapters]


def _quantized(made: ImageMaterials) -> list[Mapping[str, Json]]:
    checkpoint = made.checkpoint
    if checkpoint is None or made.artifact.digest == checkpoint.digest:
        return []
    details = {k: v for k, v in made.artifact.details.items() if k in ("options", "calibration")}
    name = made.quantizer_builder
    return [
        provenance(
            "quantize",
            file_resources(made.artifact.tree),
            parameters={"format": made.artifact.format.name, **plain(details)},
            dependencies=[tree_resource("checkpoint", checkpoint.digest), *_calibration(made)],
            builder=_builder(name, made.artifact.details) if name else [],
        )
    ]


def _split(made: ImageMaterials) -> list[Mapping[str, Json]]:
    if made.served.digest == made.artifact.digest:
        return []
    return [
        provenance(
            "split",
            file_resources(made.served.tree),
            parameters={},
            dependencies=[tree_resource("artifact", made.artifact.digest)],
        )
    ]


def _calibration(made: ImageMaterials) -> list[Resource]:
    found = made.artifact.details.get("calibration")
    digest = found.get("digest") if isinstance(found, dict) else None
    return [tree_resource("calibration", digest)] if digest else []


def _baked(made: ImageMaterials, documents: Sequence[Document]) -> Mapping[str, Json]:
    base = [Resource(name="base image", digest=made.base.digest, uri=made.base_name)] if (
        made.base
    ) else []  # fmt: skip
    files = [
        Resource(name=f"file:{resource.name}", digest=resource.digest)
        for resource in file_resources(made.served.tree)
    ]
    return provenance(
        "bake",
        [statements.image_resource(made.image.manifest_blob),
         *statements.layer_resources(made.image)],
        parameters={
            **made.parameters,
            **({"network_in_jobs": True} if made.network_in_jobs else {}),
        },
        dependencies=[tree_resource("artifact", made.served.digest), *base, *files],
        byproducts=[
            Resource(
                name=document_name(document),
                digest=document_digest(document),
                media_type=document.artifact_type,
            )
            for document in documents
        ],
    )  # fmt: skip


def _bills(made: ImageMaterials) -> list[Document]:
    bill = ml_bom(_facts(made))
    below = base_documents(made.base, made.base_name, made.base_bills)
    return [_document(MEDIA_TYPE, MODEL_BILL, bill), *below]


def base_documents(
    base: Image | None, name: str, bills: Sequence[Document]
) -> tuple[Document, ...]:
    """Return the bills of materials of what is below the weights."""
    if base is None or not name.startswith(OWN_ENGINE):
        return tuple(bills)
    engine = name.removeprefix(OWN_ENGINE)
    bill = engine_bom(engine, engine_source(engine), base.digest)
    return (*bills, _document(MEDIA_TYPE, ENGINE_BILL, bill))


def _facts(made: ImageMaterials) -> ModelFacts:
    card = {"card": made.recipe.card} if made.recipe else {}
    return ModelFacts(
        name=made.name,
        version=made.version,
        digest=made.served.digest,
        files=made.served.tree.files,
        format=made.artifact.format.name,
        config=_config(made),
        ancestors=_ancestors(made),
        scores=made.scores,
        **card,
    )


def _config(made: ImageMaterials) -> Mapping[str, Json]:
    """Return the model's configuration, from where there is one; {} where it cannot be read."""
    tree = made.checkpoint.tree if made.checkpoint else made.artifact.tree
    try:
        if tree.has("config.json"):
            return read_json(tree.path("config.json"))
        names = [file.path for file in tree.files if file.path.endswith(".gguf")]
        return gguf_config(tree.path(names[0])) if names else {}
    except (OSError, ValueError, WeightsmithError):
        return {}


def _ancestors(made: ImageMaterials) -> list[Ancestor]:
    if made.sources is None:
        return []
    base = made.sources.base
    found = [
        Ancestor(
            name=public_name(base.source),
            pin=base.pin,
            digest=base.digest,
            license=license_of(base.tree.root),
            description="base model",
        )
    ]
    for adapter in made.sources.adapters:
        snapshot = adapter.snapshot
        found.append(
            Ancestor(
                name=public_name(snapshot.source),
                pin=snapshot.pin,
                digest=snapshot.digest,
                license=license_of(snapshot.tree.root),
                version=adapter.version,
                description="adapter",
            )
        )
    return found


def _evaluation(made: ImageMaterials) -> list[Document]:
    if not made.scores:
        return []
    return [_document(EVALUATION_TYPE, "evaluation.json", evaluation(made.scores))]


def _adapters(made: ImageMaterials) -> list[Document]:
    adapters = made.sources.adapters if made.sources else ()
    return [
        Document(
            artifact_type=ADAPTER_TYPE,
            parts=tuple(
                Part.of_file(a.snapshot.tree.path(file.path), file.path, file.digest)
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
        for number, a in enumerate(adapters)
    ]


def _document(artifact_type: str, title: str, content: Json) -> Document:
    part = Part.of_bytes(canonical(content), artifact_type)
    titled = Part(blob=part.blob, open=part.open, annotations={TITLE: title})
    return Document(artifact_type=artifact_type, parts=(titled,), annotations={TITLE: title})
