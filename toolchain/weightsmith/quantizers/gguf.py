"""GGUF files for llama.cpp, made by llama.cpp's converter and quantizer."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path

from weightsmith.core.cpus import idle
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Format, JsonValue
from weightsmith.models.facts import ModelFacts
from weightsmith.quantizers import gguf_check
from weightsmith.quantizers.architectures import converted_as, gguf_architectures, has_projector
from weightsmith.quantizers.checkpoints import check_plain, row_lengths
from weightsmith.quantizers.gguf_file import open_view
from weightsmith.quantizers.gguf_importance import check_imatrix, check_walk, config_of, window_of
from weightsmith.quantizers.gguf_mix import budget_options, check_layers, fewest_bits
from weightsmith.quantizers.gguf_pass import ImportanceWalk, PassFile, PassSettings
from weightsmith.quantizers.gguf_rules import check_patterns
from weightsmith.quantizers.gguf_settings import check_settings
from weightsmith.quantizers.gguf_split import check_tokenizer
from weightsmith.quantizers.gguf_types import (
    EXPERTS_ONLY,
    FORMATS,
    MIX,
    TENSOR_TYPES,
    FileType,
    file_type,
)
from weightsmith.quantizers.quantizer import BuilderCommand, Options, Quantizer, QuantizeRequest


def check_input(model: ModelFacts) -> None:
    """Refuse models that the converter does not support, by config.json."""
    check_plain(model)
    if model.encoder_decoder:
        raise InputRefused(
            f"{model.architecture} is an encoder-decoder; only decoder-only models are supported",
            hint="choose a decoder-only model",
        )
    if (name := converted_as(model)) not in gguf_architectures():
        raise InputRefused(
            f"the pinned llama.cpp does not support {name}",
            hint="use an engine that loads safetensors, or a newer llama.cpp (see "
            "images/engines/llamacpp/README.md)",
        )
    check_settings(model)


def _check_input(format_: Format, model: ModelFacts) -> None:
    check_input(model)
    if format_.name == EXPERTS_ONLY and not model.matrices.experts:
        raise InputRefused(
            f"{EXPERTS_ONLY} packs experts, and the model has none: all would be q8_0",
            hint="choose q8_0, or a smaller type such as q4_k_m",
        )
    _check_rows(format_, model)


def _check_rows(format_: Format, model: ModelFacts) -> None:
    """Refuse rows that are no whole blocks of a type in whose place llama.cpp has no other.

    That is Q1_0 alone (tensor_type_fallback in its src/llama-quant.cpp).
    """
    if format_.name != "q1_0":
        return
    try:
        rows = row_lengths(model)
    except InputRefused:  # no decoder
        return
    block = TENSOR_TYPES["q1_0"].block
    for name, row in rows.items():
        if row % block:
            raise InputRefused(
                f"q1_0 has blocks of {block} weights, and {name} has {row} inputs",
                hint="choose another type, such as q4_k_m: llama.cpp gives such rows a larger one",
            )


def _options(format_: Format, requested: Options) -> Options:
    """Return the recipe's options that affect a format's output; raises UsageError.

    `imatrix` becomes `off`, `auto`, `walk`, or the user's file.
    """
    name, row = format_.name, file_type(format_.name)
    if row.is_low and not requested.get("allow_low_bits"):
        raise UsageError(
            f"{name} has about {format_.bits_per_weight:g} bits per weight, too few to preserve"
            " fine-tuning",
            hint="use q4_k_m; or set quantize.allow_low_bits (--allow-low-bits) and check the "
            "quality gate and the task score",
        )
    shared = bool(requested.get("shared_layers"))
    measured = "walk" if shared else "auto"  # llama-imatrix has no file of the base to measure on
    imatrix = str(requested.get("imatrix") or "") or (measured if row.named_bits < 5 else "off")
    if row == MIX and imatrix == "auto":  # what measures losses can measure it, too
        imatrix = "walk"
    for key, value in (("imatrix", "auto"), ("split_max_size", requested.get("split_max_size"))):
        if shared and value and requested.get(key) == value:
            raise UsageError(
                f"shared_layers and {key} {value} exclude each other",
                hint=f"leave {key} out: files are cut for layers, and importance is measured on "
                "the base by our own walk",
            )
    if row.needs_imatrix and requested.get("imatrix") == "off":
        raise UsageError(
            f"{name} needs an importance matrix",
            hint="remove imatrix, or set it to auto, walk or to a file",
        )
    found: dict[str, JsonValue] = {"imatrix": imatrix if row.takes_imatrix else "off"}
    if requested.get("split_max_size"):
        found["split_max_size"] = str(requested["split_max_size"])
    if shared:
        found["shared_layers"] = True
    if requested.get("allow_text_only"):
        found["allow_text_only"] = True
    if row == MIX:
        return {**found, **_budget(requested)}
    return {**found, **_chosen_types(row, requested)}


def _chosen_types(row: FileType, requested: Options) -> Options:
    """Return the types that the user has chosen for tensors; raises UsageError."""
    types = requested.get("tensor_types")
    if not types or not isinstance(types, Mapping):
        return {}
    if row.direct:
        raise UsageError(
            f"tensor_types is not supported by {row.name}: the converter uses one type for all "
            "tensors",
            hint="remove tensor_types, or use a quantized format",
        )
    known = sorted(row.name for row in TENSOR_TYPES.values() if row.selectable)
    for pattern, kind in types.items():
        if str(kind).lower() not in known or re.search(r"[=\s,]", pattern):
            raise UsageError(
                f"tensor_types: invalid pattern or type in {pattern}={kind}",
                hint=f"types: {', '.join(known)}",
            )
    return {"tensor_types": {p: str(kind).lower() for p, kind in sorted(types.items())}}


_BUDGETS = (3.0, 3.5, 4.3, 4.6, 5.0, 5.4, 6.0, 7.0)
"""Bits per weight of the mixes that `auto` tries, where they may be so small."""


def _variants(format_: Format, requested: Options) -> tuple[Options, ...]:
    low = bool(requested.get("allow_low_bits"))
    if (row := file_type(format_.name)) == MIX:
        return tuple({"bits": bits} for bits in _BUDGETS if bits >= fewest_bits(low=low))
    return () if row.is_low and not low else ({},)


def _budget(requested: Options) -> Options:
    for name in ("tensor_types", "split_max_size", "shared_layers"):
        if requested.get(name):
            raise UsageError(
                f"{name} is not supported by {MIX.name}",
                hint="remove it; quantize.mix takes a file with the type of each tensor",
            )
    return budget_options(requested)


def _is_walked(chosen: Options) -> bool:
    return chosen.get("imatrix") == "walk"


def _is_mix(chosen: Options) -> bool:
    return _needs_losses(chosen) or "mix" in chosen


def _needs_losses(chosen: Options) -> bool:
    return "bits" in chosen or "size" in chosen


def _is_walkable(model: ModelFacts) -> bool:
    """Return whether our walk knows the architecture, and so all names of its tensors."""
    try:
        check_walk(model)
    except InputRefused:
        return False
    return True


def _check_options(model: ModelFacts, chosen: Options) -> None:
    if model.sees_images and not has_projector(model) and not chosen.get("allow_text_only"):
        raise InputRefused(
            f"{model.architecture} reads pictures, and its GGUF file would read text only: "
            + (
                "the pinned llama.cpp has no projector for it"
                if model.describes_images
                else "the model has no preprocessor_config.json, which a projector needs"
            ),
            hint=gguf_check.TEXT_ONLY,
        )
    check_layers(model, chosen)
    if isinstance(types := chosen.get("tensor_types"), Mapping) and _is_walkable(model):
        check_patterns(types, model)
    if _is_walked(chosen) or _needs_losses(chosen):
        check_walk(model)


# Metadata that the converter would guess from folder names and `_name_or_path`; null omits it, so
# that the bytes do not depend on the path (gguf-py/gguf/metadata.py).
_FROM_PATHS = ("basename", "finetune", "organization", "version", "size_label")
_INTERMEDIATE = {"bfloat16": "bf16", "float32": "f32"}
_CONVERT = "weightsmith.worker.convert_gguf"
_QUANTIZE = "weightsmith.worker.quantize_gguf"
_OFFLINE = {
    "PYTHONDONTWRITEBYTECODE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # Rows are quantized in threads of our own; OpenMP's would wait beside them, spinning.
    "OMP_NUM_THREADS": "1",
}
_UNITS = {"M": 10**6, "G": 10**9}
_SPLIT_MARGIN = 0.7
"""Safety factor: formats mix types, and a part may have the larger ones."""


def output_file(request: QuantizeRequest) -> Path:
    """Return the path of the finished file; parts of a split one are in the same folder."""
    return request.output / f"{request.name}.gguf"


def _steps(request: QuantizeRequest) -> tuple[BuilderCommand, ...]:
    """Return the steps: convert or quantize in one pass.

    Our own walk measures importance while the converter starts. Only llama-imatrix needs a 16-bit
    file of the model: where it measures, the file is made before, and quantized and deleted
    afterwards. It has the checkpoint's dtype, so nothing is rounded before quantization.
    `options.threads` does not affect the bytes.
    """
    requests = (request, *request.siblings)
    kinds = [file_type(each.format.name) for each in requests]
    split = str(request.options.get("split_max_size", ""))
    if kinds[0].direct and split:
        return (_convert(request, output_file(request), kinds[0].name, split),)
    files = tuple(
        PassFile(
            out=str(output_file(each)),
            format=each.format.name,
            direct=kind.direct,
            tensor_types=dict(each.options.get("tensor_types", {})),
            # Relative, because it is written to the file.
            importance="" if each.options.get("imatrix", "off") == "off" else gguf_check.IMATRIX,
            mix={k: each.options[k] for k in ("bits", "size", "mix", "low") if k in each.options},
            overrides={"general.license": name} if (name := _about(each).get("license")) else {},
        )
        for each, kind in zip(requests, kinds, strict=True)
    )
    projectors = gguf_check.places_of(request)
    if all(kind.direct for kind in kinds):
        return (_pass(request, files, "", _converter(request, ""), projectors),)
    config = config_of(request.model)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")
    between, limit = _INTERMEDIATE.get(dtype, "f16"), ""
    if split:  # llama-quantize keeps the parts of the file between
        bits = 32 if between == "f32" else 16
        size = int(split[:-1]) * _UNITS[split[-1]] * bits / request.format.bits_per_weight
        limit = f"{max(1, int(size * _SPLIT_MARGIN) // 10**6)}M"
    words, middle = _converter(request, limit), _middle(request, between)
    if request.options.get("imatrix", "off") in ("off", "walk") or request.measured:
        return (_pass(request, files, between, words, projectors),)
    if split:
        measured = _convert(request, middle, between, limit)
    else:
        file = PassFile(out=str(middle), format=between, direct=True)
        measured = _pass(request, (file,), "", words, projectors)
    # The file that is measured has no longer what the converter rounded.
    again = words if any(kind.direct for kind in kinds) else ()
    return measured, _imatrix(request, middle), _pass(request, files, between, again, ())


def _middle(request: QuantizeRequest, between: str) -> Path:
    """Return the place of the file that importance is measured on, or the stem of its parts."""
    return request.output / f".{request.name}.{between}.gguf"


def _about(request: QuantizeRequest) -> dict[str, str]:
    return dict(request.options.get("about") or {})


def _converter(request: QuantizeRequest, split: str) -> tuple[str, ...]:
    """Return the converter's program and arguments, but for a file's name and type."""
    return (
        str(request.tools / "convert" / "convert_hf_to_gguf.py"),
        str(request.model),
        *(("--split-max-size", split) if split else ()),
        *("--model-name", request.name, "--metadata", str(_overrides(request))),
    )


def _overrides(request: QuantizeRequest) -> Path:
    return request.output / f".{request.name}.metadata.json"


def _convert(request: QuantizeRequest, out: Path, kind: str, split: str) -> BuilderCommand:
    overrides = _overrides(request)
    words = (*_converter(request, split), "--outfile", str(out), "--outtype", kind)
    if places := gguf_check.places_of(request):
        allowed = (gguf_check.ALLOW_TEXT_ONLY,) if request.options.get("allow_text_only") else ()
        words = (*words, "--", *allowed, *places)
    return BuilderCommand(
        title=f"converting to GGUF ({kind})",
        argv=(request.python, "-m", _CONVERT, *words),
        env=_OFFLINE,
        writes={overrides: _metadata(request)},
        removes=(overrides,),
        reads="the model",
    )


def _metadata(request: QuantizeRequest) -> str:
    """Return the file's metadata as JSON; keys that the converter would guess are null."""
    about = _about(request)
    found: dict[str, str | None] = {f"general.{key}": None for key in _FROM_PATHS}
    found |= {f"general.{key}": value for key, value in about.items()}
    if "license" in about:  # the converter reads this key only from a model card
        found["general.license.name"] = about["license"]
    return json.dumps(found, sort_keys=True)


