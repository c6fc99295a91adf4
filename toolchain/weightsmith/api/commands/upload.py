"""`push --to hf://OWNER/NAME`: publish a model's files with a card on a hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from errno import EEXIST, EISDIR, ENAMETOOLONG, ENOTDIR
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from weightsmith.api.commands.requests import PushCommand, Said
from weightsmith.building.targets import all_formats
from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.core.escape import joined
from weightsmith.core.safe_parse import SMALL
from weightsmith.core.trees import below
from weightsmith.core.values import FileEntry, StageInputs, Tree, Uploaded
from weightsmith.evaluating.build_record import FILE, BuildRecord, read_build
from weightsmith.evaluating.card import ModelCard, card_of_build, card_of_labels
from weightsmith.evaluating.pages import model_card, read_as_facts
from weightsmith.evaluating.public_record import public_record, record_of_card
from weightsmith.models.folder import check_model_folder, check_no_code, pickles_in, scan
from weightsmith.models.gguf_config import files_with, model_name
from weightsmith.oci.image import Image
from weightsmith.oci.layers import Layer
from weightsmith.oci.layout import held_digest, is_layout
from weightsmith.oci.registry import open_location
from weightsmith.oci.streams import as_tar
from weightsmith.oci.unpack import unpack
from weightsmith.provenance.bills import MEDIA_TYPE, license_in, license_of
from weightsmith.provenance.evidence import read_attached
from weightsmith.provenance.labels import ARTIFACT, PREFIX, VERDICT, plan_in, weights_of
from weightsmith.provenance.model_signing import model_signer
from weightsmith.quantizers import of_format
from weightsmith.serving.memory import human
from weightsmith.stages import cache_scales
from weightsmith.stages import merge as merging
from weightsmith.stages.upload import (
    CARD,
    About,
    HubDestination,
    changes,
    repository_of,
    texts_of,
    upload,
)
from weightsmith.steps.step import WEIGHTS
from weightsmith.steps.tools import Tools

_Model: TypeAlias = tuple[Tree, ModelCard, BuildRecord | None]
"""A model's files and what is known of it, with the record for everybody."""


def hub_destination(asked: PushCommand) -> HubDestination | None:
    """Return the repository that `hf://OWNER/NAME` names, or None for a registry's reference.

    Raises UsageError for an option that belongs to the other.
    """
    if asked.to.startswith("hf://"):
        if asked.run.signature_format != "cosign":
            raise UsageError("--signature-format is only for images", hint="leave it out")
        name = repository_of(asked.to)
        return HubDestination(repository=name, force=asked.force, public=asked.public)
    if asked.public:
        raise UsageError("--public is only for a new repository on a hub", hint="leave it out")
    return None


def push_to_hub(source: str, destination: HubDestination, tools: Tools) -> Uploaded:
    """Publish a checkpoint folder, a GGUF file, a build's results or an image's model on a hub.

    Raises InputRefused for a model that is incomplete, has pickle files, custom code or links
    out of its folder, and what `upload` raises.
    """
    with _opened(source, destination, tools) as (tree, version, about):
        return upload(tree, about, destination, version, tools).value


def preview_push(source: str, destination: HubDestination, tools: Tools) -> Said:
    """Return what `push_to_hub` would publish: nothing is created or changed.

    These are the repository's files as they would be, those that would go, and the card.
    """
    with _opened(source, destination, tools) as (tree, _, about):
        texts = texts_of(tree, about, destination, tools.signer)
        wanted = changes(tree, texts, destination, tools.hub)
    sizes = {entry.path: entry.size for entry in tree.files}
    sizes |= {name: len(data) for name, data in texts.items()}
    sent, exists = sum(wanted.sizes.values()), wanted.held is not None
    kind = "public" if destination.public else "private"
    there = "exists" if exists else f"would be a new {kind} repository"
    lines, files = [f"{destination.reference} {there}; nothing was changed"], []
    for path, size in sorted(sizes.items()):
        is_sent = path in wanted.sent
        files.append({"path": path, "size": size, "sent": is_sent})
        lines.append(f"  {'send' if is_sent else 'there':<7} {path}  {human(size)}")
    lines += [f"  {'delete':<7} {path}" for path in wanted.deleted]
    lines += [f"{human(sent)} would be sent, with this {CARD}:", *about.card.splitlines()]
    return {
        "reference": destination.reference,
        "dry_run": True,
        "exists": exists,
        "public": None if exists else destination.public,
        "files": files,
        "deleted": wanted.deleted,
        "uploaded_bytes": sent,
        "card": about.card,
    }, joined(lines)


