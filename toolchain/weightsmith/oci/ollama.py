"""A GGUF model as Ollama pulls it from a registry: the file is a layer of its own bytes.

https://github.com/ollama/ollama (manifest/manifest.go, types/model/config.go, server/images.go)

Ollama accepts only Docker's manifest type and ignores unknown keys, so labels are in the
configuration and names in the layers' title annotations. There is no template layer: from 0.30.0 on
Ollama takes the GGUF file's own, and the language of its own has no `trim`, so those of Llama 3 and
Gemma could not be translated exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from weightsmith.core.errors import UsageError
from weightsmith.core.values import Digest, FileEntry, JsonValue, Pieces, Tree, canonical
from weightsmith.oci.image import Image
from weightsmith.oci.layers import TITLE, FileLayer
from weightsmith.oci.manifests import DOCKER_MANIFEST, OLLAMA_LAYER
from weightsmith.oci.references import Reference

_PARTS = 2
"""Of a repository's name: namespace and model."""
_LONGEST = 80
"""Characters of each, and of a tag."""
_SINCE = "0.30.0"
"""The first version that reads a GGUF file's own chat template; `ollama show` says so."""
_UNITS = ((1e9, "B", 1), (1e6, "M", 2), (1e3, "K", 0))


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
    contents: Mapping[str, Pieces] | None = None,
) -> Image:
    """Return a model in Ollama's form; nothing in it depends on time, owner or machine.

    `family` is the GGUF file's architecture, `file_type` its type, such as `Q4_K_M`; `context` is
    the length that Ollama loads it with, 0 for its default. The chat template is the file's own,
    so an Ollama that does not read it would prompt the model with plain text.
    """
    files = [("model", weights), *([("projector", projector)] if projector else [])]
    layers = [
        *(
            FileLayer(
                file=one.path,
                size=one.size,
                digest=one.digest,
                source=(contents or {}).get(one.path, tree.source(one.path)),
                media_type=OLLAMA_LAYER.format(kind),
                annotations={TITLE: one.path},
            )
            for kind, one in files
        ),
        *(_text("license", f"LICENSE.{n}", text) for n, text in enumerate(licenses)),
    ]
    if context:
        layers.append(_text("params", "params.json", canonical({"num_ctx": context}).decode()))
    settings: dict[str, JsonValue] = {
        "model_format": "gguf",
        "model_family": family,
        "model_families": [family, *(["clip"] if projector else [])],
        "model_type": _count(parameters) if parameters else "",
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


def _text(kind: str, name: str, text: str) -> FileLayer:
    data = text.encode()
    return FileLayer(
        file=name,
        size=len(data),
        digest=Digest.of(data),
        source=(data,),
        media_type=OLLAMA_LAYER.format(kind),
        annotations={TITLE: name},
    )


def _count(parameters: int) -> str:
    """Return a number of parameters as Ollama shows it: 8.0B, 134.52M."""
    for size, letter, digits in _UNITS:
        if parameters >= size:
            return f"{parameters / size:.{digits}f}{letter}"
    return str(parameters)
