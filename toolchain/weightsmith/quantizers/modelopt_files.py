"""ModelOpt's formats and configurations, for the tools that write them.

AWQ is made by our walk (`walked.py`), without zero points. TensorRT-LLM requires of o_proj and
down_proj a `pre_quant_scale`, by which it multiplies inputs, and reads none of matrices that it
fuses (W4A16_AWQ_LinearMethod). The walk moves all factors into norms and weights, so these are 1.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from weightsmith.core.values import Format, JsonValue
from weightsmith.models.tensors import CheckpointTensors, array_type
from weightsmith.quantizers import checkpoints, writing
from weightsmith.quantizers.matrices import Matrix

FP8 = Format(name="fp8-modelopt", kind="modelopt-fp8", bits_per_weight=8.0, instead_of="fp8")
NVFP4 = Format(
    name="nvfp4-modelopt", kind="modelopt-nvfp4", bits_per_weight=4.5, instead_of="nvfp4"
)
AWQ = Format(name="awq-modelopt", kind="modelopt-awq", bits_per_weight=4.25, instead_of="awq")
AWQ_GROUPS = (128, 64)
"""Group sizes of TensorRT-LLM's kernels (fpA_intB_gemm_template.h)."""
GROUP = 16
"""Weights of NVFP4 that share a scale."""


def config(format_: Format, ignored: Sequence[str], group: int = 0) -> dict[str, JsonValue]:
    """Return config.json's quantization_config; `ignored` modules stay in 16 bits.

    ModelOpt leaves AWQ's group size out; it is here for readers of this file alone.
    """
    told: dict[str, JsonValue] = {
        "quant_method": "modelopt",
        "quant_algo": _ALGORITHMS[format_.name],
        "ignore": list(ignored),
        "producer": _PRODUCER,
    }
    if format_ == AWQ:
        return {**told, "group_size": group}
    type_: JsonValue = {"num_bits": 8, "type": "float", "dynamic": False}
    if format_ == NVFP4:
        type_ = {"num_bits": 4, "type": "float", "dynamic": False, "group_size": GROUP}
    group_0: JsonValue = {"targets": ["Linear"], "weights": type_, "input_activations": type_}
    return {**told, "config_groups": {"group_0": group_0}}


_ALGORITHMS = {FP8.name: "FP8", NVFP4.name: "NVFP4", AWQ.name: "W4A16_AWQ"}
_PRODUCER: Mapping[str, JsonValue] = {"name": "modelopt", "version": "weightsmith"}
"""Readers look for that name, which stands for the layout."""


def hf_quant_config(
    format_: Format, ignored: Sequence[str], group: int = 0
) -> dict[str, JsonValue]:
    """Return hf_quant_config.json, from which TensorRT-LLM knows how a checkpoint is quantized."""
    told: dict[str, JsonValue] = {
        "quant_algo": _ALGORITHMS[format_.name], "kv_cache_quant_algo": None,
        "exclude_modules": list(ignored),
    }  # fmt: skip
    if format_ == NVFP4:
        told["group_size"] = GROUP
    if format_ == AWQ:
        told |= {"group_size": group, "has_zero_point": False, "pre_quant_scale": True}
    return {"producer": _PRODUCER, "quantization": told}


def write_companions(
    format_: Format, model: Path, out: Path, ignored: Sequence[str], group: int = 0
) -> None:
    """Copy tokenizer and template, and write both configurations."""
    checkpoints.write_companions(model, out, config(format_, ignored, group))
    text = json.dumps(hf_quant_config(format_, ignored, group), indent=2, sort_keys=True) + "\n"
    (out / "hf_quant_config.json").write_text(text, encoding="utf-8")


def factors_of_inputs(
    source: CheckpointTensors, found: Sequence[Matrix]
) -> list[writing.TensorGroup]:
    """Return the work for AWQ's factors of inputs, all 1, in the matrices' own type."""
    return [
        writing.whole(name, dtype, shape, partial(np.ones, shape, array_type(dtype)))
        for matrix in found
        if matrix.module.endswith(_NOT_FUSED)
        for name, dtype, shape in [
            (f"{matrix.module}.pre_quant_scale", source.info(matrix.tensor).dtype, (matrix.inputs,))
        ]
    ]


_NOT_FUSED = (".o_proj", ".down_proj")
"""The matrices that TensorRT-LLM loads each by itself."""
