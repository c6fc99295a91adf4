"""What all quantizers of checkpoints share: what they refuse, and how a finished folder looks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from weightsmith.checkpoints.facts import ModelFacts
from weightsmith.errors import InputRefused, UsageError
from weightsmith.foreign import read_json
from weightsmith.quantizers.packed import PARTS
from weightsmith.quantizers.tensors import Output, Tensors, array_type, write_checkpoint
from weightsmith.values import Format, Json

GROUP_SIZES = (128, 64, 32)
"""Inputs that may share a scale, the best known first: what vLLM's kernels have for 4 bits."""
LINEAR = re.compile(r"\.layers\.\d+\..*_proj\.weight$")
"""The matrices that are quantized: those of the decoder's layers."""
LLAMAS = frozenset(
    {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
)
"""Architectures of Llama's kind, which every engine here knows."""
DENSE = LLAMAS | {
    "Cohere2ForCausalLM", "Exaone4ForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM",
    "GemmaForCausalLM", "GraniteForCausalLM", "HunYuanDenseV1ForCausalLM", "Olmo2ForCausalLM",
    "Olmo3ForCausalLM", "SeedOssForCausalLM", "SmolLM3ForCausalLM",
}  # fmt: skip
"""Dense decoders whose layers hold nothing but `*_proj` matrices, one for each of a server's parts,
norms and biases: each matrix is rounded by itself. vLLM's log-probabilities of each were held
against ours."""

_SCALES = 1.02
"""What a format's nominal bits leave out: scales of narrow rows and small groups, and headers."""

_ENGINE = 1.02
"""What an engine writes besides: its own tokenizer, zero points, groups of fewer than 128."""

# Not weights: beside them in the finished folder, byte for byte as they were.
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_NOT_COPIED = ("config.json", "model.safetensors.index.json")


def check_config(model: ModelFacts, known: Collection[str]) -> None:
    """Refuse, from config.json alone, what a quantizer of these architectures cannot make."""
    if not model.architecture:
        raise InputRefused(
            "config.json lacks architectures, by which quantizers know a model",
            hint="add the model class's name, such as LlamaForCausalLM",
        )
    check_unpacked(model)
    if model.architecture not in known:
        raise InputRefused(
            f"{model.architecture} is not among the architectures that are quantized here with"
            f" every layer accounted for: {', '.join(sorted(known))}",
            hint="serve it in 16 bits (target vllm), or as GGUF",
        )


def check_unpacked(model: ModelFacts) -> None:
    """Refuse a checkpoint whose weights are packed."""
    if model.packing:
        kind = model.packing.method or "unknown"
        raise InputRefused(
            f"the checkpoint is already quantized ({kind}); quantizing twice loses quality",
            hint="start from the 16-bit checkpoint",
        )


def check_grouped(model: ModelFacts, known: Collection[str]) -> None:
    """Refuse, besides, a model whose rows no group size divides."""
    check_config(model, known)
    group_size(model, "auto")


def check_group(model: ModelFacts, options: Mapping[str, Json]) -> None:
    """Refuse a wanted group size that does not divide every row."""
    group_size(model, options.get("group_size"))


def group_size(model: ModelFacts, wanted: Json) -> int:
    """Return the group size: the wanted one, or the largest that divides every row.

    Raises InputRefused, with the row and the sizes that would do, where it does not divide.
    """
    rows = row_lengths(model)
    fitting = [size for size in GROUP_SIZES if all(row % size == 0 for row in rows.values())]
    if wanted in {None, "", "auto", 0} and fitting:
        return fitting[0]
    if wanted in fitting:
        return int(wanted)
    tried = GROUP_SIZES[-1] if wanted in {None, "", "auto", 0} else int(wanted)
    name, row = (
        next((n, r) for n, r in rows.items() if r % tried)
        if any(r % tried for r in rows.values())
        else ("every matrix", tried)
    )
    raise InputRefused(
        f"a group of {tried} inputs does not divide the {row} inputs of {name}"
        if row % tried
        else f"no engine here reads groups of {tried} inputs",
        hint=f"choose --group-size {' or '.join(map(str, fitting))}"
        if fitting
        else "serve it in 16 bits, or as fp8 or w8a8, whose scales are per row",
    )


def row_lengths(model: ModelFacts) -> dict[str, int]:
    """Return the number of inputs of each kind of matrix."""
    shape = model.shape
    return {
        "q_proj, k_proj, v_proj, gate_proj and up_proj": shape.hidden,
        "o_proj": shape.heads * shape.head_dim,
        "down_proj": shape.intermediate,
    }


def group_option(wanted: Mapping[str, Json]) -> Json:
    """Return `quantize.group_size` of a recipe; UsageError for what is no group size."""
    size = wanted.get("group_size") or "auto"
    if size != "auto" and size not in GROUP_SIZES:
        raise UsageError(
            f"group_size {size!r} is none that the engines read",
            hint=f"auto, or one of {', '.join(map(str, GROUP_SIZES))}",
        )
    return size


def zero_point_option(format_: Format, wanted: Mapping[str, Json]) -> None:
    """Raise UsageError for AWQ's own layout without zero points, which no server's kernel reads.

    vLLM 0.33 and SGLang 0.5 know 4 bits without a zero only with an offset of eight (`uint4b8`),
    which that layout has not (query_marlin_supported_quant_types).
    """
    if wanted.get("zero_point", True) is False:
        raise UsageError(
            f"{format_.name} has zero points: servers read its layout with them alone",
            hint="leave zero_point out; or choose gptq, which is symmetric, or awq-compressed, "
            "which can be",
        )


def output_bytes(checkpoint_bytes: int, kept: int, format_: Format) -> int:
    """Return the bytes of the finished folder; embeddings and head, the `kept`, are as before."""
    return kept + int((checkpoint_bytes - kept) * format_.bits_per_weight / 16 * _SCALES)


def peak_disk(checkpoint_bytes: int, kept: int, format_: Format) -> int:
    """Return the bytes at the worst moment: what the engine writes, and the finished folder.

    On a CPU engines compute in float32, and write what they do not quantize so.
    """
    return int((2 * output_bytes(checkpoint_bytes, kept, format_) + kept) * _ENGINE)


def finish(
    model: Path,
    raw: Path,
    out: Path,
    quantization: Mapping[str, Json],
) -> None:
    """Write the finished checkpoint from what an engine saved, and nothing else of it.

    Tokenizer, template and configuration are the checkpoint's own, byte for byte: engines rewrite
    them in forms that servers cannot read. What is not quantized has the checkpoint's type; what
    the engine left unchanged has its very bytes.
    """
    made, source = Tensors(raw), Tensors(model)
    outputs = []
    for name in sorted(made.names):
        info = made.info(name)
        if name.endswith(PARTS) or f"{name}_scale" in made.names:
            outputs.append(Output(name, info.dtype, info.shape, partial(made.array, name)))
        elif name in source.names:
            own = source.info(name)
            make = partial(_as_before, made, source, name)
            outputs.append(Output(name, own.dtype, own.shape, make))
    write_checkpoint(out, outputs)
    write_companions(model, out, quantization)


def write_companions(model: Path, out: Path, quantization: Mapping[str, Json]) -> None:
    """Copy tokenizer and template, and write config.json with its quantization."""
    for pattern in _COMPANIONS:
        for file in sorted(model.glob(pattern)):
            if file.name not in _NOT_COPIED:
                shutil.copyfile(file, out / file.name)
    config = read_json(model / "config.json")
    config["quantization_config"] = dict(quantization)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def _as_before(made: Tensors, source: Tensors, name: str) -> Any:
    """Return a tensor in the checkpoint's type; engines compute in wider ones."""
    wanted = array_type(source.info(name).dtype)
    return made.array(name).astype(wanted)


def awq_config(group: int, kept: Sequence[str] = ()) -> dict[str, Json]:
    """Return the quantization_config of AutoAWQ's GEMM layout, as its readers know it."""
    return {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group,
        "zero_point": True, "modules_to_not_convert": list(kept) or None,
    }  # fmt: skip
