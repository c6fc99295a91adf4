"""Images as values: layers, a configuration and annotations; same inputs, same digest.

The configuration is a base's with what is added; those from outside are checked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import PurePosixPath
from typing import ClassVar, Literal, TypeAlias

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.platforms import host_platform
from weightsmith.core.values import Blob, Digest, ImageLayer, Json, JsonValue, canonical
from weightsmith.oci import manifests, tar
from weightsmith.oci.layers import FILE_PATH, LAYER_TAR, TITLE, BlobLayer, Layer, file_of
from weightsmith.oci.references import Reference

Order: TypeAlias = Literal["engine-first", "weights-first"]
Opener: TypeAlias = Callable[[], Iterator[bytes]]

MOST_LAYERS = 125
"""Docker's overlay2 refuses the 126th with "max depth exceeded"."""
_OCI_TYPES = {manifests.DOCKER_TAR: LAYER_TAR, manifests.DOCKER_GZIP: manifests.LAYER_GZIP}
_KEPT = ("os", "os.version", "os.features", "architecture", "variant", "author")
DEFAULT_PLATFORM = "linux/amd64"
"""Of an image from scratch, on every machine, so that it has one digest."""
OWN_LABELS = "dev.weightsmith."
ROLES = f"{OWN_LABELS}layers"
"""Label: roles of the layers, bottom first, such as `base:1 weights:2 settings:1`."""
_ROLE = re.compile(r"(base|weights|settings):([0-9]{1,3})")
STANDARD = "org.opencontainers.image."
"""Prefix of labels and annotations: image-spec annotations.md."""
_ITS_OWN = (STANDARD, OWN_LABELS)
"""Beginnings of labels that are not inherited: they say what the base is."""
_SECOND = 1_000_000_000
"""Nanoseconds, in which Docker keeps times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Healthcheck:
    """A command that exits with 0 when the server is ready; times in seconds."""

    command: tuple[str, ...]
    interval: int = 10
    timeout: int = 5
    start_period: int = 900
    """Loading weights takes minutes; earlier failures do not count."""
    retries: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """What an image adds to its base's configuration; None or empty keeps the base's."""

    user: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    entrypoint: tuple[str, ...] | None = None
    cmd: tuple[str, ...] | None = None
    ports: tuple[int, ...] = ()
    healthcheck: Healthcheck | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    working_dir: str | None = None


@dataclass(frozen=True, kw_only=True)
class Image:
    """An image; its digest is known once every layer's is. Nothing is written to disk for it."""

    layers: tuple[Layer, ...]
    """Bottom first, including the base's."""
    settings: Mapping[str, Json]
    """The configuration document without the layers' diff ids."""
    annotations: Mapping[str, str] = field(default_factory=dict)
    artifact_type: str = ""
    """Media type of an artifact that is no container image, such as a ModelPack."""
    manifest_type: str = manifests.OCI_MANIFEST
    """Media type of the manifest, unless it was read."""
    raw: tuple[bytes, bytes, str] | None = None
    """Manifest, configuration and the manifest's media type as read: this keeps the digest."""

    @cached_property
    def config_bytes(self) -> bytes:
        """The configuration blob: https://github.com/opencontainers/image-spec config.md."""
        if self.raw:
            return self.raw[1]
        ids = [layer.diff_id for layer in self.layers]
        if self.artifact_type:
            return canonical(dict(self.settings, modelfs={"type": "layers", "diffIds": ids}))
        return canonical(dict(self.settings, rootfs={"type": "layers", "diff_ids": ids}))

    @cached_property
    def manifest_bytes(self) -> bytes:
        """The manifest: https://github.com/opencontainers/image-spec manifest.md."""
        if self.raw:
            return self.raw[0]
        config = self.config_blob
        document = {
            "schemaVersion": 2,
            "mediaType": self.manifest_type,
            "config": manifests.described(config),
            "layers": [
                manifests.described(blob_of(layer), layer.annotations) for layer in self.layers
            ],
        }
        if self.artifact_type:
            document["artifactType"] = self.artifact_type
        if self.annotations:
            document["annotations"] = dict(self.annotations)
        return canonical(document)

    @property
    def media_type(self) -> str:
        """The manifest's media type."""
        return self.raw[2] if self.raw else self.manifest_type

    @property
    def has_files(self) -> bool:
        """Whether it is a model's files for a model runner, so that no engine can start it."""
        return bool(self.artifact_type) or any(
            layer.media_type in manifests.OLLAMA_LAYERS for layer in self.layers
        )

    @cached_property
    def digest(self) -> Digest:
        """The manifest's digest: the image's identity."""
        return Digest.of(self.manifest_bytes)

    @property
    def manifest_blob(self) -> Blob:
        """The manifest's descriptor."""
        return Blob(digest=self.digest, size=len(self.manifest_bytes), media_type=self.media_type)

    @property
    def config_blob(self) -> Blob:
        """The configuration's descriptor; its digest is what Docker calls the image id."""
        data = self.config_bytes
        kind = manifests.OCI_CONFIG
        if self.artifact_type:
            kind = manifests.MODEL_CONFIG
        elif self.media_type == manifests.DOCKER_MANIFEST:
            kind = manifests.DOCKER_CONFIG
        return Blob(digest=Digest.of(data), size=len(data), media_type=kind)

    @property
    def platform(self) -> str:
        """The platform as `os/architecture`; "" for an artifact, which suits any."""
        return "" if self.artifact_type else manifests.platform_of(self.settings)

    @property
    def config(self) -> Mapping[str, Json]:
        """The part of the configuration that an engine uses, such as `Env` and `Labels`."""
        return {} if self.artifact_type else self.settings.get("config") or {}

    @property
    def labels(self) -> Mapping[str, str]:
        """The image's labels; the annotations of an artifact, which has no labels."""
        return self.annotations if self.artifact_type else self.config.get("Labels") or {}

    def blobs(self) -> Iterator[tuple[Blob, Opener]]:
        """Yield every blob below the manifest once: layers bottom first, then the configuration."""
        seen: set[Digest] = set()
        for layer in self.layers:
            if layer.digest not in seen:
                seen.add(layer.digest)
                yield blob_of(layer), layer.open
        yield self.config_blob, lambda: iter((self.config_bytes,))


