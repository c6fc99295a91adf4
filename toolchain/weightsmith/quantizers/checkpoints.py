"""Shared by all quantizers of checkpoints: checks, what stays in 16 bits, the finished folder.

Tools save tokenizers and configurations in the format of their transformers version, with paths and
times, and sometimes float32 tensors. So only the packed tensors are kept; others get the
checkpoint's type, and tokenizer and template are copied byte for byte: servers with older libraries
can read them.

Matrices are kept in 16 bits by suffix, and fused ones together: engines fuse Q, K and V, and gate
and up, and do not start with a checkpoint that keeps part of a group in 16 bits.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.safe_parse import read_json
from weightsmith.core.trees import remove
from weightsmith.core.values import PACKED, Format, JsonValue
from weightsmith.models.facts import ModelFacts, read_facts
from weightsmith.models.task import is_of_sentences
from weightsmith.models.tensors import CheckpointTensors, array_type
from weightsmith.quantizers.architectures import (
    JOINED,
    LLAMA4,
    ROUNDED,
    SCANNING,
    STACKED_MXFP4,
    what_works,
)
from weightsmith.quantizers.matrices import FUSED, Matrix
from weightsmith.quantizers.packed import PARTS, PackedLayout
from weightsmith.quantizers.quantizer import BuilderCommand, Options, QuantizeRequest
from weightsmith.quantizers.running import python_step
from weightsmith.quantizers.schemes import Scheme
from weightsmith.quantizers.writing import TensorGroup, copied, whole, write_checkpoint

GROUP_SIZES = (128, 64, 32)
"""Group sizes of vLLM's 4-bit kernels, in order of preference."""
_GROUPED = frozenset({"awq", "gptq", "modelopt-awq", "compressed-tensors"})
"""Kinds of Format whose integers of fewer than eight bits have groups of a size to choose."""
LINEAR = re.compile(r"\.layers\.\d+\..*_proj\.weight$")
"""The quantized matrices: those of the decoder layers."""
_FUSED = {name: FUSED[name] for name in ("qkv_proj", "gate_up_proj")}
MATRICES = (*_FUSED["qkv_proj"], "o_proj", *_FUSED["gate_up_proj"], "down_proj")
_NEVER_QUANTIZED = "lm_head"
"""Listing it has no effect."""

_CACHE_SCHEME: Mapping[str, JsonValue] = {
    "num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False,
}  # fmt: skip
_UNPACKED: Mapping[str, JsonValue] = {
    "quant_method": "compressed-tensors", "format": "dense", "quantization_status": "compressed",
    "config_groups": {}, "ignore": [],
}  # fmt: skip
"""For a checkpoint whose weights have 16 bits."""

_SCALES = 1.02
"""Overhead over a format's nominal bits: scales of narrow rows and small groups, and headers."""

_ENGINE = 1.02
"""Overhead of an engine's output: tokenizer, zero points, groups smaller than 128."""

_MOST_NAMED = 20
"""Architectures in an error message."""

# Files other than weights, copied unchanged to the finished folder.
_COMPANIONS = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_NOT_COPIED = ("config.json", "model.safetensors.index.json")


def check_config(model: ModelFacts, known: Collection[str]) -> None:
    """Refuse models that a quantizer of these architectures cannot quantize, by config.json."""
    check_plain(model)
    if model.architecture not in known:
        names = ", ".join(sorted(known))
        if len(known) > _MOST_NAMED:
            names = f"{len(known)} others: see docs/reference/architectures.md"
        raise InputRefused(
            f"unsupported architecture {model.architecture}; supported are {names}",
            hint=what_works(model),
        )


def check_plain(model: ModelFacts) -> None:
    """Refuse a checkpoint that names no architecture, or whose weights are packed."""
    if not model.architecture:
        raise InputRefused(
            "config.json has no architectures",
            hint="add the model class's name, such as LlamaForCausalLM",
        )
    if model.packing:
        kind = model.packing.method or "unknown"
        raise InputRefused(
            f"the checkpoint is already quantized ({kind})",
            hint="start from the 16-bit checkpoint",
        )


