"""The projector of a model that sees: a second GGUF file, which llama.cpp's converter writes.

It is made in the same process, before the model's tensors are taken over, so computed weights are
read once. The option is in the key of models that have a projector and of no others, whose results
stay valid. A model whose tower cannot be converted is refused unless the recipe allows it: a
warning among others did not tell those who need it to see.
"""

from __future__ import annotations

from pathlib import Path

from weightsmith.core.errors import CheckFailed
from weightsmith.core.values import JsonValue
from weightsmith.models.gguf_names import projector_name
from weightsmith.quantizers.gguf_check import check_finite, check_guesses
from weightsmith.quantizers.gguf_file import GGUFModel
from weightsmith.quantizers.gguf_types import FILE_TYPES
from weightsmith.quantizers.quantizer import QuantizeRequest

PROJECTOR_TYPE = "f16"
"""As llama.cpp's guides and its published files have it: not every backend computes with bfloat16
there, and float16 has all values of bfloat16 from 6.1e-5 to 65504."""
ALLOW_TEXT_ONLY = "--allow-text-only"
"""The converting program's argument before a projector's places."""
TEXT_ONLY = (
    "set quantize.allow_text_only (--allow-text-only) for a model that reads text only; or choose "
    "target vllm, which reads pictures"
)
_EXPECTED = {
    "general.type": "mmproj",
    "general.architecture": "clip",
    "general.file_type": FILE_TYPES[PROJECTOR_TYPE].number,
    "clip.has_vision_encoder": True,
}


def places_of(request: QuantizeRequest) -> tuple[str, ...]:
    """Return where the projector belongs: beside the file of each format; () for none."""
    if "projector" not in request.options:
        return ()
    name = projector_name(f"{request.name}.gguf")
    return tuple(str(each.output / name) for each in (request, *request.siblings))


def check_projector(path: Path) -> dict[str, JsonValue]:
    """Return a projector's facts for the report; raises CheckFailed if a check fails.

    Checks: all tensors are inside the file and nothing follows the last; kind and type; a tensor of
    each layer; float16 weights are finite.
    """
    read = GGUFModel([path])
    for key, wanted in _EXPECTED.items():
        if (found := read.value(key)) != wanted:
            raise CheckFailed(
                f"{read.name}: {key} is {found!r}, not {wanted!r}",
                hint="check the converter's output",
            )
    check_guesses(read)
    layers = {name.split(".")[2] for name in read.tensors if name.startswith("v.blk.")}
    count = int(str(read.value("clip.vision.block_count")))
    if layers and len(layers) != count:
        raise CheckFailed(
            f"{read.name} has tensors of {len(layers)} layers, but the vision tower has {count}",
            hint="the converter dropped some; check its output",
        )
    check_finite(read)
    return {
        "file": path.name,
        "size": path.stat().st_size,
        "type": PROJECTOR_TYPE,
        "tensors": len(read.tensors),
    }
