"""A model's files for model runners to pull: as a ModelPack, or a GGUF file as Ollama takes it.

Every file is a layer of its own bytes.
https://github.com/modelpack/model-spec (docs/spec.md, docs/config.md, docs/annotations.md)
https://github.com/ollama/ollama (manifest/manifest.go, types/model/config.go, server/images.go)

Ollama accepts only Docker's manifest type and ignores unknown keys, so labels are in the
configuration and names in the layers' title annotations. There is no template layer: from 0.30.0 on
Ollama takes the GGUF file's own, and the language of its own has no `trim`, so those of Llama 3 and
Gemma could not be translated exactly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from weightsmith.core.errors import UsageError
from weightsmith.core.values import (
    Digest,
    FileEntry,
    JsonValue,
    Pieces,
    Stream,
    Tree,
    canonical,
)
from weightsmith.oci.image import STANDARD, Image
from weightsmith.oci.layers import FILE_PATH, TITLE, FileLayer, FileSource, NamedLayer, TarLayer
from weightsmith.oci.manifests import DOCKER_MANIFEST, MODEL_LAYER, MODEL_MANIFEST, OLLAMA_LAYER
from weightsmith.oci.references import Reference

_METADATA = "org.cncf.model.file.metadata+json"
_UNTESTED = "org.cncf.model.file.mediatype.untested"
_WEIGHTS = frozenset({".safetensors", ".gguf"})
_DOCUMENTS = re.compile(r"(readme|license|licence|notice|usage|copying)", re.IGNORECASE)
_UNITS = ((1e12, "t"), (1e9, "b"), (1e6, "m"), (1e3, "k"))
_PARTS = 2
"""Of a repository's name: namespace and model."""
_LONGEST = 80
"""Characters of each, and of a tag."""
_SINCE = "0.30.0"
"""The first version that reads a GGUF file's own chat template; `ollama show` says so."""
_DESCRIBED = {
    "description": "description",
    "documentation": "docURL",
    "revision": "revision",
    "source": "sourceURL",
    "vendor": "vendor",
}
_OLLAMA_UNITS = ((1e9, "B", 1), (1e6, "M", 2), (1e3, "K", 0))


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
    described: Mapping[str, str] = field(default_factory=dict)
    """More of the descriptor, as `described` returns it."""

    def to_json(self) -> dict[str, JsonValue]:
        """Return the document, by schema/config-schema.json, without the layers' digests."""
        counted = (  # with one decimal
            f"{self.parameters / size:.1f}{letter}"
            for size, letter in _UNITS
            if round(self.parameters / size, 1) >= 1
        )
        inputs = ["text", "image"] if self.sees_images else ["text"]
        descriptor: dict[str, JsonValue] = {
            "name": self.name,
            "version": self.version,
            "family": self.family,
            "licenses": list(self.licenses),
            **self.described,
        }
        config: dict[str, JsonValue] = {
            "architecture": "transformer",
            "format": self.format,
            "paramSize": next(counted, str(self.parameters or "")),
            "precision": self.precision,
            "quantization": self.quantization,
            "capabilities": {"inputTypes": inputs, "outputTypes": ["text"]},
        }
        return {"descriptor": _given(descriptor), "config": _given(config)}


def described(labels: Mapping[str, str]) -> dict[str, str]:
    """Return what standard labels say of a model, by the names of a ModelPack's descriptor."""
    return {
        name: labels[STANDARD + key]
        for key, name in _DESCRIBED.items()
        if labels.get(STANDARD + key)
    }


def model_pack(
    tree: Tree,
    description: ModelDescription,
    annotations: Mapping[str, str],
    contents: Mapping[str, Pieces | Stream] | None = None,
) -> Image:
    """Return a model's files as an artifact; nothing in it depends on time, owner or machine.

    `contents` are files that are not on disk as such.
    """
    ready = contents or {}
    return Image(
        layers=tuple(
            _layer(entry, ready[entry.path] if entry.path in ready else tree.source(entry.path))
            for entry in sorted(tree.files, key=lambda entry: entry.path)
        ),
        settings=description.to_json(),
        annotations=dict(annotations),
        artifact_type=MODEL_MANIFEST,
    )


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
        named.append(NamedLayer(layer, MODEL_LAYER.format(kind=kind, form="tar")))
    return Image(
        layers=tuple(named),
        settings=description.to_json(),
        annotations=dict(annotations),
        artifact_type=MODEL_MANIFEST,
    )