def not_finite(tensor: str) -> InputRefused:
    """Return the refusal of a tensor that cannot be rounded."""
    return InputRefused(
        f"{tensor} has NaN or infinite weights",
        hint="check the base and the adapters: `weightsmith validate` compares them",
    )


def check_grouped(model: ModelFacts, known: Collection[str]) -> None:
    """Like `check_config`, and refuse a model whose rows no group size divides."""
    check_config(model, known)
    group_size(model, "auto")


def check_group(model: ModelFacts, options: Options) -> None:
    """Refuse a requested group size that does not divide every row."""
    if "group_size" in options:
        group_size(model, options["group_size"])


def group_size(model: ModelFacts, requested: JsonValue) -> int:
    """Return the requested group size, or the largest that divides every row.

    Raises InputRefused with the row and the possible sizes if it does not divide a row.
    """
    rows = row_lengths(model)
    fitting = [size for size in GROUP_SIZES if all(row % size == 0 for row in rows.values())]
    if requested in {None, "", "auto", 0}:
        size = fitting[0] if fitting else GROUP_SIZES[-1]
    else:
        size = int(str(requested))
    if size in fitting:
        return size
    odd = [(name, row) for name, row in rows.items() if row % size]
    raise InputRefused(
        f"group size {size} does not divide the {odd[0][1]} inputs of {odd[0][0]}"
        if odd
        else f"no engine supports group size {size}",
        hint=f"choose --group-size {' or '.join(map(str, fitting))}"
        if fitting
        else "serve it in 16 bits, or as fp8 or w8a8, which have a scale per row",
    )


def inputs_per_scale(format_: Format, model: ModelFacts, requested: JsonValue) -> int:
    """Return the inputs per scale that a format's integers will have, of a requested group size.

    0 for formats without a choice, and for weights that are packed already. Raises InputRefused as
    `group_size` does.
    """
    grouped = format_.kind in _GROUPED and format_.bits_per_weight < 8
    return group_size(model, requested) if grouped and not model.packing else 0


def in_groups_of(format_: Format, model: ModelFacts, options: Options) -> Format:
    """Return a format with the bits of its scales, which its nominal bits have per 128 weights.

    Raises InputRefused as `group_size` does.
    """
    if "group_size" not in options:
        return format_
    codes = math.floor(format_.bits_per_weight)
    scales = 128 * (format_.bits_per_weight - codes) / group_size(model, options["group_size"])
    return replace(format_, bits_per_weight=codes + scales)


def in_groups(request: QuantizeRequest) -> PackedLayout:
    """Return the layout of 4-bit integers with a scale per group: `awq` not symmetric.

    Experts always have the tool's own layout: vLLM's kernel for CPUs takes no other one with zero
    points (0.33, layers/fused_moe/experts/cpu_moe.py CPUExpertsInt4._supports_quant_scheme).
    Raises InputRefused as `group_size` does.
    """
    model, method = read_facts(request.model), request.format.kind
    return PackedLayout(
        method=method if model.matrices.experts else request.format.layout or method,
        bits=4,
        group_size=group_size(model, request.options.get("group_size")),
        symmetric=method != "awq",
    )


def grouped_step(module: str, request: QuantizeRequest, title: str) -> tuple[BuilderCommand]:
    """Return the step that runs `module` offline for a format with groups."""
    layout, method = in_groups(request), request.format.kind
    return python_step(
        module,
        request,
        title,
        method=method,
        packed=layout.method == PACKED,
        group_size=layout.group_size,
        scaled=bool(request.options.get("scaled", True)),
    )


