"""GGUF files for llama.cpp, made by llama.cpp's converter and quantizer."""

from __future__ import annotations

import json
import platform
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from weightsmith.core.cpus import idle
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Format, Json, JsonValue
from weightsmith.models.facts import ModelFacts
from weightsmith.quantizers.checkpoints import check_unpacked
from weightsmith.quantizers.gguf_calibration import check_walk, config_of, window_of
from weightsmith.quantizers.gguf_check import check_files
from weightsmith.quantizers.gguf_projector import (
    ALLOW_TEXT_ONLY,
    PROJECTOR_TYPE,
    TEXT_ONLY,
    check_projector,
    places_of,
)
from weightsmith.quantizers.gguf_settings import ImportanceWalk, PassFile, PassSettings
from weightsmith.quantizers.gguf_types import FILE_TYPES, FORMATS, TENSOR_TYPES
from weightsmith.quantizers.gguf_view import open_view
from weightsmith.quantizers.known import converted_as, gguf_architectures, has_projector
from weightsmith.quantizers.quantizer import BuilderCommand, Quantizer, QuantizeRequest

_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
_READS_HIDDEN = frozenset({"attn_q", "attn_k", "attn_v", "attn_qkv", "ffn_up", "ffn_gate"})
_MAGIC = b"GGUF"
_LONGEST_NAME = 4096
_HINT = "create it with `imatrix: auto`, or with llama-imatrix from this model"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImatrixEntry:
    """One tensor's entry: number of inputs, and how often each of its matrices was used."""

    name: str
    columns: int
    counts: tuple[float, ...]


def check_imatrix(path: Path, model: ModelFacts) -> None:
    """Raise InputRefused unless a file is an importance matrix that matches a config.json.

    Layer count and widths are compared; models of the same shape cannot be distinguished.
    """
    entries = read_imatrix(path)
    blocks = {int(m[1]) + 1 for e in entries if (m := _BLOCK.fullmatch(e.name))}
    if not blocks:
        raise _wrong_model(path, "it has no entries for decoder layers")
    if model.layers not in (0, max(blocks)):
        raise _wrong_model(path, f"it has {max(blocks)} layers, but the model has {model.layers}")
    for entry in entries:
        part = _BLOCK.fullmatch(entry.name)
        if part and part[2] in _READS_HIDDEN and model.hidden not in (0, entry.columns):
            raise _wrong_model(
                path, f"{entry.name} has {entry.columns} columns, not {model.hidden}"
            )


def experts_missed(path: Path) -> list[str]:
    """Return a warning if calibration did not reach some experts."""
    missed = {
        f"layer {part[1]}" if (part := _BLOCK.fullmatch(entry.name)) else entry.name: sum(
            count == 0 for count in entry.counts
        )
        for entry in read_imatrix(path)
        if len(entry.counts) > 1 and 0 in entry.counts
    }
    if not missed:
        return []
    where = ", ".join(f"{name}: {count}" for name, count in list(missed.items())[:8])
    more = ", …" if len(missed) > 8 else ""
    text = (
        f"calibration did not reach {sum(missed.values())} experts ({where}{more}): their "
        "weights are quantized without importance; add more varied calibration text"
    )
    return [text]


def read_imatrix(path: Path) -> list[ImatrixEntry]:
    """Return the entries of a GGUF or `.dat` importance matrix; raises InputRefused."""
    try:
        with path.open("rb") as stream:
            if stream.read(4) == _MAGIC:
                return _of_gguf(path)
            stream.seek(0)
            return list(_of_dat(stream, path.stat().st_size))
    except OSError as error:
        raise InputRefused(
            f"cannot read {path}: {error.strerror}", hint="give an importance matrix file"
        ) from None
    except (ValueError, IndexError, KeyError, TypeError, struct.error, OverflowError) as error:
        raise InputRefused(f"{path} is not an importance matrix: {error}", hint=_HINT) from None