def _imatrix(request: QuantizeRequest, model: Path) -> BuilderCommand:
    if request.calibration is None:
        raise InputRefused(
            "an importance matrix needs calibration text",
            hint="provide calibration text, or set imatrix to off",
        )
    rows = [parse(line) for line in request.calibration.read_text("utf-8").splitlines()]
    tokens = sum(int(row["tokens"]) for row in rows)
    text = request.output / ".calibration.txt"
    window = window_of(request.model, len(rows), tokens)
    threads = request.options.get("threads") or idle()
    split = "split_max_size" in request.options
    # Of all but very old machines.
    variant = "x86-64-v3" if platform.machine() in {"x86_64", "AMD64"} else "armv8-a"
    return BuilderCommand(
        title=f"measuring importance on {tokens} tokens",
        argv=(
            str(request.tools / "bin" / "llama-imatrix"),
            *("-m", "{first}" if split else str(model), "-f", text.name, "-o", gguf_check.IMATRIX),
            *("-c", str(window), "--parse-special", "--no-ppl", "-fa", "off"),
            # Else it loads the vocabulary twice, to find out what fits into a GPU's memory.
            *("-fit", "off"),
        ),
        # The order of sums affects the last bits, so use the same CPU variant everywhere. Threads
        # are no argument: a resumed run knows a finished step by its arguments.
        env={"WEIGHTSMITH_CPU_VARIANT": variant, "LLAMA_ARG_THREADS": str(threads)},
        writes={text: "\n".join(row["text"] for row in rows)},
        makes=request.output / gguf_check.IMATRIX,
        finds={"first": f"{model.stem}*.gguf"} if split else {},
        removes=(text,),
    )