def refuse_scales(format_: Format, _chosen: Options) -> Options:
    """Raise UsageError for unmerged adapters beside AWQ by another tool.

    It divides what a norm gives by scales and multiplies the next matrix with them; an adapter of
    that matrix was trained on inputs without scales.
    """
    raise UsageError(
        f"{format_.name} moves scales from each matrix into what comes before it, so that unmerged"
        " adapters would get other inputs than they were trained with",
        hint="choose awq, whose base for adapters is made without such scales, gptq or fp8; or"
        " merge the adapters",
    )


def row_lengths(model: ModelFacts) -> dict[str, int]:
    """Return the number of inputs for each kind of matrix."""
    shape, more = model.shape, model.matrices
    found = {
        "q_proj, k_proj, v_proj, gate_proj and up_proj": shape.hidden,
        "o_proj": shape.heads * (shape.v_head_dim or shape.head_dim),
    }
    if not more.experts or more.sparse_layers < shape.layers:
        found["down_proj"] = shape.intermediate
    if more.experts:
        found["an expert's down_proj"] = more.expert_width or shape.intermediate
    if more.shared_width:
        found["the shared expert's down_proj"] = more.shared_width
    return found


def group_option(requested: Options) -> JsonValue:
    """Return `quantize.group_size` of a recipe; raise UsageError if it is invalid."""
    size = requested.get("group_size") or "auto"
    if size != "auto" and size not in GROUP_SIZES:
        raise UsageError(
            f"unsupported group_size {size!r}",
            hint=f"use auto, or one of {', '.join(map(str, GROUP_SIZES))}",
        )
    return size


def group_options(format_: Format, requested: Options) -> Options:
    """Return the recipe's options that affect a format with groups; raise UsageError."""
    if format_.kind == "awq":
        zero_point_option(format_, requested)
    return {"group_size": group_option(requested), "keep": keep_option(requested)}


def zero_point_option(format_: Format, requested: Options) -> None:
    """Raise UsageError for AWQ without zero points, which AutoAWQ's layout cannot say.

    vLLM 0.33 and SGLang 0.5 support 4 bits without a zero point only with an offset of eight
    (`uint4b8`), which that layout does not have (query_marlin_supported_quant_types).
    """
    if requested.get("zero_point", True) is False:
        raise UsageError(
            f"zero_point: false is not supported by {format_.name}: its groups have zero points",
            hint="remove zero_point; or use gptq, which is symmetric, or awq-compressed, which "
            "can be",
        )


def output_bytes(checkpoint_bytes: int, kept: int, format_: Format) -> int:
    """Return the bytes of the finished folder; `kept` bytes (embeddings, head) are unchanged."""
    return kept + int((checkpoint_bytes - kept) * format_.bits_per_weight / 16 * _SCALES)


def peak_disk(checkpoint_bytes: int, kept: int, format_: Format, _options: Options) -> int:
    """Return the peak disk usage in bytes: the engine's output, and the finished folder.

    On a CPU engines compute in float32, and write unquantized tensors in it.
    """
    return int((2 * output_bytes(checkpoint_bytes, kept, format_) + kept) * _ENGINE)


def finish(model: Path, raw: Path, out: Path, quantization: Mapping[str, JsonValue]) -> None:
    """Write the finished checkpoint from an engine's output.

    Tokenizer, template and configuration are copied from the checkpoint, because engines rewrite
    them in forms that servers cannot read. Unquantized tensors get the checkpoint's dtype, so those
    that the engine did not change equal the checkpoint's. The engine's output is deleted.
    """
    made, source = CheckpointTensors(raw), CheckpointTensors(model)
    works: list[TensorGroup] = []

    def in_original_dtype(name: str) -> np.ndarray:
        return made.array(name).astype(array_type(source.info(name).dtype))

    for name in sorted(made.names):
        if name.endswith(PARTS) or f"{name}_scale" in made.names:
            works.append(copied(made, name))
        elif name in source.names:
            own = source.info(name)
            works.append(whole(name, own.dtype, own.shape, partial(in_original_dtype, name)))
    write_checkpoint(out, works)
    write_companions(model, out, quantization)
    remove(raw)


