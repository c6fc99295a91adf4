"""GGUF files for llama.cpp, made by llama.cpp's own converter and quantizer."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from weightsmith.checkpoints.facts import ModelFacts
from weightsmith.errors import InputRefused, UsageError
from weightsmith.foreign import parse, parse_file
from weightsmith.quantizers.checkpoints import check_unpacked
from weightsmith.quantizers.gguf_check import check_files
from weightsmith.quantizers.gguf_file import model_files
from weightsmith.quantizers.gguf_imatrix import check_imatrix, experts_missed
from weightsmith.quantizers.gguf_types import FILE_TYPES, FORMATS, TENSOR_TYPES
from weightsmith.quantizers.gguf_view import open_view
from weightsmith.quantizers.quantizer import Quantizer, QuantizeRequest, Step
from weightsmith.values import Format, Json

# What the converter would take from folder names and `_name_or_path`; null leaves it out, so
# the same checkpoint gives the same bytes wherever it lies (gguf-py/gguf/metadata.py).
_FROM_PATHS = ("basename", "finetune", "organization", "version", "size_label")
_INTERMEDIATE = {"bfloat16": "bf16", "float32": "f32"}
# Where it really lies: a job's own folder, which shows it too, has another name in the next run,
# and a command that was done under another name is done again.
_CONVERT = Path(__file__).resolve().with_name("convert.py")
_ARCHITECTURES = Path(__file__).with_name("gguf_architectures.json")
IMATRIX = "imatrix.gguf"
DIGEST_KEY = "weightsmith.imatrix.digest"
"""The key under which a file says the sha256 of its importance matrix."""
_WINDOW = 512
"""Tokens of one window of the importance matrix: llama-imatrix's default."""
_LEAST_TOKENS = 256
_UNITS = {"M": 10**6, "G": 10**9}
_SPLIT_MARGIN = 0.7
"""Types are mixtures, and a part may hold the larger ones."""


def check_input(model: ModelFacts) -> None:
    """Refuse what the converter cannot read, from config.json alone."""
    if not model.architecture:
        raise InputRefused(
            "config.json lacks architectures, by which llama.cpp's converter knows a model",
            hint="add the model class's name, such as LlamaForCausalLM",
        )
    if model.encoder_decoder:
        raise InputRefused(
            f"{model.architecture} is an encoder with a decoder; only decoders are served here",
            hint="choose a decoder-only model",
        )
    check_unpacked(model)
    if model.architecture not in _architectures():
        raise InputRefused(
            f"the pinned llama.cpp converts no {model.architecture}",
            hint="choose an engine that loads safetensors, or a newer llama.cpp (see "
            "images/engines/llamacpp/README.md)",
        )


@cache
def _architectures() -> frozenset[str]:
    """Return what `convert_hf_to_gguf.py --print-supported-models` lists; a test compares them."""
    return frozenset(json.loads(_ARCHITECTURES.read_text("utf-8")))


def options(format_: Format, wanted: Mapping[str, Json]) -> Mapping[str, Json]:
    """Return what a type takes of the recipe's `quantize`; UsageError for what cannot be."""
    name = format_.name
    if FILE_TYPES[name].is_low and not wanted.get("allow_low_bits"):
        raise UsageError(
            f"{name} has about {format_.bits_per_weight:g} bits per weight: so few erase the small"
            " changes that fine-tuning made",
            hint="choose q4_k_m; or set quantize.allow_low_bits (--allow-low-bits), and let the "
            "quality gate and the task score say what is left",
        )
    found: dict[str, Json] = {"imatrix": _imatrix_mode(name, str(wanted.get("imatrix") or ""))}
    if wanted.get("split_max_size"):
        found["split_max_size"] = str(wanted["split_max_size"])
    if types := dict(wanted.get("tensor_types") or {}):
        found["tensor_types"] = _tensor_types(name, types)
    return found


def _imatrix_mode(name: str, asked: str) -> str:
    """Return `off`, `auto`, or the user's file as it was asked for."""
    row = FILE_TYPES[name]
    if not row.takes_imatrix:
        return "off"
    if row.needs_imatrix and asked == "off":
        raise UsageError(
            f"llama.cpp makes no {name} without an importance matrix",
            hint="leave imatrix out, or set it to auto or to a file",
        )
    return asked or ("auto" if row.named_bits < 5 else "off")


