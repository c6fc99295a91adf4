"""Validates manifests and indexes before anything in them is used.

https://github.com/opencontainers/image-spec (manifest.md, image-index.md, descriptor.md)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.platforms import host_platform
from weightsmith.core.safe_parse import SMALL, parse
from weightsmith.core.values import Blob, Digest, Json, JsonValue, canonical
from weightsmith.oci.layers import LAYER_TAR

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER_GZIP = f"{LAYER_TAR}+gzip"
LAYER_ZSTD = f"{LAYER_TAR}+zstd"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_TAR = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_GZIP = f"{DOCKER_TAR}.gzip"

MANIFESTS = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEXES = (OCI_INDEX, DOCKER_INDEX)
MODEL_MANIFEST = "application/vnd.cncf.model.manifest.v1+json"
"""The artifact type of a ModelPack; https://github.com/modelpack/model-spec docs/spec.md."""
MODEL_CONFIG = "application/vnd.cncf.model.config.v1+json"
MODEL_LAYER = "application/vnd.cncf.model.{kind}.v1.{form}"
MODEL_LAYERS = tuple(
    MODEL_LAYER.format(kind=kind, form=form)
    for kind in ("weight", "weight.config", "doc", "code", "dataset")
    for form in ("raw", "tar", "tar+gzip", "tar+zstd")
)

OLLAMA_LAYER = "application/vnd.ollama.image.{}"
OLLAMA_MODEL = OLLAMA_LAYER.format("model")
"""A GGUF file; https://github.com/ollama/ollama server/images.go."""
OLLAMA_PROJECTOR = OLLAMA_LAYER.format("projector")
OLLAMA_LAYERS = tuple(
    OLLAMA_LAYER.format(kind)
    for kind in (
        *("model", "adapter", "projector", "draft", "template", "system"),
        *("license", "params", "messages"),
    )
)

CONFIGS = (OCI_CONFIG, DOCKER_CONFIG, MODEL_CONFIG)
LAYERS = (LAYER_TAR, LAYER_GZIP, LAYER_ZSTD, DOCKER_TAR, DOCKER_GZIP, *MODEL_LAYERS, *OLLAMA_LAYERS)

_OF_MODELS = frozenset({*MODEL_LAYERS, *OLLAMA_LAYERS})

DAMAGED = "the image is damaged; push or write it again"
"""Hint for a malformed image."""
LARGEST_MANIFEST = 4 << 20
"""Bytes; registries have the same limit."""
LARGEST_CONFIG = 16 << 20


def damaged(text: str) -> InputRefused:
    """Return the refusal of a malformed image."""
    return InputRefused(text, hint=DAMAGED)


def hostile(text: str) -> InputRefused:
    """Return the refusal of what no tool writes."""
    return InputRefused(text, hint="the image is damaged or hostile; do not use it")


def read_json(data: bytes, where: str, largest: int = SMALL) -> Mapping[str, Json]:
    """Return a JSON object; for anything else raises InputRefused, which names `where`."""
    try:
        value = parse(data, largest=largest, unique=True)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputRefused(f"{where} is not a JSON object", hint="check that it is an image")
    return value


def descriptor(
    value: JsonValue, where: str, allowed: Sequence[str], largest: int | None = None
) -> Blob:
    """Return a descriptor's blob; raises InputRefused for a bad digest, size or media type."""
    fields = value if isinstance(value, dict) else {}
    media_type, size = fields.get("mediaType"), fields.get("size")
    if not isinstance(media_type, str) or media_type not in allowed:
        raise InputRefused(
            f"{where} has the media type {str(media_type)[:100]!r}, which is not supported",
            hint="supported: " + ", ".join(name for name in allowed if name not in _OF_MODELS),
        )
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise damaged(f"{where} has no valid size")
    if largest is not None and size > largest:
        raise hostile(f"{where} declares {size} bytes; at most {largest} are read")
    try:
        return Blob(digest=Digest(str(fields.get("digest"))), size=size, media_type=media_type)
    except ValueError:
        raise damaged(f"{where} has no valid sha256 digest") from None


def described(blob: Blob, annotations: Mapping[str, str] | None = None) -> dict[str, JsonValue]:
    """Return a blob's descriptor as documents have it."""
    found: dict[str, JsonValue] = {
        "mediaType": blob.media_type,
        "digest": blob.digest,
        "size": blob.size,
    }
    return {**found, "annotations": dict(annotations)} if annotations else found


def index_of(rows: Sequence[JsonValue], annotations: Mapping[str, str] | None = None) -> bytes:
    """Return an index of these descriptors."""
    document: dict[str, JsonValue] = {
        "schemaVersion": 2,
        "mediaType": OCI_INDEX,
        "manifests": list(rows),
    }
    if annotations:
        document["annotations"] = dict(annotations)
    return canonical(document)


def listed(document: Mapping[str, JsonValue], key: str, where: str) -> list[Json]:
    """Return a list in a document; raises InputRefused if it is not a list."""
    value = document.get(key)
    if not isinstance(value, list):
        raise damaged(f"{where} has no list {key!r}")
    return value


def choose(entries: Sequence[JsonValue], platform: str | None, where: str) -> Blob:
    """Return the index entry for a platform (default: this one); UsageError if there is none.

    An entry need not say its platform; the only image of an index is taken without it.
    """
    wanted = platform or host_platform()
    kinds = (*MANIFESTS, *INDEXES)
    rows = [(platform_of(e.get("platform")), e) for e in entries if isinstance(e, dict)]
    for said, entry in rows:
        if said == wanted:
            return descriptor(entry, where, kinds, LARGEST_MANIFEST)
    there = sorted({said for said, _ in rows} - {"", "unknown/unknown"})
    silent = [entry for said, entry in rows if not said]
    if not there and len({str(entry.get("digest")) for entry in silent}) == 1:
        return descriptor(silent[0], where, kinds, LARGEST_MANIFEST)
    raise UsageError(
        f"{where} has no image for {wanted}",
        hint=f"it has: {', '.join(there)[:200]}" if there else "it lists no platform",
    )


def platforms_in(index: bytes, where: str) -> list[str]:
    """Return the Linux platforms that an index has images for, sorted; [""] if it names none.

    `choose` then says which image that is, or that there is none.
    """
    rows = listed(read_json(index, where), "manifests", where)
    found = {platform_of(row.get("platform")) for row in rows if isinstance(row, dict)}
    return sorted(platform for platform in found if platform.startswith("linux/")) or [""]


def twice_in(index: bytes, where: str) -> list[str]:
    """Return the platforms that an index has several images for: engines differ in the one taken.

    Attestations, of an unknown platform, are none.
    """
    found: dict[str, set[str]] = {}
    for row in listed(read_json(index, where), "manifests", where):
        if isinstance(row, dict) and (name := platform_of(row.get("platform"))):
            found.setdefault(name, set()).add(str(row.get("digest")))
    return sorted(name for name in found if len(found[name]) > 1 and name != "unknown/unknown")


def platform_of(value: JsonValue) -> str:
    """Return a platform object as `os/architecture`, or empty; the variant is ignored."""
    if not isinstance(value, dict):
        return ""
    system, machine = str(value.get("os") or ""), str(value.get("architecture") or "")
    return f"{system}/{machine}" if system and machine else ""
