"""`push` and `inspect`: images in registries and layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from weightsmith.api.commands.requests import Said
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.escape import joined
from weightsmith.core.platforms import usual
from weightsmith.core.ports import AnySigner, ContainerEngine, Progress
from weightsmith.core.values import Blob, Digest, ImageLayer, Json, Published, Writable
from weightsmith.oci import manifests
from weightsmith.oci.image import Image, blob_of
from weightsmith.oci.layout import is_layout
from weightsmith.oci.modelpack import check_name
from weightsmith.oci.references import DOCKER_HUB, Reference
from weightsmith.oci.registry import (
    ImageLocation,
    Registry,
    RegistryLocation,
    open_location,
    reference_of,
)
from weightsmith.provenance.evidence import own_statements, read_attached
from weightsmith.provenance.labels import (
    PREFIX,
    REBASED,
    REPLAY_COUNT,
    REPLAY_DIGEST,
    TESTED,
    TESTED_PLATFORM,
    plan_in,
    scores_in,
)
from weightsmith.provenance.sealing import (
    cosign_tag,
    countersigned,
    only_held,
    unrelated_statements,
    withdrawn_by,
)
from weightsmith.serving.memory import human

_ASIDE = "unknown/unknown"
"""Platform of manifests that other builders put beside their images, such as attestations."""


def copy_image(
    source: str,
    to: str,
    registry: Registry,
    progress: Progress,
    *,
    force: bool,
    signer: AnySigner | None = None,
) -> Published:
    """Copy an image and its attachments to a registry, byte for byte.

    What the registry already has is not sent, and if the tag names the image already, not looked
    for unless `force`. With a key, the copied image and its statements are signed; existing
    signatures are kept.
    """
    origin, place = open_location(source, registry), Reference.parse(to)
    there = RegistryLocation(registry, place, every=force)
    progress.stage("push", to)
    if (index := origin.index()) is not None:
        return _copy_index(index, origin, there, progress, force=force, signer=signer)
    image = origin.image()
    if any(layer.media_type in manifests.OLLAMA_LAYERS for layer in image.layers):
        try:
            check_name(place)
        except UsageError as error:  # it may be a mirror that nobody pulls from
            progress.warn(error.message)
    whole = image.manifest_blob
    published = registry.push(
        image,
        place,
        force=force,
        before_tag=lambda: copy_attachments(whole, origin, there, signer, progress.warn),
        progress=lambda done, total: progress.advance(done, total, "bytes"),
        warn=progress.warn,
    )
    progress.finish("push", published.seconds, cached=published.uploaded_bytes == 0)
    return published


def preview_copy(source: str, to: str, registry: Registry, *, force: bool) -> Said:
    """Return what `copy_image` would do with each layer, also as text; change nothing.

    Raises UsageError as a copy does if the tag names another image.
    """
    origin, place = open_location(source, registry), Reference.parse(to)
    index = origin.index()
    if index is None:
        image = origin.image()
        files = {blob_of(layer): layer.file for layer in image.layers}
        blobs, subjects = [blob for blob, _ in image.blobs()], [image.digest]
    else:
        below = [blob for _, blob in _listed(index, place)]
        ones = [*map(origin.read, below)]
        files = {part.blob: part.title for one in ones for part in one.parts}
        blobs = [blob for one in ones for blob, _ in one.blobs()]
        subjects = [Digest.of(index), *(blob.digest for blob in below)]
    if not force:
        registry.check_tag(place, subjects[0])
    same_registry = bool(_sources(origin, place))
    rows, lines, sent = list[Mapping[str, Writable]](), list[str](), 0
    for blob in dict.fromkeys(blobs):
        how = "there" if registry.has(place, blob) else "send"
        if how == "send" and same_registry and blob in files:  # a configuration is sent
            how = "mount"
        file = files.get(blob, "configuration")
        sent += blob.size if how == "send" else 0
        rows.append({"digest": blob.digest, "size": blob.size, "file": file, "how": how})
        lines.append(f"  {how:<7} {blob.digest[7:19]}  {human(blob.size):>10}  {file}")
    attached = sum(len(origin.attached(one)) for one in subjects)
    first = f"{place}@{subjects[0]}: nothing was changed"
    last = f"{human(sent)} and {attached} attachments would be sent"
    return {
        "reference": str(place),
        "dry_run": True,
        "digest": subjects[0],
        "blobs": rows,
        "attached": attached,
        "uploaded_bytes": sent,
    }, joined([first, *lines, last])


def _sources(origin: ImageLocation, to: Reference) -> list[str]:
    """Return the repository of the same registry that the registry can mount blobs from, if any."""
    if isinstance(origin, RegistryLocation) and origin.reference.registry == to.registry:
        return [origin.reference.repository]
    return []


def _copy_index(
    index: bytes,
    origin: ImageLocation,
    there: RegistryLocation,
    progress: Progress,
    *,
    force: bool,
    signer: AnySigner | None,
) -> Published:
    registry, to = there.registry, there.reference
    document = manifests.read_json(index, str(to))
    kind = str(document.get("mediaType") or manifests.OCI_INDEX)
    whole = Blob(digest=Digest.of(index), size=len(index), media_type=kind)
    if not force:
        registry.check_tag(to, whole.digest)
    sent, layers = list[Published](), dict[Digest, ImageLayer]()
    for row, blob in _listed(index, to):
        one = origin.read(blob)
        if manifests.platform_of(row.get("platform")) != _ASIDE:
            for part in one.parts:  # platforms share some
                digest, size = part.blob.digest, part.blob.size
                layers[digest] = ImageLayer(digest=digest, size=size, file=part.title)
        pushed = registry.push_manifest(
            Reference(to.registry, to.repository),
            one.manifest_bytes,
            blob.media_type,
            [*one.blobs()],
            mount_from=_sources(origin, to),
            progress=lambda done, total: progress.advance(done, total, "bytes"),
            warn=progress.warn,
        )
        sent.append(pushed)
        copy_attachments(blob, origin, there, signer, progress.warn)
    last = registry.push_manifest(
        to,
        index,
        kind,
        force=force,
        before_tag=lambda: copy_attachments(whole, origin, there, signer, progress.warn),
    )
    done = replace(
        last,
        layers=tuple(layers.values()),
        uploaded_bytes=sum(one.uploaded_bytes for one in sent),
        mounted=sum(one.mounted for one in sent),
        seconds=last.seconds + sum(one.seconds for one in sent),
    )
    progress.finish("push", done.seconds, cached=done.uploaded_bytes == 0)
    return done


def _listed(index: bytes, to: Reference) -> Iterator[tuple[Mapping[str, Json], Blob]]:
    document = manifests.read_json(index, str(to))
    for row in manifests.listed(document, "manifests", str(to)):
        kinds, most = manifests.MANIFESTS, manifests.LARGEST_MANIFEST
        yield row, manifests.descriptor(row, str(to), kinds, most)


def copy_attachments(
    image: Blob,
    origin: ImageLocation,
    there: RegistryLocation,
    signer: AnySigner | None,
    warn: Callable[[str], None] = lambda _: None,
) -> None:
    """Copy an image's attachments to its new location, also under cosign's tags.

    Signs only statements from `origin` about this image. Attachments that were already at the new
    location keep their signatures, because cosign stores everybody's signatures under one tag.
    """
    found, held = read_attached(origin, image.digest), []
    if signer or any(map(cosign_tag, found)):
        known = {attachment.blob.digest for attachment in found}
        held = [a for a in read_attached(there, image.digest) if a.blob.digest not in known]
    parts = own_statements(found)
    if why := withdrawn_by(parts, image.digest):
        whose = "this key says so, too" if signer else "the copy is, too"
        warn(f"{image.digest.short} was withdrawn: {why}; {whose}")
    if others := unrelated_statements(parts, image.digest):
        done = "left unsigned" if signer else "copied unchanged"
        warn(
            f"a statement attached to {image.digest.short} is {others[0]}"
            f"{f', {len(others) - 1} more like it' if others[1:] else ''}: {done},"
            " and `verify` rejects it"
        )
    if signer and (alien := only_held(own_statements(held), parts)):
        warn(
            f"{alien} statement(s) about {image.digest.short} were already at the destination:"
            " they are left unsigned, and `verify --key` will report them"
        )
    made = countersigned(found, image, there.reference.name, signer, held)
    # Attachments that were found only through cosign's tag name no subject.
    ours = (a if a.subject.digest == image.digest else replace(a, subject=image) for a in made)
    there.attach(*(replace(a, tag=cosign_tag(a)) for a in ours))


def inspect_image(
    source: str, registry: Registry, engine: ContainerEngine, platform: str = ""
) -> Mapping[str, Json]:
    """Return an image's provenance, plan, scores, layers and configuration.

    For an index, reads the image for `platform`, by default this machine's. If the registry does
    not have the image, reads it from the container engine.
    """
    platform = usual(platform)
    attached, held = list[Mapping[str, Json]](), dict[str, Json]()
    if not (platform or is_layout(source) or Path(source).is_dir()):
        reference = reference_of(source)
        held = dict(engine.inspect(source)) if engine.answers() else {}
        # For a name without a registry, the engine comes first: `support-bot` is not on Docker Hub.
        if held and reference.registry != DOCKER_HUB and registry.confirmed(reference):
            held = {}
    if held:
        config = held.get("Config") or {}
        ids = held.get("RootFS", {}).get("Layers") or ()
        # Docker's own store keeps no manifest, containerd's no digest of the configuration.
        by_manifest = any(str(name).endswith(held["Id"]) for name in held.get("RepoDigests") or ())
        found: dict[str, Json] = {
            "digest": held["Id"] if by_manifest else "",
            "config_digest": "" if by_manifest else held["Id"],
            "size": held.get("Size", 0),
            "labels": config.get("Labels") or {},
            "layers": [{"digest": i, "diff_id": i, "size": 0, "file": ""} for i in ids],
        }
    else:
        place = open_location(source, registry)
        index = place.index()
        named = [name for name in manifests.platforms_in(index, source) if name] if index else []
        image = place.image(platform or None)
        if image.platform and platform not in {"", image.platform}:
            raise InputRefused(
                f"{source} is for {image.platform}",
                hint=f"there is no image for {platform}; remove --platform",
            )
        found = describe(image)
        if index:
            found |= {"index": Digest.of(index), "platforms": named}
        rows = read_attached(place, image.digest)
        attached = [{"artifact_type": a.artifact_type, "digest": a.blob.digest} for a in rows]
    labels = found["labels"]
    plan, scores = plan_in(labels), scores_in(labels)
    # What cannot be parsed is returned unchanged.
    read = {*(f"score.{name}" for name in scores), *(["plan"] if plan else [])}
    own = {k.removeprefix(PREFIX): v for k, v in labels.items() if k.startswith(PREFIX)}
    return {
        "reference": source,
        **found,
        "provenance": {name: text for name, text in own.items() if name not in read},
        "plan": plan,
        "scores": scores,
        "attached": attached,
    }


def inspect_text(found: Mapping[str, Json]) -> str:
    """Return the result of `inspect` as text."""
    identity = found["digest"] or f"{found['config_digest']} (image id)"
    lines = [f"{found['reference']}", f"  digest    {identity}"]
    if "index" in found:
        platforms = ", ".join(found["platforms"])
        lines.append(f"  platform  {found['platform']}, one of {platforms}")
        lines.append(f"  index     {found['index']}")
    stated = found["provenance"]
    if stand_in := stated.get(TESTED_PLATFORM.removeprefix(PREFIX)):
        lines.append(f"  not started itself: the scores are those of the image for {stand_in}")
    tested = stated.get(TESTED.removeprefix(PREFIX), "")
    if tested and REBASED.removeprefix(PREFIX) in stated:
        lines.append(f"  the scores are those of {tested[7:19]}, before its base was replaced")
    lines += [f"  {name:<9} {value:.4f}" for name, value in found["scores"].items()]
    lines += [f"  {name:<24} {text}" for name, text in sorted(stated.items()) if name != "config"]
    plan = found["plan"]
    if {"max_num_seqs", "max_model_len", "device"} <= plan.keys():
        lines.append(
            f"  serves {plan['max_num_seqs']} requests of {plan['max_model_len']} tokens "
            f"on {plan['device']}"
        )
    lines += [
        f"  {layer['digest'][7:19]}  {human(int(layer['size'])):>10}  {layer['file']}"
        for layer in found["layers"]
    ]
    return joined(lines)


_SUMMARY = {
    "User": "user", "Env": "env", "Entrypoint": "entrypoint", "Cmd": "cmd",
    "WorkingDir": "working_dir", "ExposedPorts": "ports", "Healthcheck": "healthcheck",
}  # fmt: skip
_LAYER = ("digest", "diff_id", "size", "media_type", "file")


def describe(image: Image) -> dict[str, Json]:
    """Return all but the layers' content as plain JSON; sizes are bytes as stored."""
    layers = [{key: getattr(layer, key) for key in _LAYER} for layer in image.layers]
    config = {ours: image.config[key] for key, ours in _SUMMARY.items() if key in image.config}
    if "ports" in config:
        config["ports"] = sorted(config["ports"] or ())
    return {
        "digest": image.digest,
        "config_digest": image.config_blob.digest,
        "media_type": image.media_type,
        "platform": image.platform,
        "created": image.settings.get("created"),
        "labels": dict(image.labels),
        "annotations": dict(image.annotations),
        "config": config,
        "layers": layers,
        "replay": {
            key: image.labels[label]
            for key, label in (("digest", REPLAY_DIGEST), ("questions", REPLAY_COUNT))
            if label in image.labels
        },
        "size": sum(layer.size for layer in image.layers),
    }