def _tensor_types(name: str, types: Mapping[str, Json]) -> dict[str, str]:
    if FILE_TYPES[name].direct:
        raise UsageError(
            f"{name} is written by the converter, which has one type for all tensors",
            hint="leave tensor_types out, or choose a quantized format",
        )
    known = sorted(row.name for row in TENSOR_TYPES.values() if row.chosen)
    for pattern, kind in types.items():
        try:
            re.compile(str(pattern))
        except re.error as error:
            raise UsageError(
                f"tensor_types: {pattern!r} is no expression: {error}",
                hint="write a regular expression, such as attn_v",
            ) from None
        if str(kind).lower() not in known or re.search(r"[=\s,]", str(pattern)):
            raise UsageError(
                f"tensor_types: {pattern}={kind} is no name and type of a tensor",
                hint=f"the types are {', '.join(known)}",
            )
    return {str(pattern): str(kind).lower() for pattern, kind in sorted(types.items())}


def calibrated(_format: Format, chosen: Mapping[str, Json]) -> bool:
    """Say whether an importance matrix is to be made."""
    return chosen.get("imatrix") == "auto"


def output_file(request: QuantizeRequest) -> Path:
    """Return where the finished file lies; the parts of a split one lie beside it."""
    return request.output / f"{request.name}.gguf"


def steps(request: QuantizeRequest) -> tuple[Step, ...]:
    """Return the commands: convert, and for quantized types imatrix and quantize.

    Quantized types go through a file of the checkpoint's own type (float32 for float32), so
    nothing is rounded before it is quantized; `options.threads` changes time, never bytes.
    """
    final, kind = output_file(request), request.format.name
    if FILE_TYPES[kind].direct:
        return (_convert(request, final, kind, str(request.options.get("split_max_size", ""))),)
    between = _INTERMEDIATE.get(_dtype(request.model), "f16")
    middle = request.output / f".{request.name}.{between}.gguf"
    limit = _part_size(request, 32 if between == "f32" else 16)
    made = [_convert(request, middle, between, limit)]
    matrix = request.options.get("imatrix", "off") != "off"
    if matrix and not request.measured:
        made.append(_imatrix(request, middle))
    return (*made, _quantize(request, middle, matrix=matrix))


def _part_size(request: QuantizeRequest, bits: int) -> str:
    """Return how to split the file between: llama-quantize keeps the parts that it is given."""
    split = str(request.options.get("split_max_size", ""))
    if not split:
        return ""
    size = int(split[:-1]) * _UNITS[split[-1]] * bits / request.format.bits_per_weight
    return f"{max(1, int(size * _SPLIT_MARGIN) // 10**6)}M"


def check(request: QuantizeRequest) -> Mapping[str, Json]:
    """Re-read the finished file or files against the checkpoint; raises CheckFailed."""
    matrix = request.output / IMATRIX
    files = [path for path in model_files(request.output) if path != matrix]
    facts = check_files(files, request.model, request.format.name, request.options)
    if request.options.get("imatrix", "off") != "off":
        facts["warnings"] += experts_missed(matrix)
    if FILE_TYPES[request.format.name].is_low:
        facts["warnings"].append(
            f"{request.format.name} has less than four bits per weight: what fine-tuning changed "
            "is lost first; look at the task score"
        )
    return facts


def peak_disk(checkpoint_bytes: int, _kept: int, format_: Format) -> int:
    """Return the bytes at the worst moment: the output, and a 16-bit copy for quantized types."""
    output = int(checkpoint_bytes * format_.bits_per_weight / 16 * 1.3)
    return output if FILE_TYPES[format_.name].direct else checkpoint_bytes + output