def _pass(
    request: QuantizeRequest,
    files: tuple[PassFile, ...],
    between: str,
    convert: tuple[str, ...],
    projectors: tuple[str, ...],
) -> BuilderCommand:
    """Return the step that quantizes what the converter computes, or the file that it wrote."""
    settings, overrides = request.output / f".{request.name}.quantize.json", _overrides(request)
    middle, texts = _middle(request, between), request.output / ".texts.jsonl"
    matrix, losses = request.output / gguf_check.IMATRIX, request.output / gguf_check.LOSSES
    walk = None
    measures = _is_walked(request.options) and not request.measured
    if measures or (_needs_losses(request.options) and not request.weighed):
        walk = ImportanceWalk(
            model=str(request.measured_on or request.model),
            texts=str(texts),
            out=str(matrix) if request.options["imatrix"] != "off" else "",
            losses=str(losses) if _needs_losses(request.options) else "",
            low=bool(request.options.get("low")),
        )
    contents = PassSettings(
        convert=convert,
        middle=str(middle) if between else "",
        between=between,
        quantize=str(request.tools / "bin" / "llama-quantize"),
        threads=int(request.options.get("threads") or 0),
        split="split_max_size" in request.options,
        by_kind=bool(request.options.get("shared_layers")),
        files=files,
        walk=walk,
        projectors=projectors,
        allow_text_only=bool(request.options.get("allow_text_only")),
        losses=str(losses) if _needs_losses(request.options) else "",
    )
    writes = {settings: json.dumps(contents.to_json())}
    if convert:
        writes[overrides] = _metadata(request)
    if walk:
        writes[texts] = "".join(json.dumps(dict(row)) + "\n" for row in request.texts)
    return BuilderCommand(
        title=f"{'measuring importance and ' if walk else ''}"
        f"{'quantizing' if between else 'converting'} to "
        f"{', '.join(file.format for file in files)}",
        argv=(request.python, "-m", _QUANTIZE, str(settings)),
        env=_OFFLINE,
        writes=writes,
        removes=(settings, overrides, texts, middle, middle.with_name(f"{middle.stem}-*.gguf")),
        reads="the model" if convert else "",
    )