@contextmanager
def _opened(
    source: str, destination: HubDestination, tools: Tools
) -> Iterator[tuple[Tree, str, About]]:
    """Open a model: its files, its version, and what is said of it."""
    model_signer(tools.signer)
    tools.hub.check(destination.repository)
    with tools.scratch() as scratch:
        path, record = Path(source), None
        if is_layout(source):
            tree, card, record = _of_image(source, scratch, tools)
        elif (path / FILE).is_file():
            tree, card, record = _of_build(path, scratch, tools)
        elif path.is_dir():
            card = ModelCard(name=path.resolve().name, license=license_of(path))
            tree = _of_folder(path, tools)
        elif path.suffix == ".gguf" and path.is_file():
            tree = _tree(path.parent, files_with(path), tools)
            card = ModelCard(name=model_name(path.name))
        elif path.is_file() or source.endswith(".gguf"):
            hint = "give a checkpoint's folder or a .gguf file"
            raise InputRefused(f"{path} is no model", hint=hint)
        else:
            tree, card, record = _of_image(source, scratch, tools)
        names = [entry.path for entry in tree.files]
        text = model_card(card, destination.repository, names)
        yield tree, card.version, About(card=text, record=record)


def _of_folder(root: Path, tools: Tools) -> Tree:
    """Return the files of a folder to publish; raises InputRefused for what must not be there."""
    if found := pickles_in(root):
        raise InputRefused(
            f"{root} has pickle files, which can run code: {', '.join(found[:3])}",
            hint="move them out of the folder, or convert them to safetensors",
        )
    names = scan(root, gguf=True)
    if any(name.endswith(".gguf") for name in names):
        check_no_code(root, names)
    else:
        names = check_model_folder(root)
    return _tree(root, names, tools)


def _tree(root: Path, names: Sequence[str], tools: Tools) -> Tree:
    entries = []
    for name in names:
        entry = tools.store.digest_file(root / name)
        entries.append(FileEntry(path=name, size=entry.size, digest=entry.digest))
    return Tree(root=root, files=tuple(entries))


def _of_build(folder: Path, scratch: Path, tools: Tools) -> _Model:
    with read_as_facts(folder / FILE):
        record = read_build(folder)
    if record.refused or record.image is None or record.artifact is None:
        raise InputRefused(
            f"{folder} is of a build that was refused: {record.refused or 'nothing was published'}",
            hint="only a model that passed its gate is published",
        )
    _require_merged(record.artifact.format, str(folder))
    if tree := _in_store(record, tools):
        return tree, card_of_build(record), public_record(record)
    image, layouts = record.image, [folder / "image"]
    if image.reference.startswith("oci:"):
        layouts.append(Path(image.reference.removeprefix("oci:")))
    held = [one for one in layouts if is_layout(str(one)) and held_digest(one) == image.digest]
    source = f"oci:{held[0]}" if held else f"{image.reference.partition('@')[0]}@{image.digest}"
    try:
        tree, _, _ = _of_image(source, scratch, tools)
    except (EnvironmentFailure, InputRefused, UsageError) as error:
        raise InputRefused(
            f"{folder}: its weights are neither in the store nor in {source}: {error.message}",
            hint="build again, or give the image's reference or layout instead of the folder",
        ) from None
    return tree, card_of_build(record), public_record(record)


