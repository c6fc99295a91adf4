"""GGUF files for llama.cpp, made by llama.cpp's converter and quantizer."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path

from weightsmith.core.cpus import idle
from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Format, Json
from weightsmith.quantizers.gguf_calibration import config_of, window_of
from weightsmith.quantizers.gguf_check import check_files
from weightsmith.quantizers.gguf_imatrix import check_imatrix, experts_missed
from weightsmith.quantizers.gguf_options import (
    calibrated,
    check_input,
    check_options,
    options,
    options_of_model,
    together,
    walked,
)
from weightsmith.quantizers.gguf_projector import ALLOW_TEXT_ONLY, check_projector, places_of
from weightsmith.quantizers.gguf_settings import ImportanceWalk, PassFile, PassSettings
from weightsmith.quantizers.gguf_types import FILE_TYPES, FORMATS
from weightsmith.quantizers.gguf_view import open_view
from weightsmith.quantizers.quantizer import BuilderCommand, Quantizer, QuantizeRequest

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
IMATRIX = "imatrix.gguf"
_UNITS = {"M": 10**6, "G": 10**9}
_SPLIT_MARGIN = 0.7
"""Safety factor: formats mix types, and a part may have the larger ones."""


def output_file(request: QuantizeRequest) -> Path:
    """Return the path of the finished file; parts of a split one are in the same folder."""
    return request.output / f"{request.name}.gguf"


def steps(request: QuantizeRequest) -> tuple[BuilderCommand, ...]:
    """Return the steps: convert or quantize in one pass.

    Our own walk measures importance while the converter starts. Only llama-imatrix needs a 16-bit
    file of the model: where it measures, the file is made before, and quantized and deleted
    afterwards. It has the checkpoint's dtype, so nothing is rounded before quantization.
    `options.threads` does not affect the bytes.
    """
    kinds = [FILE_TYPES[each.format.name] for each in (request, *request.beside)]
    split = str(request.options.get("split_max_size", ""))
    if kinds[0].direct and split:
        return (_convert(request, output_file(request), kinds[0].name, split),)
    files, projectors = tuple(map(_file, (request, *request.beside))), places_of(request)
    if all(kind.direct for kind in kinds):
        return (_pass(request, files, "", _converter(request, ""), projectors),)
    between = _INTERMEDIATE.get(_dtype(request.model), "f16")
    limit = _part_size(request, 32 if between == "f32" else 16)
    words, middle = _converter(request, limit), _middle(request, between)
    mode = request.options.get("imatrix", "off")
    if mode in ("off", "walk") or request.measured:
        return (_pass(request, files, between, words, projectors),)
    # The file that is measured has no longer what the converter rounded.
    again = words if any(kind.direct for kind in kinds) else ()
    return (
        _measured(request, middle, between, limit),
        _imatrix(request, middle),
        _pass(request, files, between, again, ()),
    )


def _measured(request: QuantizeRequest, middle: Path, between: str, split: str) -> BuilderCommand:
    """Return the step that writes the file that importance is measured on."""
    if split:
        return _convert(request, middle, between, split)
    file = PassFile(out=str(middle), format=between, direct=True)
    return _pass(request, (file,), "", _converter(request, ""), places_of(request))


def _middle(request: QuantizeRequest, between: str) -> Path:
    return request.output / f".{request.name}.{between}.gguf"


def _part_size(request: QuantizeRequest, bits: int) -> str:
    """Return the part size of the intermediate file, whose parts llama-quantize keeps."""
    split = str(request.options.get("split_max_size", ""))
    if not split:
        return ""
    size = int(split[:-1]) * _UNITS[split[-1]] * bits / request.format.bits_per_weight
    return f"{max(1, int(size * _SPLIT_MARGIN) // 10**6)}M"


def check(request: QuantizeRequest) -> Mapping[str, Json]:
    """Check the finished files against the checkpoint; raises CheckFailed."""
    matrix = request.output / IMATRIX
    projector = next(map(Path, places_of(request)), None)
    sees = projector is not None and projector.is_file()
    found = sorted(request.output.glob("[!.]*.gguf"))
    files = [path for path in found if path not in (matrix, projector)]
    facts = check_files(files, request.model, request.format.name, request.options, sees=sees)
    if projector and sees:
        facts["projector"] = check_projector(projector)
    elif projector:
        facts["warnings"].append(
            "llama.cpp's converter could not convert the vision tower, so the server reads text "
            "only, as quantize.allow_text_only permits"
        )
    if request.options.get("imatrix", "off") != "off":
        facts["warnings"] += experts_missed(matrix)
    if FILE_TYPES[request.format.name].is_low:
        facts["warnings"].append(
            f"{request.format.name} has less than four bits per weight, which may lose the "
            "fine-tuning: check the task score"
        )
    return facts


def peak_disk(checkpoint_bytes: int, kept: int, format_: Format, chosen: Mapping[str, Json]) -> int:
    """Return the peak disk usage in bytes: output, and the file that importance needs."""
    output = int(checkpoint_bytes * format_.bits_per_weight / 16 * 1.3) + kept
    middle = calibrated(format_, chosen) and not walked(chosen)
    return output + (checkpoint_bytes if middle else 0)


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
    if places := places_of(request):
        allowed = (ALLOW_TEXT_ONLY,) if request.options.get("allow_text_only") else ()
        words = (*words, "--", *allowed, *places)
    return BuilderCommand(
        title=f"converting to GGUF ({kind})",
        argv=(request.python, "-m", _CONVERT, *words),
        env=_OFFLINE,
        writes={overrides: json.dumps(_metadata(request), sort_keys=True)},
        removes=(overrides,),
        reads="the model",
    )


def _metadata(request: QuantizeRequest) -> dict[str, Json]:
    """Return the file's metadata; keys that the converter would guess are null."""
    about = dict(request.options.get("about") or {})
    found: dict[str, Json] = {f"general.{key}": None for key in _FROM_PATHS}
    found |= {f"general.{key}": value for key, value in about.items()}
    if "license" in about:  # the converter reads this key only from a model card
        found["general.license.name"] = about["license"]
    return found