def write_companions(model: Path, out: Path, quantization: Mapping[str, JsonValue]) -> None:
    """Copy tokenizer and template, and write config.json with `quantization_config`."""
    for pattern in _COMPANIONS:
        for file in sorted(model.glob(pattern)):
            if file.name not in _NOT_COPIED:
                shutil.copyfile(file, out / file.name)
    for file in sorted(model.glob("*/*")):
        if is_of_sentences(name := file.relative_to(model).as_posix()):
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file, out / name)
    config = read_json(model / "config.json")
    config["quantization_config"] = dict(quantization)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def with_cache_scheme(config: Mapping[str, JsonValue]) -> dict[str, JsonValue]:
    """Return a configuration that says that the checkpoint has scales of an 8-bit KV cache.

    As compressed-tensors says it, and vLLM reads it (CompressedTensorsKVCacheMethod).
    """
    told = config.get("quantization_config")
    weights = told if isinstance(told, Mapping) and told else _UNPACKED
    return {**config, "quantization_config": {**weights, "kv_cache_scheme": _CACHE_SCHEME}}


def grouped_config(
    method: str, group: int, keep: Sequence[str] = (), kept: Sequence[str] = ()
) -> dict[str, JsonValue]:
    """Return the quantization_config of AutoAWQ's GEMM layout, or of GPTQ's first layout.

    `kept` are all modules that stay in 16 bits, by `keep` or for other reasons.
    """
    if method == "awq":
        return {
            "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": group,
            "zero_point": True, "modules_to_not_convert": list(kept) or None,
        }  # fmt: skip
    found: dict[str, JsonValue] = {
        "quant_method": "gptq", "bits": 4, "group_size": group, "sym": True,
        "desc_act": False, "lm_head": False, "checkpoint_format": "gptq",
    }  # fmt: skip
    if kept:  # vLLM and SGLang read the first, TGI the second
        found["dynamic"] = negative_patterns([*keep, *(n for n in kept if not is_kept(n, keep))])
        found["modules_to_not_convert"] = list(kept)
    return found


def integers_config(
    bits: int, group: int, kept: Sequence[str], *, symmetric: bool = True
) -> dict[str, JsonValue]:
    """Return the quantization_config of compressed-tensors' integers in groups.

    `kept` are the modules that stay in 16 bits.
    """
    weights: dict[str, JsonValue] = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False,
        "strategy": "group", "group_size": group,
    }  # fmt: skip
    layout: dict[str, JsonValue] = {"format": PACKED}
    group_0 = {**layout, "targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        **layout,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group_0},
        "ignore": ["lm_head", *kept],
    }


def keep_option(requested: Options) -> list[str]:
    """Return `quantize.keep` of a recipe, sorted.

    Raises UsageError for unknown matrices, for only some of the matrices that engines fuse, and if
    nothing would be quantized.
    """
    keep = sorted(_listed(requested.get("keep")) - {_NEVER_QUANTIZED})
    for end in keep:
        stem, _, name = end.rpartition(".")
        if name not in MATRICES:
            raise UsageError(
                f"keep: {end!r} is not the suffix of a matrix name",
                hint=f"use {', '.join(MATRICES)}, or e.g. layers.0.mlp.down_proj",
            )
        for fused in _FUSED.values():
            missing = [s for s in fused if name in fused and f"{stem}.{s}".lstrip(".") not in keep]
            if missing:
                raise UsageError(
                    f"keep: engines fuse {', '.join(fused)}, so they must have the same type; "
                    f"{end} is listed without {', '.join(missing)}",
                    hint="list all of them, or none",
                )
    if set(MATRICES) <= set(keep):
        raise UsageError(
            "keep lists every matrix: nothing would be quantized",
            hint="list fewer, or serve the model in 16 bits",
        )
    return keep