def _in_store(record: BuildRecord, tools: Tools) -> Tree | None:
    artifact = record.artifact
    packed = artifact is not None and WEIGHTS in record.inputs
    stage = WEIGHTS if packed else merging.MergeStep.name
    inputs = record.inputs.get(stage)
    if artifact is None or not isinstance(inputs, dict):
        return None
    number = of_format(artifact.format).recipe_number if packed else merging.RECIPE_NUMBER
    entry = tools.store.find(StageInputs(stage=stage, recipe_number=number, inputs=inputs).key)
    tree = entry.tree if entry else None
    measured = record.inputs.get(cache_scales.CacheScalesStep.name)
    if tree and isinstance(measured, dict):
        tree = cache_scales.stored(measured, tree, tools)
    return tree if tree and tree.digest == artifact.digest else None


def _of_image(source: str, scratch: Path, tools: Tools) -> _Model:
    """Return the model in an image or a ModelPack, copied to a folder; its licence and labels."""
    place = open_location(source, tools.registry)
    image = place.image()
    format_ = image.labels.get(f"{PREFIX}format", "")
    _require_merged(format_, source)
    layers = weights_of(image, source)
    size = sum(layer.size for layer in layers)
    tools.progress.note(f"reading {len(layers)} layers of {source} ({size / 1e6:,.0f} MB)")
    tools.store.require_room(size, f"the files of {source}")
    root = scratch / "model"
    if image.has_files and ".tar" not in layers[0].media_type:
        _copy_files(layers, root)
    else:
        unpack(Image(layers=tuple(map(as_tar, layers)), settings={}), root)
    files = [path for path in below(root) if path.is_file()]
    marked = {p.parent for p in files if p.name == "config.json" or p.suffix == ".gguf"}
    if not marked:
        raise InputRefused(f"{source} has no model", hint="give an image with model weights")
    root = min(marked, key=lambda path: (len(path.parts), path))
    tree = _of_folder(root, tools)
    stated = [
        license_in(part.read(), image.labels.get(ARTIFACT, ""))
        for one in read_attached(place, image.digest)
        for part in one.parts
        if part.blob.media_type == MEDIA_TYPE and part.blob.size <= SMALL
    ]
    context = plan_in(image.labels).get("max_model_len", 0)
    name = source.rpartition("/")[2].partition("@")[0].partition(":")[0]
    card = card_of_labels(
        name,
        image.labels,
        PREFIX,
        license_=next(filter(None, stated), "") or license_of(tree.texts),
        context=context if isinstance(context, int) else 0,
        image=image.digest if VERDICT in image.labels else "",
    )
    return tree, card, record_of_card(card)


def _copy_files(layers: Sequence[Layer], root: Path) -> None:
    for layer in layers:
        path = PurePosixPath(layer.file)
        if not (parts := path.parts) or path.is_absolute() or ".." in parts or "\0" in layer.file:
            raise InputRefused(
                f"a file has the path {layer.file[:200]!r}, which leaves the model's folder",
                hint="the artifact is damaged or hostile; do not use it",
            )
        target = root.joinpath(*parts)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            file = target.open("xb")
        except OSError as error:
            if error.errno not in (EEXIST, EISDIR, ENAMETOOLONG, ENOTDIR):
                raise
            raise InputRefused(
                f"a file has the path {layer.file[:200]!r}, which is too long or another file's",
                hint="the artifact is damaged or hostile; do not use it",
            ) from None
        with file:
            file.writelines(layer.open())


def _require_merged(format_: str, source: str) -> None:
    if (known := all_formats().get(format_)) and known.unmerged:
        raise InputRefused(
            f"{source} serves adapters beside their base: it holds no merged model",
            hint="push the image of another target, or upload the adapter by itself",
        )