def assemble(
    weights: Sequence[Layer],
    files: Sequence[Layer] = (),
    *,
    config: ImageConfig,
    base: Image | None = None,
    annotations: Mapping[str, str] | None = None,
    order: Order = "engine-first",
    platform: str = DEFAULT_PLATFORM,
    epoch: int | None = None,
) -> Image:
    """Return an image of a base (None: from scratch), weight layers, and small layers on top.

    `weights-first` puts the weights below the base, so that engines do not download them again
    when only the base changes. `platform` is used only without a base.
    Raises UsageError above 125 layers.
    """
    lower, upper = (weights, ()) if order == "weights-first" else ((), weights)
    # OCI's media types are the only ones that umoci reads; same bytes.
    middle = tuple(
        replace(layer, blob=replace(layer.blob, media_type=_OCI_TYPES[layer.media_type]))
        if isinstance(layer, BlobLayer) and layer.media_type in _OCI_TYPES
        else layer
        for layer in (base.layers if base else ())
    )
    layers = (*lower, *middle, *upper, *files)
    if len(layers) > MOST_LAYERS:
        raise UsageError(
            f"the image would have {len(layers)} layers ({len(middle)} of its base); engines "
            f"support at most {MOST_LAYERS}",
            hint="use a base with fewer layers, or allow larger layers (--max-layer-size)",
        )
    when = datetime.fromtimestamp(tar.source_date_epoch() if epoch is None else epoch, UTC)
    created = when.strftime("%Y-%m-%dT%H:%M:%SZ")
    system, _, machine = platform.partition("/")
    start = base.settings if base else {"os": system, "architecture": machine}
    settings = {
        **{key: value for key, value in start.items() if key in _KEPT},
        "created": created,
        "config": _merged_config(_uncovered(base, (*weights, *files)) if base else {}, config),
        "history": [
            *(_entry(layer, created) for layer in lower),
            *(_base_history(base, created) if base else ()),
            *(_entry(layer, created) for layer in (*upper, *files)),
        ],
    }
    return Image(layers=layers, settings=settings, annotations=dict(annotations or {}))


