"""GGUF files for llama.cpp, made by llama.cpp's own converter and quantizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from toolchain.errors import InputRefused
from toolchain.quantizers.gguf_check import check_file
from toolchain.quantizers.quantizer import Quantizer, QuantizeRequest, Step
from toolchain.values import Format, Json

# Nominal bits per weight of a 7B Llama (tools/quantize/README.md of llama.cpp).
F16 = Format(name="f16", kind="gguf", bits_per_weight=16.0)
Q8_0 = Format(name="q8_0", kind="gguf", bits_per_weight=8.5)
Q5_K_M = Format(name="q5_k_m", kind="gguf", bits_per_weight=5.7)
Q4_K_M = Format(name="q4_k_m", kind="gguf", bits_per_weight=4.9)

_DIRECT = frozenset({F16.name, Q8_0.name})
# What the converter would take from folder names and `_name_or_path`; null leaves it out, so
# the same checkpoint gives the same bytes wherever it lies (gguf-py/gguf/metadata.py).
_FROM_PATHS = ("basename", "finetune", "organization", "version")
_INTERMEDIATE = {"bfloat16": "bf16", "float32": "f32"}


def check_input(config: Mapping[str, Json]) -> None:
    """Refuse what the converter cannot read, from config.json alone."""
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise InputRefused(
            "config.json lacks architectures, by which llama.cpp's converter knows a model",
            hint="add the model class's name, such as LlamaForCausalLM",
        )
    if config.get("is_encoder_decoder"):
        raise InputRefused(
            f"{names[0]} is an encoder with a decoder; only decoders are served here",
            hint="choose a decoder-only model",
        )
    if config.get("quantization_config"):
        method = config["quantization_config"]
        kind = method.get("quant_method", "unknown") if isinstance(method, dict) else "unknown"
        raise InputRefused(
            f"the checkpoint is already quantized ({kind}); quantizing twice loses quality",
            hint="start from the 16-bit checkpoint",
        )


def output_file(request: QuantizeRequest) -> Path:
    """Return where the finished file lies."""
    return request.output / f"{request.name}.gguf"


def steps(request: QuantizeRequest) -> tuple[Step, ...]:
    """Return the converter's command and, for K-quants, the quantizer's.

    K-quants go through a 16-bit file of the checkpoint's own type (float32 for float32), so
    nothing is rounded before it is quantized; `options.threads` changes time, never bytes.
    """
    final = output_file(request)
    if request.format.name in _DIRECT:
        return (_convert(request, final, request.format.name),)
    kind = _INTERMEDIATE.get(_dtype(request.model), "f16")
    middle = request.output / f".{request.name}.{kind}.gguf"
    threads = request.options.get("threads")
    quantize = Step(
        title=f"quantizing to {request.format.name}",
        argv=(
            str(request.tools / "bin" / "llama-quantize"),
            str(middle),
            str(final),
            request.format.name.upper(),
            *((str(threads),) if threads else ()),
        ),
        env={},
        removes=(middle,),
    )
    return _convert(request, middle, kind), quantize


def check(request: QuantizeRequest) -> Mapping[str, Json]:
    """Re-read the finished file against its checkpoint; raises CheckFailed."""
    return check_file(output_file(request), request.model, request.format.name)


def peak_disk(checkpoint_bytes: int, format_: Format) -> int:
    """Return the bytes at the worst moment: the output, and a 16-bit copy for K-quants."""
    output = int(checkpoint_bytes * format_.bits_per_weight / 16 * 1.3)
    return output if format_.name in _DIRECT else checkpoint_bytes + output


def _convert(request: QuantizeRequest, out: Path, kind: str) -> Step:
    converter = request.tools / "convert"
    overrides = request.output / f".{request.name}.metadata.json"
    unset = dict.fromkeys(f"general.{key}" for key in _FROM_PATHS)
    return Step(
        title=f"converting to GGUF ({kind})",
        argv=(
            request.python,
            str(converter / "convert_hf_to_gguf.py"),
            str(request.model),
            *("--outfile", str(out), "--outtype", kind),
            *("--model-name", request.name, "--metadata", str(overrides)),
        ),
        env={
            # Both by name: a safe path keeps the script's own folder out.
            "PYTHONPATH": f"{converter}:{converter / 'gguf-py'}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        },
        writes={overrides: json.dumps({**unset, "general.size_label": None}, sort_keys=True)},
        removes=(overrides,),
    )


def _dtype(model: Path) -> str:
    try:
        config = json.loads((model / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return ""
    text = config.get("text_config") or {}
    dtype = config.get("dtype") or config.get("torch_dtype") or text.get("dtype") or ""
    return str(dtype).removeprefix("torch.")


QUANTIZER = Quantizer(
    name="gguf",
    builder="gguf",
    formats=(F16, Q8_0, Q5_K_M, Q4_K_M),
    recipe_number=1,
    check_input=check_input,
    steps=steps,
    check=check,
    peak_disk=peak_disk,
)