def kept_modules(model: Path, keep: Sequence[str]) -> list[str]:
    """Return a checkpoint's modules that match `keep`, sorted."""
    linear = (n.removesuffix(".weight") for n in CheckpointTensors(model).names if LINEAR.search(n))
    return sorted(module for module in linear if is_kept(module, keep))


def without_kept(known: Sequence[Matrix], keep: Sequence[str]) -> list[Matrix]:
    """Return the matrices of a checkpoint that are quantized.

    Raises InputRefused for names in `keep` that match nothing, and if nothing is left.
    """
    for end in keep:
        if not any(is_kept(matrix.module, [end]) for matrix in known):
            raise InputRefused(
                f"keep: no matrix has a name that ends in {end!r}",
                hint=f"remove it; the names are like {known[-1].module if known else ''}",
            )
    found = [matrix for matrix in known if not is_kept(matrix.module, keep)]
    if not found:
        raise InputRefused(
            "keep lists every matrix of the model: nothing would be quantized"
            if known
            else "no tensor of the checkpoint is a matrix of a decoder layer",
            hint="list fewer, or serve the model in 16 bits",
        )
    return found


def is_kept(module: str, keep: Iterable[str]) -> bool:
    """Return whether a module's name has a suffix in `keep`, at a dot."""
    return any(module == end or module.endswith(f".{end}") for end in keep)


def negative_patterns(keep: Sequence[str]) -> dict[str, JsonValue]:
    """Return GPTQ's `dynamic`: regular expressions for the modules that are not quantized.

    Engines match the names of fused matrices, so these have their own expressions.
    """
    ends = set(keep)
    for end in keep:
        stem, _, name = end.rpartition(".")
        for fused, parts in _FUSED.items():
            if name in parts:
                ends.add(f"{stem}.{fused}".lstrip("."))
    return {rf"-:(.*\.)?{re.escape(end)}$": {} for end in sorted(ends)}


_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_QKV = frozenset({"q_proj", "k_proj", "v_proj"})
_GATED = frozenset({"gate_proj", "up_proj"})
_LACKED = {
    **dict.fromkeys(JOINED, (_QKV | _GATED, "joins Q, K and V, and gate and up")),
    **dict.fromkeys(("GlmForCausalLM", "Glm4ForCausalLM"), (_GATED, "joins gate and up")),
    **dict.fromkeys(
        ("ApertusForCausalLM", "ArceeForCausalLM", "Jais2ForCausalLM", "NemotronForCausalLM"),
        (frozenset({"gate_proj"}), "has no gate"),
    ),
    "Lfm2ForCausalLM": (
        _GATED | {"down_proj", "o_proj"},
        "has w1, w3, w2 and out_proj instead",
    ),
}
"""Architecture -> matrices of other decoders that its layers lack, and why."""
_MLP = ("gate_proj", "up_proj", "down_proj")


def check_rounded(scheme: Scheme, model: ModelFacts) -> None:
    """Refuse an architecture that is not known, and rows or outputs that tiles do not divide."""
    check_config(model, ROUNDED)
    if model.architecture in STACKED_MXFP4 and scheme.format.name != "mxfp4a16":
        raise InputRefused(
            f"vLLM loads the experts of {model.architecture} in MXFP4 only, not in"
            f" {scheme.format.name}",
            hint=what_works(model),
        )
    height, width = scheme.tile
    if height > 1 and model.architecture in LLAMA4:
        # vLLM 0.33, models/llama4.py permute_qk_weight_for_rotary
        raise InputRefused(
            f"vLLM cannot load {scheme.format.name} weights of {model.architecture}: it reorders"
            " the rows of Q and K, and a block has one scale for several rows",
            hint="choose fp8, which has a scale per row",
        )
    if height > 1 and model.architecture in SCANNING:
        # vLLM 0.33, layers/mamba/mamba_mixer2.py
        raise InputRefused(
            f"{scheme.format.name} has blocks of rows, and vLLM splits {model.architecture}'s"
            " mamba.in_proj inside them",
            hint="choose fp8, which has a scale per row",
        )
    for name, outputs, inputs in dimensions(model):
        if scheme.whole_tiles and inputs % width:
            raise InputRefused(
                f"{scheme.format.name} has a scale per {width} inputs, and {name} has {inputs}",
                hint="choose fp8 or w8a8, which have a scale per row",
            )
        if height > 1 and outputs % height:
            raise InputRefused(
                f"{scheme.format.name} has blocks of {height} outputs, and {name}, which engines"
                f" fuse with others, has {outputs}",
                hint="choose fp8, which has a scale per row",
            )