QUANTIZER = Quantizer(
    name="gguf",
    builder="gguf",
    formats=FORMATS,
    recipe_number=6,
    check_input=_check_input,
    check_files=check_tokenizer,
    options=_options,
    variants=_variants,
    # The type of the projector that a model which sees gets beside its file.
    options_of_model=lambda model: (
        {"projector": gguf_check.PROJECTOR_TYPE} if has_projector(model) else {}
    ),
    check_options=_check_options,
    calibrated=lambda _format, chosen: (
        chosen.get("imatrix") in ("auto", "walk") or _needs_losses(chosen)
    ),
    walked=_is_walked,
    steps=_steps,
    check=gguf_check.check,
    # llama-imatrix measures on a file of the whole model.
    peak_disk=lambda size, kept, format_, chosen: (
        int(size * format_.bits_per_weight / 16 * 1.3)
        + kept
        + (size if chosen.get("imatrix") == "auto" else 0)
    ),
    view=open_view,
    default="q4_k_m",
    computed=True,
    statistics=gguf_check.IMATRIX,
    check_imports=("weightsmith.models.gguf_reader",),
    check_statistics=check_imatrix,
    losses=gguf_check.LOSSES,
    weighs=_needs_losses,
    # Parts depend on the type, there is one importance matrix, and losses are for mixes alone.
    one_pass=lambda _format, chosen, _other, others: (
        not {"split_max_size", "shared_layers"} & {*chosen, *others}
        and chosen.get("about") == others.get("about")
        and others.get("imatrix") in ("off", chosen.get("imatrix"))
        and not (_is_mix(chosen) or _is_mix(others))
    ),
)
