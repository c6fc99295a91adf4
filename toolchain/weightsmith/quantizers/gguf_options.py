"""What a GGUF file may be made of, and with which options."""

from __future__ import annotations

import re
from collections.abc import Mapping

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.values import Format, Json
from weightsmith.models.facts import ModelFacts
from weightsmith.quantizers.checkpoints import check_unpacked
from weightsmith.quantizers.gguf_calibration import check_walk
from weightsmith.quantizers.gguf_projector import PROJECTOR_TYPE, TEXT_ONLY
from weightsmith.quantizers.gguf_types import FILE_TYPES, TENSOR_TYPES
from weightsmith.quantizers.known import converted_as, gguf_architectures, has_projector


def check_input(model: ModelFacts) -> None:
    """Refuse models that the converter does not support, by config.json."""
    if not model.architecture:
        raise InputRefused(
            "config.json has no architectures",
            hint="add the model class's name, such as LlamaForCausalLM",
        )
    if model.encoder_decoder:
        raise InputRefused(
            f"{model.architecture} is an encoder-decoder; only decoder-only models are supported",
            hint="choose a decoder-only model",
        )
    check_unpacked(model)
    if (name := converted_as(model)) not in gguf_architectures():
        raise InputRefused(
            f"the pinned llama.cpp does not support {name}",
            hint="use an engine that loads safetensors, or a newer llama.cpp (see "
            "images/engines/llamacpp/README.md)",
        )


def options(format_: Format, requested: Mapping[str, Json]) -> Mapping[str, Json]:
    """Return the recipe's options that affect a format's output; raises UsageError."""
    name = format_.name
    if FILE_TYPES[name].is_low and not requested.get("allow_low_bits"):
        raise UsageError(
            f"{name} has about {format_.bits_per_weight:g} bits per weight, too few to preserve"
            " fine-tuning",
            hint="use q4_k_m; or set quantize.allow_low_bits (--allow-low-bits) and check the "
            "quality gate and the task score",
        )
    found: dict[str, Json] = {"imatrix": _imatrix_mode(name, str(requested.get("imatrix") or ""))}
    if requested.get("split_max_size"):
        found["split_max_size"] = str(requested["split_max_size"])
    if requested.get("allow_text_only"):
        found["allow_text_only"] = True
    if types := dict(requested.get("tensor_types") or {}):
        found["tensor_types"] = _tensor_types(name, types)
    return found


def options_of_model(model: ModelFacts) -> Mapping[str, Json]:
    """Return the type of the projector that a model which sees gets beside its file."""
    return {"projector": PROJECTOR_TYPE} if has_projector(model) else {}


def _imatrix_mode(name: str, requested: str) -> str:
    """Return `off`, `auto`, `walk`, or the user's file."""
    row = FILE_TYPES[name]
    if not row.takes_imatrix:
        return "off"
    if row.needs_imatrix and requested == "off":
        raise UsageError(
            f"{name} needs an importance matrix",
            hint="remove imatrix, or set it to auto, walk or to a file",
        )
    return requested or ("auto" if row.named_bits < 5 else "off")


def _tensor_types(name: str, types: Mapping[str, Json]) -> dict[str, str]:
    if FILE_TYPES[name].direct:
        raise UsageError(
            f"tensor_types is not supported by {name}: the converter uses one type for all tensors",
            hint="remove tensor_types, or use a quantized format",
        )
    known = sorted(row.name for row in TENSOR_TYPES.values() if row.selectable)
    for pattern, kind in types.items():
        if str(kind).lower() not in known or re.search(r"[=\s,]", str(pattern)):
            raise UsageError(
                f"tensor_types: invalid pattern or type in {pattern}={kind}",
                hint=f"types: {', '.join(known)}",
            )
    return {str(pattern): str(kind).lower() for pattern, kind in sorted(types.items())}


def calibrated(_format: Format, chosen: Mapping[str, Json]) -> bool:
    """Return whether an importance matrix is computed from calibration text."""
    return chosen.get("imatrix") == "auto" or walked(chosen)


def walked(chosen: Mapping[str, Json]) -> bool:
    """Return whether our own walk over the layers measures importance."""
    return chosen.get("imatrix") == "walk"


def check_options(model: ModelFacts, chosen: Mapping[str, Json]) -> None:
    """Refuse a walk over an architecture that it does not support, and to lose a vision tower."""
    if model.sees_images and not has_projector(model) and not chosen.get("allow_text_only"):
        raise InputRefused(
            f"{model.architecture} reads pictures, and its GGUF file would read text only: "
            + (
                "the pinned llama.cpp has no projector for it"
                if model.describes_images
                else "the model has no preprocessor_config.json, which a projector needs"
            ),
            hint=TEXT_ONLY,
        )
    if walked(chosen):
        check_walk(model)


def together(
    _format: Format, chosen: Mapping[str, Json], _other: Format, others: Mapping[str, Json]
) -> bool:
    """Return whether one pass over the weights can make another file beside the first.

    Parts depend on the type, and there is one importance matrix.
    """
    return (
        not ("split_max_size" in chosen or "split_max_size" in others)
        and chosen.get("about") == others.get("about")
        and others.get("imatrix") in ("off", chosen.get("imatrix"))
    )