def _imatrix(request: QuantizeRequest, model: Path) -> BuilderCommand:
    """Return the step that computes the importance matrix."""
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
    return BuilderCommand(
        title=f"measuring importance on {tokens} tokens",
        argv=(
            str(request.tools / "bin" / "llama-imatrix"),
            *("-m", "{first}" if split else str(model), "-f", text.name, "-o", IMATRIX),
            *("-c", str(window), "--parse-special", "--no-ppl", "-fa", "off"),
            # Else it loads the vocabulary twice, to find out what fits into a GPU's memory.
            *("-fit", "off"),
        ),
        # The order of sums affects the last bits, so use the same CPU variant everywhere. Threads
        # are no argument: a resumed run knows a finished step by its arguments.
        env={"WEIGHTSMITH_CPU_VARIANT": _variant(), "LLAMA_ARG_THREADS": str(threads)},
        writes={text: "\n".join(row["text"] for row in rows)},
        finds={"first": f"{model.stem}*.gguf"} if split else {},
        removes=(text,),
    )


def _variant() -> str:
    """Return the CPU variant that all but very old machines support."""
    return "x86-64-v3" if platform.machine() in {"x86_64", "AMD64"} else "armv8-a"


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
    walk = None
    if walked(request.options) and not request.measured:
        matrix = request.output / IMATRIX
        walk = ImportanceWalk(model=str(request.model), texts=str(texts), out=str(matrix))
    contents = PassSettings(
        convert=convert,
        middle=str(middle) if between else "",
        between=between,
        quantize=str(request.tools / "bin" / "llama-quantize"),
        threads=int(request.options.get("threads") or 0),
        split="split_max_size" in request.options,
        files=files,
        walk=walk,
        projectors=projectors,
        allow_text_only=bool(request.options.get("allow_text_only")),
    )
    metadata = json.dumps(_metadata(request), sort_keys=True)
    return BuilderCommand(
        title=f"{'measuring importance and ' if walk else ''}"
        f"{'quantizing' if between else 'converting'} to "
        f"{', '.join(file.format for file in files)}",
        argv=(request.python, "-m", _QUANTIZE, str(settings)),
        env=_OFFLINE,
        writes={
            settings: json.dumps(contents.to_json()),
            **({overrides: metadata} if convert else {}),
            **({texts: "".join(map(_line, request.texts))} if walk else {}),
        },
        removes=(settings, overrides, texts, middle, middle.with_name(f"{middle.stem}-*.gguf")),
        reads="the model" if convert else "",
    )


def _line(row: Mapping[str, Json]) -> str:
    return json.dumps(dict(row)) + "\n"


def _file(request: QuantizeRequest) -> PassFile:
    matrix = request.options.get("imatrix", "off") != "off"
    license_ = dict(request.options.get("about") or {}).get("license")
    return PassFile(
        out=str(output_file(request)),
        format=request.format.name,
        direct=FILE_TYPES[request.format.name].direct,
        tensor_types=dict(request.options.get("tensor_types", {})),
        # Relative, because it is written to the file.
        importance=IMATRIX if matrix else "",
        overrides={"general.license": license_} if license_ else {},
    )


def _dtype(model: Path) -> str:
    config = config_of(model)
    return str(config.get("dtype") or config.get("torch_dtype") or "").removeprefix("torch.")


QUANTIZER = Quantizer(
    name="gguf",
    builder="gguf",
    formats=FORMATS,
    recipe_number=3,
    check_input=lambda _format, model: check_input(model),
    options=options,
    options_of_model=options_of_model,
    check_options=check_options,
    calibrated=calibrated,
    walked=walked,
    steps=steps,
    check=check,
    peak_disk=peak_disk,
    view=open_view,
    default="q4_k_m",
    computed=True,
    statistics=IMATRIX,
    check_imports=("weightsmith.models.gguf_reader",),
    check_statistics=check_imatrix,
    together=together,
)