def load_image(
    manifest: bytes,
    media_type: str,
    *,
    read: Callable[[Blob], bytes],
    opener: Callable[[Blob], Opener],
    where: str,
    origin: Reference | None = None,
) -> Image:
    """Return the image that a manifest describes; raises InputRefused if it is malformed.

    `read` returns a small blob, `opener` returns a layer's opener; both verify the content.
    """
    document = manifests.read_json(manifest, where)
    if media_type not in manifests.MANIFESTS or document.get("schemaVersion") != 2:
        raise InputRefused(
            f"{where} is not an image manifest of a supported type ({media_type[:100]!r})",
            hint="push the image again with a current tool",
        )
    config = manifests.descriptor(
        document.get("config"), f"{where}: the configuration", manifests.CONFIGS,
        manifests.LARGEST_CONFIG,
    )  # fmt: skip
    rows = manifests.listed(document, "layers", where)
    raw_config = read(config)
    settings = manifests.read_json(raw_config, f"{where}: the configuration")
    artifact_type = manifests.MODEL_MANIFEST if config.media_type == manifests.MODEL_CONFIG else ""
    ids = _diff_ids(settings, len(rows), where, model=bool(artifact_type))
    layers = []
    for n, (row, diff_id) in enumerate(zip(rows, ids, strict=True)):
        blob = manifests.descriptor(row, f"{where}: layer {n}", manifests.LAYERS)
        notes = _texts(row.get("annotations"), where)
        file = file_of(notes.get(TITLE, ""), blob.media_type) or notes.get(FILE_PATH, "")
        layers.append(
            BlobLayer(blob=blob, diff_id=diff_id, opener=opener(blob), file=file, origin=origin)
        )
    return Image(
        layers=tuple(layers),
        settings={
            key: value
            for key, value in (
                settings if artifact_type else _checked_config(settings, where)
            ).items()
            if key not in ("rootfs", "modelfs")
        },
        annotations=_texts(document.get("annotations"), where),
        artifact_type=artifact_type,
        raw=(manifest, raw_config, media_type),
    )


def blob_of(layer: Layer) -> Blob:
    """Return a layer's descriptor."""
    return Blob(digest=layer.digest, size=layer.size, media_type=layer.media_type)


def image_layers(image: Image) -> tuple[ImageLayer, ...]:
    """Return an image's layers as they are reported, bottom first."""
    return tuple(ImageLayer(digest=x.digest, size=x.size, file=x.file) for x in image.layers)


def _uncovered(base: Image, own: Sequence[Layer]) -> Mapping[str, JsonValue]:
    """Return the base's configuration without volumes over our own layers' files.

    An engine would copy the weights into such a volume whenever it starts a container.
    """
    files = [PurePosixPath("/", layer.file) for layer in own]
    volumes = {
        path: options
        for path, options in (base.config.get("Volumes") or {}).items()
        if not any(file.is_relative_to(PurePosixPath("/", path)) for file in files)
    }
    return {**base.config, "Volumes": volumes}


def _entry(layer: Layer, created: str) -> dict[str, JsonValue]:
    return {"created": created, "created_by": f"weightsmith: {layer.file or 'layer'}"}


def _base_history(base: Image, created: str) -> Sequence[Mapping[str, JsonValue]]:
    """Return the base's history, or one entry per layer if it does not match the layers."""
    rows = [row for row in base.settings.get("history") or () if isinstance(row, dict)]
    fits = sum(not row.get("empty_layer") for row in rows) == len(base.layers)
    return rows if fits else [{"created": created, "created_by": "base"}] * len(base.layers)


def _diff_ids(
    settings: Mapping[str, JsonValue], count: int, where: str, *, model: bool
) -> list[Digest]:
    files = settings.get("modelfs" if model else "rootfs")
    ids = files.get("diffIds" if model else "diff_ids") if isinstance(files, dict) else None
    if not isinstance(ids, list) or len(ids) != count:
        raise manifests.damaged(
            f"{where}: the configuration does not list the diff ids of the {count} layers"
        )
    try:
        return [Digest(str(text)) for text in ids]
    except ValueError:
        raise manifests.damaged(f"{where}: the configuration has a bad diff id") from None


@dataclass(frozen=True, kw_only=True)
class Index:
    """Images by platform under one name; the digest is known once every image's is.

    https://github.com/opencontainers/image-spec/blob/main/image-index.md
    """

    images: tuple[Image, ...]
    media_type: ClassVar[str] = manifests.OCI_INDEX

    @cached_property
    def manifest_bytes(self) -> bytes:
        """The index document, platforms sorted."""
        rows = []
        for image in self.images:
            system, _, machine = image.platform.partition("/")
            platform: dict[str, JsonValue] = {"os": system, "architecture": machine}
            if variant := image.settings.get("variant"):
                platform["variant"] = variant
            row = {**manifests.described(image.manifest_blob), "platform": platform}
            rows.append((canonical(platform), row))
        first, *others = (image.annotations for image in self.images)
        same = {k: v for k, v in first.items() if all(o.get(k) == v for o in others)}
        common = {key: text for key, text in same.items() if key.startswith(STANDARD)}
        ordered = [row for _, row in sorted(rows, key=lambda pair: pair[0])]
        return manifests.index_of(ordered, common)

    @property
    def digest(self) -> Digest:
        """The index's digest."""
        return Digest.of(self.manifest_bytes)

    @property
    def manifest_blob(self) -> Blob:
        """The index's descriptor."""
        size = len(self.manifest_bytes)
        return Blob(digest=self.digest, size=size, media_type=self.media_type)