def dimensions(model: ModelFacts) -> Iterator[tuple[str, int, int]]:
    """Yield name, outputs and inputs of matrices; 0 outputs where nothing is fused behind them."""
    shape, more = model.shape, model.matrices
    if shape.kv_lora_rank:
        yield "o_proj", 0, shape.heads * (shape.v_head_dim or shape.head_dim)
    else:
        yield "q_proj", shape.heads * shape.head_dim, shape.hidden
        yield "k_proj", shape.kv_heads * shape.head_dim, shape.hidden
        yield "o_proj", 0, shape.heads * shape.head_dim
    if more.sparse_layers < shape.layers:
        yield "gate_proj", shape.intermediate, shape.hidden
        yield "down_proj", 0, shape.intermediate
    if more.experts:
        width = more.expert_width or shape.intermediate
        yield "an expert's gate_proj", width, shape.hidden
        yield "an expert's down_proj", 0, width
    if more.shared_width:
        yield "the shared expert's gate_proj", more.shared_width, shape.hidden
        yield "the shared expert's down_proj", 0, more.shared_width


def check_kept(model: ModelFacts, chosen: Options) -> None:
    """Refuse names that a model lacks, and to keep only some matrices of a layer's experts."""
    keep = _listed(chosen.get("keep"))
    if not keep:
        return
    layers = model.shape.layers
    lacked, why = _LACKED.get(model.architecture, (frozenset(), ""))
    if model.shape.kv_lora_rank:
        lacked, why = _QKV, "makes Q, K and V in several steps"
    for end in sorted(keep):
        layer = _LAYER.search(end)
        if layer and layers and int(layer[1]) >= layers:
            raise InputRefused(
                f"keep: no matrix has a name that ends in {end!r}: the model has {layers} layers",
                hint=f"name a layer from 0 to {layers - 1}",
            )
        if end.rpartition(".")[2] in lacked:
            others = "" if "o_proj" in lacked else "; o_proj and down_proj can be kept"
            raise InputRefused(
                f"keep: no matrix has a name that ends in {end!r}: {model.architecture} {why}",
                hint=f"remove it, and what engines fuse with it{others}",
            )
    if model.architecture in STACKED_MXFP4:
        raise InputRefused(
            f"keep: vLLM loads all experts of {model.architecture} in MXFP4, and attention is never"
            " quantized",
            hint="remove keep",
        )
    for end in sorted(keep) if model.matrices.experts else ():
        stem, _, name = end.rpartition(".")
        if "shared" in stem:
            continue
        # Engines fuse all of a layer's experts into two matrices.
        missing = [p for p in _MLP if name in _MLP and f"{stem}.{p}".lstrip(".") not in keep]
        parts = stem.split(".")
        if missing or "experts" in parts or parts[-1].isdigit():  # a number: of one expert
            raise InputRefused(
                f"keep: {end!r} would leave some of a layer's experts in 16 bits, and engines"
                " load either all or none",
                hint="list gate_proj, up_proj and down_proj of the same layers, or none of them",
            )


def _listed(keep: JsonValue) -> set[str]:
    return {*map(str, keep)} if isinstance(keep, Sequence) else set()