def _layer(entry: FileEntry, source: FileSource) -> FileLayer:
    # The metadata's types are those of Go's tar: a decimal mode, 0 for a regular file.
    metadata = {
        "name": PurePosixPath(entry.path).name,
        "mode": 0o644,
        "uid": 0,
        "gid": 0,
        "size": entry.size,
        "mtime": "1970-01-01T00:00:00Z",
        "typeflag": 0,
    }
    notes = {
        FILE_PATH: entry.path,
        _METADATA: canonical(metadata).decode(),
        _UNTESTED: "false",
    }
    return _file_layer(entry, source, MODEL_LAYER.format(kind=_kind(entry.path), form="raw"), notes)


def _kind(path: str) -> str:
    name = PurePosixPath(path)
    if name.suffix in _WEIGHTS:
        return "weight"
    return "doc" if _DOCUMENTS.match(name.name) else "weight.config"


def _given(facts: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    return {name: value for name, value in facts.items() if value not in ("", [], 0)}


def ollama_model(
    tree: Tree,
    weights: FileEntry,
    *,
    projector: FileEntry | None = None,
    family: str,
    file_type: str,
    parameters: int = 0,
    context: int = 0,
    licenses: Sequence[str] = (),
    labels: Mapping[str, str],
    contents: Mapping[str, Pieces | Stream] | None = None,
) -> Image:
    """Return a model in Ollama's form; nothing in it depends on time, owner or machine.

    `family` is the GGUF file's architecture, `file_type` its type, such as `Q4_K_M`; `context` is
    the length that Ollama loads it with, 0 for its default. The chat template is the file's own,
    so an Ollama that does not read it would prompt the model with plain text.
    """
    files = [("model", weights), *([("projector", projector)] if projector else [])]
    layers = [
        *(
            _file_layer(
                one,
                (contents or {}).get(one.path, tree.source(one.path)),
                OLLAMA_LAYER.format(kind),
            )
            for kind, one in files
        ),
        *(_text("license", f"LICENSE.{n}", text) for n, text in enumerate(licenses)),
    ]
    counted = (  # as Ollama shows it: 8.0B, 134.52M
        f"{parameters / size:.{digits}f}{letter}"
        for size, letter, digits in _OLLAMA_UNITS
        if parameters >= size
    )
    if context:
        layers.append(_text("params", "params.json", canonical({"num_ctx": context}).decode()))
    settings: dict[str, JsonValue] = {
        "model_format": "gguf",
        "model_family": family,
        "model_families": [family, *(["clip"] if projector else [])],
        "model_type": next(counted, str(parameters or "")),
        "file_type": file_type,
        "requires": _SINCE,
        "architecture": "amd64",
        "os": "linux",
        # Ollama ignores this part; it is where labels are in every image of this manifest type.
        "config": {"Labels": dict(labels)},
    }
    return Image(layers=tuple(layers), settings=settings, manifest_type=DOCKER_MANIFEST)


def check_name(place: Reference) -> None:
    """Raise UsageError for a name that Ollama cannot read: HOST/NAMESPACE/MODEL:TAG.

    https://github.com/ollama/ollama/blob/main/types/model/name.go
    """
    namespace, _, model = place.repository.partition("/")
    parts = place.repository.count("/") + 1
    wrong = {
        f"the repository has {parts} part{'s' if parts > 1 else ''}": parts != _PARTS,
        f"the namespace {namespace} has a dot": "." in namespace,
        "its host is an IPv6 address": place.registry.startswith("["),
        f"a part has more than {_LONGEST} characters": any(
            len(part) > _LONGEST for part in (namespace, model, place.tag or "")
        ),
    }
    if found := [why for why, is_so in wrong.items() if is_so]:
        raise UsageError(
            f"Ollama cannot pull {place}: it takes names of the form HOST/NAMESPACE/MODEL:TAG, and"
            f" {found[0]}",
            hint="name a repository of two parts, such as registry.example.com/team/support-bot,"
            " or leave the kind ollama out",
        )


def modelfile(sources: Sequence[str], context: int) -> str:
    """Return a Modelfile, from which `ollama create` makes the model.

    `sources` are the paths of the GGUF file and of its projector, or a reference that Ollama pulls;
    `context` as above. https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx
    """
    lines = [
        f"# ollama create NAME --file Modelfile (Ollama {_SINCE} or newer)",
        *(f"FROM {one}" for one in sources),
    ]
    lines += [f"PARAMETER num_ctx {context}"] if context else []
    return "\n".join(lines) + "\n"


def _file_layer(
    file: FileEntry, source: FileSource, media_type: str, notes: Mapping[str, str] | None = None
) -> FileLayer:
    return FileLayer(
        file=file.path,
        size=file.size,
        digest=file.digest,
        source=source,
        media_type=media_type,
        annotations={**(notes or {}), TITLE: file.path},
    )


def _text(kind: str, name: str, text: str) -> FileLayer:
    data = text.encode()
    file = FileEntry(path=name, size=len(data), digest=Digest.of(data))
    return _file_layer(file, (data,), OLLAMA_LAYER.format(kind))