def _convert(request: QuantizeRequest, out: Path, kind: str, split: str) -> Step:
    converter = request.tools / "convert"
    overrides = request.output / f".{request.name}.metadata.json"
    return Step(
        title=f"converting to GGUF ({kind})",
        argv=(
            request.python,
            str(_CONVERT),
            str(converter / "convert_hf_to_gguf.py"),
            str(request.model),
            *("--outfile", str(out), "--outtype", kind),
            *(("--split-max-size", split) if split else ()),
            *("--model-name", request.name, "--metadata", str(overrides)),
        ),
        env={
            # Both by name: a safe path keeps the script's own folder out.
            "PYTHONPATH": f"{converter}:{converter / 'gguf-py'}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        },
        writes={overrides: json.dumps(_metadata(request), sort_keys=True)},
        removes=(overrides,),
        reads="the model",
    )


def _metadata(request: QuantizeRequest) -> dict[str, Json]:
    """Return what the file says of its origin; what the converter would guess is switched off."""
    about = dict(request.options.get("about") or {})
    found: dict[str, Json] = {f"general.{key}": None for key in _FROM_PATHS}
    found |= {f"general.{key}": value for key, value in about.items()}
    if "license" in about:  # the converter reads that key from a model card alone
        found["general.license.name"] = about["license"]
    return found


def _imatrix(request: QuantizeRequest, model: Path) -> Step:
    """Return the command that measures the importance of each weight's column."""
    if request.calibration is None:
        raise InputRefused(
            "an importance matrix needs calibration text",
            hint="give calibration text, or set imatrix to off",
        )
    rows = [parse(line) for line in request.calibration.read_text("utf-8").splitlines()]
    tokens = sum(int(row["tokens"]) for row in rows)
    if tokens < _LEAST_TOKENS:
        raise InputRefused(
            f"{len(rows)} calibration texts have {tokens} tokens together; an importance matrix "
            f"needs at least {_LEAST_TOKENS}",
            hint="add calibration text, or set imatrix to off",
        )
    text = request.output / ".calibration.txt"
    window = min(_WINDOW, _context(request.model), 1 << (tokens.bit_length() - 2))
    # One CPU is left to others: threads that wait for each other stand still with one of them.
    threads = request.options.get("threads") or max(1, len(os.sched_getaffinity(0)) - 1)
    split = "split_max_size" in request.options
    return Step(
        title=f"measuring importance on {tokens} tokens",
        argv=(
            str(request.tools / "bin" / "llama-imatrix"),
            *("-m", "{first}" if split else str(model), "-f", text.name, "-o", IMATRIX),
            *("-c", str(window), "--parse-special", "--no-ppl", "-fa", "off"),
            *("-t", str(threads)),
        ),
        # Sums in another order give other last bits: one variant, and so one result, everywhere.
        env={"WEIGHTSMITH_CPU_VARIANT": _variant()},
        writes={text: "\n".join(row["text"] for row in rows)},
        finds={"first": f"{model.stem}*.gguf"} if split else {},
        removes=(text,),
    )


def _variant() -> str:
    """Return the CPU variant that all machines but very old ones can run."""
    return "x86-64-v3" if platform.machine() in {"x86_64", "AMD64"} else "armv8-a"


def _quantize(request: QuantizeRequest, middle: Path, *, matrix: bool) -> Step:
    types = request.options.get("tensor_types", {})
    threads = request.options.get("threads")
    split = "split_max_size" in request.options
    final = output_file(request)
    license_ = dict(request.options.get("about") or {}).get("license")
    return Step(
        title=f"quantizing to {request.format.name}",
        argv=(
            str(request.tools / "bin" / "llama-quantize"),
            *(word for p, kind in types.items() for word in ("--tensor-type", f"{p}={kind}")),
            # By its name alone: the file remembers what the quantizer was given.
            *(("--imatrix", IMATRIX) if matrix else ()),
            *(("--override-kv", f"{DIGEST_KEY}=str:sha256:{{imatrix}}") if matrix else ()),
            *(("--override-kv", f"general.license=str:{license_}") if license_ else ()),
            *(("--keep-split", "{first}") if split else (str(middle),)),
            *(str(final.with_suffix("") if split else final), request.format.name.upper()),
            *((str(threads),) if threads else ()),
        ),
        env={},
        digests={"imatrix": request.output / IMATRIX} if matrix else {},
        finds={"first": f"{middle.stem}*.gguf"} if split else {},
        removes=(middle, middle.with_name(f"{middle.stem}-*.gguf")) if split else (middle,),
    )


def _config(model: Path) -> Mapping[str, Json]:
    try:
        config = parse_file(model / "config.json")
    except (OSError, ValueError):
        return {}
    return {**config, **(config.get("text_config") or {})}


def _dtype(model: Path) -> str:
    config = _config(model)
    return str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")


def _context(model: Path) -> int:
    return int(_config(model).get("max_position_embeddings") or _WINDOW)


QUANTIZER = Quantizer(
    name="gguf",
    builder="gguf",
    formats=FORMATS,
    recipe_number=3,
    check_input=lambda _format, model: check_input(model),
    options=options,
    calibrated=calibrated,
    steps=steps,
    check=check,
    peak_disk=peak_disk,
    view=open_view,
    default="q4_k_m",
    statistics=IMATRIX,
    check_statistics=check_imatrix,
)