ImageOrIndex: TypeAlias = Image | Index
"""What a name resolves to: an image, or an index of one image per platform."""


def layers_by_role(image: Image) -> Mapping[str, tuple[Layer, ...]]:
    """Return an image's layers by role, bottom first; {} if its label is missing or wrong."""
    parts = [_ROLE.fullmatch(part) for part in image.labels.get(ROLES, "").split()]
    counts = {part[1]: int(part[2]) for part in parts if part}
    if not all(parts) or sum(counts.values()) != len(image.layers):
        return {}
    at, found = 0, {}
    for role, count in counts.items():
        found[role] = image.layers[at : at + count]
        at += count
    return found


def index_of(images: Sequence[Image]) -> ImageOrIndex:
    """Return a single image as it is, several as an index."""
    return images[0] if len(images) == 1 else Index(images=tuple(images))


def images_of(whole: ImageOrIndex) -> tuple[Image, ...]:
    """Return the image itself, or all images of an index."""
    return whole.images if isinstance(whole, Index) else (whole,)


def host_image(whole: ImageOrIndex) -> Image:
    """Return the image itself, or an index's image for this machine, else its first."""
    images = images_of(whole)
    return next(filter(is_for_host, images), images[0])


def is_for_host(image: Image) -> bool:
    """Say whether an image is for this machine's platform."""
    return image.platform == host_platform()


def _merged_config(base: Mapping[str, Json], added: ImageConfig) -> dict[str, JsonValue]:
    """Return a base's configuration with what is added."""
    both = dict(base)
    env = dict(pair.partition("=")[::2] for pair in base.get("Env") or ())
    env.update(added.env)
    both["Env"] = [f"{key}={value}" for key, value in env.items()]
    labels = base.get("Labels") or {}
    inherited = {k: v for k, v in labels.items() if not k.startswith(_ITS_OWN)}
    both["Labels"] = {**inherited, **added.labels}
    both.pop("OnBuild", None)  # as Docker does: it is for builds on top of the base itself
    if added.user is not None:
        both["User"] = added.user
    if added.entrypoint is not None:
        # As Docker does: a base's command was meant for the base's entrypoint.
        both["Entrypoint"] = list(added.entrypoint)
        both.pop("Cmd", None)
    if added.cmd is not None:
        both["Cmd"] = list(added.cmd)
    if added.working_dir is not None:
        both["WorkingDir"] = added.working_dir
    if added.ports:
        ports: dict[str, JsonValue] = {f"{port}/tcp": {} for port in added.ports}
        both["ExposedPorts"] = {**(base.get("ExposedPorts") or {}), **ports}
    if added.healthcheck:
        # Docker's extension of OCI's: https://github.com/moby/docker-image-spec spec.md
        check = added.healthcheck
        both["Healthcheck"] = {
            "Test": ["CMD", *check.command],
            "Interval": check.interval * _SECOND,
            "Timeout": check.timeout * _SECOND,
            "StartPeriod": check.start_period * _SECOND,
            "Retries": check.retries,
        }
    return {key: value for key, value in both.items() if value not in (None, [], {})}


def _checked_config(settings: Mapping[str, JsonValue], where: str) -> Mapping[str, JsonValue]:
    """Return a configuration from outside; raises InputRefused if a field has the wrong type."""
    config = settings.get("config") or {}
    if not isinstance(config, dict):
        raise manifests.damaged(f"{where}: the configuration's 'config' is not an object")
    kinds: Mapping[str, type] = {
        **dict.fromkeys(("Env", "Entrypoint", "Cmd"), list),
        **dict.fromkeys(("Labels", "ExposedPorts", "Volumes"), dict),
        **dict.fromkeys(("User", "WorkingDir"), str),
    }
    for name, kind in kinds.items():
        value = config.get(name)
        wrong = value is not None and not isinstance(value, kind)
        inner = value if isinstance(value, list) else []
        if wrong or any(not isinstance(item, str) for item in inner):
            raise manifests.damaged(f"{where}: the configuration's {name!r} is malformed")
    _texts(config.get("Labels"), where)
    return settings


def _texts(value: JsonValue, where: str) -> dict[str, str]:
    """Return annotations or labels; raises InputRefused if they are no strings."""
    found = {} if value is None else value
    if not isinstance(found, dict) or any(not isinstance(text, str) for text in found.values()):
        raise manifests.damaged(f"{where}: annotations and labels must be strings")
    return dict(found)
