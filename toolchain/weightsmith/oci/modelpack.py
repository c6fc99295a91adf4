"""A model as a ModelPack: every file is a layer of its own bytes, for model runners to pull.

https://github.com/modelpack/model-spec (docs/spec.md, docs/config.md, docs/annotations.md)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from weightsmith.core.values import Digest, JsonValue, Pieces, Tree, canonical
from weightsmith.oci.image import FILE_PATH, Image
from weightsmith.oci.layers import TITLE, FileLayer, Layer, TarLayer, title_of
from weightsmith.oci.manifests import MODEL_LAYER, MODEL_MANIFEST

_METADATA = "org.cncf.model.file.metadata+json"
_UNTESTED = "org.cncf.model.file.mediatype.untested"
_WEIGHTS = frozenset({".safetensors", ".gguf"})
_DOCUMENTS = re.compile(r"(readme|license|licence|notice|usage|copying)", re.IGNORECASE)
_UNITS = ((1e12, "t"), (1e9, "b"), (1e6, "m"), (1e3, "k"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """What a ModelPack's configuration says of a model; empty and 0 are left out."""

    name: str
    version: str
    family: str = ""
    """The model type, such as `llama`."""
    licenses: tuple[str, ...] = ()
    """SPDX identifiers."""
    format: str
    """`gguf` or `safetensors`."""
    parameters: int = 0
    precision: str = ""
    """The type of computations, such as `bfloat16`."""
    quantization: str = ""
    """Such as `q4_k_m`."""
    sees_images: bool = False

    def to_json(self) -> dict[str, JsonValue]:
        """Return the document, by schema/config-schema.json, without the layers' digests."""
        inputs = ["text", "image"] if self.sees_images else ["text"]
        descriptor: dict[str, JsonValue] = {
            "name": self.name,
            "version": self.version,
            "family": self.family,
            "licenses": list(self.licenses),
        }
        config: dict[str, JsonValue] = {
            "architecture": "transformer",
            "format": self.format,
            "paramSize": _size(self.parameters) if self.parameters else "",
            "precision": self.precision,
            "quantization": self.quantization,
            "capabilities": {"inputTypes": inputs, "outputTypes": ["text"]},
        }
        return {"descriptor": _given(descriptor), "config": _given(config)}


def model_pack(
    tree: Tree,
    description: ModelDescription,
    annotations: Mapping[str, str],
    contents: Mapping[str, Pieces] | None = None,
) -> Image:
    """Return a model's files as an artifact; nothing in it depends on time, owner or machine.

    `contents` are files that are in memory, not on disk.
    """
    return Image(
        layers=tuple(
            _layer(entry.path, tree, (contents or {}).get(entry.path))
            for entry in sorted(tree.files, key=lambda entry: entry.path)
        ),
        settings=description.to_json(),
        annotations=dict(annotations),
        artifact_type=MODEL_MANIFEST,
    )


@dataclass(frozen=True, slots=True)
class _NamedLayer:
    """A tar layer of an image under a ModelPack's media type: the same blob."""

    layer: Layer
    media_type: str

    @property
    def digest(self) -> Digest:
        return self.layer.digest

    @property
    def diff_id(self) -> Digest:
        return self.layer.diff_id

    @property
    def size(self) -> int:
        return self.layer.size

    @property
    def file(self) -> str:
        return self.layer.file

    @property
    def annotations(self) -> Mapping[str, str]:
        return {**title_of(self.layer.file, self.media_type), FILE_PATH: self.layer.file}

    def open(self) -> Iterator[bytes]:
        return self.layer.open()


def tar_model_pack(
    layers: Sequence[TarLayer], description: ModelDescription, annotations: Mapping[str, str]
) -> Image:
    """Return an image's weight layers as a ModelPack: a registry that has them gets none again.

    This is the form of olot (https://github.com/containers/olot), read by modctl and kit.
    """
    named = []
    for layer in layers:
        kinds = {_kind(member.path) for member in layer.members}
        kind = "weight" if "weight" in kinds else "weight.config"
        named.append(_NamedLayer(layer, MODEL_LAYER.format(kind=kind, form="tar")))
    return Image(
        layers=tuple(named),
        settings=description.to_json(),
        annotations=dict(annotations),
        artifact_type=MODEL_MANIFEST,
    )


def _layer(path: str, tree: Tree, pieces: Pieces | None) -> FileLayer:
    (entry,) = (entry for entry in tree.files if entry.path == path)
    # The metadata's types are those of Go's tar: a decimal mode, 0 for a regular file.
    metadata = {
        "name": PurePosixPath(path).name,
        "mode": 0o644,
        "uid": 0,
        "gid": 0,
        "size": entry.size,
        "mtime": "1970-01-01T00:00:00Z",
        "typeflag": 0,
    }
    return FileLayer(
        file=path,
        size=entry.size,
        digest=entry.digest,
        source=pieces if pieces is not None else tree.source(path),
        media_type=MODEL_LAYER.format(kind=_kind(path), form="raw"),
        annotations={
            FILE_PATH: path,
            _METADATA: canonical(metadata).decode(),
            _UNTESTED: "false",
            TITLE: path,
        },
    )


def _kind(path: str) -> str:
    name = PurePosixPath(path)
    if name.suffix in _WEIGHTS:
        return "weight"
    return "doc" if _DOCUMENTS.match(name.name) else "weight.config"


def _size(parameters: int) -> str:
    """Return a number of parameters as the schema has it: one decimal and a letter."""
    for size, letter in _UNITS:
        if round(parameters / size, 1) >= 1:
            return f"{parameters / size:.1f}{letter}"
    return str(parameters)


def _given(facts: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    return {name: value for name, value in facts.items() if value not in ("", [], 0)}
