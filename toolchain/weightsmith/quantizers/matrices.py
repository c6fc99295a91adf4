"""The matrices of a checkpoint that are quantized, by the names under which engines read them.

One rule for all architectures: in a decoder's layers, every two-dimensional `*_proj` is quantized.
It is applied only to architectures in `vllm_architectures.json`, where a test quantizes a small
model of each: elsewhere a matrix with another name would silently stay in 16 bits. Routers, gates
of shared experts and the small projections of latent attention keep 16 bits: they decide more than
they weigh.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from weightsmith.models.facts import read_facts
from weightsmith.models.tensors import CheckpointTensors, widened
from weightsmith.quantizers.architectures import STACKED_MXFP4

Floats: TypeAlias = npt.NDArray[np.float32]
_LAYER = re.compile(
    r"(?P<block>(?:model|language_model\.model|model\.(?:language|text)_model)"
    r"\.layers\.(?P<layer>\d+)\..*)"
)
"""A tensor of the language model; towers for pictures and sound have other names."""
_PLAIN = re.compile(
    r"(?P<parent>.+)\.(?P<name>\w+_proj|w[123]|(?<=shared_mlp\.)(?:in|out)put_linear)\.weight"
)
_STACKED = re.compile(
    r"(?P<parent>.+\.(?:experts|block_sparse_moe))"
    r"\.(?P<name>gate_up_proj|down_proj|input_linear\.weight|output_linear\.weight)"
)
"""All experts of a layer as one tensor."""
_TRANSPOSED = STACKED_MXFP4 | {"Llama4ForCausalLM", "Llama4ForConditionalGeneration"}
"""Architectures whose stacked experts are [experts, inputs, outputs]."""
_EITHER = frozenset({"Qwen3VLMoeForConditionalGeneration"})
"""Those of which published files have them so, and files that transformers 5 saves have not.

Transformers turns what does not fit (`Transpose(check_dims=True)` in its conversion_mapping.py).
"""
_LATENT = frozenset({"q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj"})
"""Of latent attention: small, and vLLM fuses the first two, of which one is no multiple of 128."""
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "w13": ("w1", "w3"),
}
"""Matrices that engines fuse into one of a single type (packed_modules_mapping of vLLM)."""
_PART_OF = {part: whole for whole, parts in FUSED.items() for part in parts}


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A matrix [outputs, inputs] of the checkpoint, which may be a part of a stacked tensor."""

    module: str
    """Its name in the quantized checkpoint, without `.weight`."""
    tensor: str
    """The tensor that it comes from."""
    outputs: int
    inputs: int
    expert: int = -1
    """Its place in a stacked tensor; -1 for a tensor of its own."""
    first: int = 0
    """The first of its outputs in a stacked tensor."""
    transposed: bool = False

    @property
    def fused(self) -> str:
        """The same for all matrices that engines fuse into one."""
        parent, _, name = self.module.rpartition(".")
        return f"{parent}.{_PART_OF.get(name, name)}"

    def rows(self, source: CheckpointTensors, start: int, stop: int) -> Floats:
        """Return some of its outputs as float32 [stop - start, inputs]."""
        return widened(self.stored(source, start, stop))

    def stored(self, source: CheckpointTensors, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Return some of its outputs in the tensor's own type: [stop - start, inputs]."""
        span = slice(self.first + start, self.first + stop)
        if self.expert < 0:
            return source.array(self.tensor, (span,))
        if not self.transposed:
            return source.array(self.tensor, (self.expert, span))
        return np.ascontiguousarray(source.array(self.tensor, (self.expert, slice(None), span)).T)


def matrices(source: CheckpointTensors, model: Path) -> tuple[Matrix, ...]:
    """Return all matrices of the language model's layers, sorted by module.

    Not among them are routers, gates of shared experts, the projections of latent attention, layers
    that predict further tokens, embeddings and the head.
    """
    facts, found = read_facts(model), list[Matrix]()
    # Of these, only experts are quantized, whose gate and up alternate.
    whole = facts.architecture in STACKED_MXFP4
    for name in source.names:
        match, shape = _LAYER.fullmatch(name), source.info(name).shape
        if not match or (facts.layers and int(match["layer"]) >= facts.layers):
            continue
        plain, stacked = _PLAIN.fullmatch(name), _STACKED.fullmatch(name)
        if plain and len(shape) == 2 and plain["name"] not in _LATENT and not whole:
            module = name.removesuffix(".weight")
            found.append(Matrix(module=module, tensor=name, outputs=shape[0], inputs=shape[1]))
        if not stacked or len(shape) != 3:
            continue
        turned = False  # whether it is [experts, inputs, outputs]
        if stacked["name"] in {"gate_up_proj", "down_proj"}:
            turned = facts.architecture in _TRANSPOSED
            if facts.architecture in _EITHER:
                turned = shape[2 if stacked["name"] == "gate_up_proj" else 1] != facts.hidden
        count, outputs, inputs = (shape[0], shape[2], shape[1]) if turned else shape
        parts: tuple[str, ...] = ("down_proj",)
        if stacked["name"] in {"gate_up_proj", "input_linear.weight"}:
            parts = ("gate_up_proj",) if whole else ("gate_proj", "up_proj")
        place = stacked["parent"].removesuffix(".experts") + ".experts"
        found += [
            Matrix(
                module=f"{place}.{expert}.{part}",
                tensor=name,
                outputs=outputs // len(parts),
                inputs=inputs,
                expert=expert,
                first=number * outputs // len(parts),
                transposed=turned,
            )
            for expert in range(count)
            for number, part in enumerate(parts)
        ]
    return tuple(sorted(found, key=lambda matrix: matrix.module))


def unquantized(
    source: CheckpointTensors, known: Iterable[Matrix], quantized: Iterable[Matrix]
) -> list[str]:
    """Return the modules with a matrix that stays in 16 bits, without embeddings and head.

    Engines must be told their names: else they expect codes and scales for routers, gates and
    towers, too. They look for those of single experts, also where all are one tensor.
    """
    tensors = {matrix.tensor for matrix in quantized}
    kept = {matrix.module for matrix in known if matrix.tensor not in tensors}
    return sorted(
        kept
        | {
            name.removesuffix(".weight")
            for name in source.names - tensors
            if name.endswith(".weight")
            and len(source.info(name).shape) > 1
            and not any(part in name for part in ("embed_tokens", "lm_head"))
        }
    )