def _of_gguf(path: Path) -> list[ImatrixEntry]:
    # Imported here to keep listing the formats fast.
    from weightsmith.models.gguf_reader import GGUFReader

    reader = GGUFReader(path)
    kind = reader.fields.get("general.type")
    if kind is None or kind.contents() != "imatrix":
        raise ValueError("its general.type is not imatrix")
    tensors: dict[str, Any] = {tensor.name: tensor for tensor in reader.tensors}
    return [
        ImatrixEntry(
            name=name.removesuffix(".in_sum2"),
            columns=int(tensor.shape[0]),
            counts=tuple(
                float(c) for c in tensors[name.removesuffix(".in_sum2") + ".counts"].data.ravel()
            ),
        )
        for name, tensor in tensors.items()
        if name.endswith(".in_sum2")
    ]


def _of_dat(stream: IO[bytes], size: int) -> Iterator[ImatrixEntry]:
    """Read llama.cpp's `--output-format dat`, which has no counts per expert."""
    (number,) = struct.unpack("<i", stream.read(4))
    if number < 1:
        raise ValueError(f"it has {number} entries")
    for _ in range(number):
        (length,) = struct.unpack("<i", stream.read(4))
        if not 0 < length <= _LONGEST_NAME:
            raise ValueError(f"invalid name length {length}")
        name = stream.read(length).decode("utf-8")
        calls, columns = struct.unpack("<ii", stream.read(8))
        if not 0 < 4 * columns <= size - stream.tell():
            raise ValueError(f"{name} has an invalid size")
        stream.seek(4 * columns, 1)
        yield ImatrixEntry(name=name, columns=columns, counts=(float(calls),))


def _wrong_model(path: Path, why: str) -> InputRefused:
    return InputRefused(f"{path} does not match the model: {why}", hint=_HINT)


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


def options_of_model(model: ModelFacts) -> Mapping[str, JsonValue]:
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


def _tensor_types(name: str, types: Mapping[str, JsonValue]) -> dict[str, str]:
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


def calibrated(_format: Format, chosen: Mapping[str, JsonValue]) -> bool:
    """Return whether an importance matrix is computed from calibration text."""
    return chosen.get("imatrix") == "auto" or walked(chosen)


def walked(chosen: Mapping[str, JsonValue]) -> bool:
    """Return whether our own walk over the layers measures importance."""
    return chosen.get("imatrix") == "walk"


def check_options(model: ModelFacts, chosen: Mapping[str, JsonValue]) -> None:
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


def fits_one_pass(
    _format: Format,
    chosen: Mapping[str, JsonValue],
    _other: Format,
    others: Mapping[str, JsonValue],
) -> bool:
    """Return whether one pass over the weights can make another file beside the first.

    Parts depend on the type, and there is one importance matrix.
    """
    return (
        not ("split_max_size" in chosen or "split_max_size" in others)
        and chosen.get("about") == others.get("about")
        and others.get("imatrix") in ("off", chosen.get("imatrix"))
    )


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
    kinds = [FILE_TYPES[each.format.name] for each in (request, *request.siblings)]
    split = str(request.options.get("split_max_size", ""))
    if kinds[0].direct and split:
        return (_convert(request, output_file(request), kinds[0].name, split),)
    files, projectors = tuple(map(_file, (request, *request.siblings))), places_of(request)
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


def peak_disk(
    checkpoint_bytes: int, kept: int, format_: Format, chosen: Mapping[str, JsonValue]
) -> int:
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
    # Of all but very old machines.
    variant = "x86-64-v3" if platform.machine() in {"x86_64", "AMD64"} else "armv8-a"
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
        env={"WEIGHTSMITH_CPU_VARIANT": variant, "LLAMA_ARG_THREADS": str(threads)},
        writes={text: "\n".join(row["text"] for row in rows)},
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
            **(
                {texts: "".join(json.dumps(dict(row)) + "\n" for row in request.texts)}
                if walk
                else {}
            ),
        },
        removes=(settings, overrides, texts, middle, middle.with_name(f"{middle.stem}-*.gguf")),
        reads="the model" if convert else "",
    )


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
    recipe_number=4,
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
    one_pass=fits_one_pass,
)
