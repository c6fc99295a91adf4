"""Sums of squares of a model's inputs over calibration text, as an importance matrix has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from weightsmith.forward.layers import Layers, product
from weightsmith.forward.libraries import load_tokenizer
from weightsmith.forward.reproducible import reproducible
from weightsmith.quantizers.gguf_calibration import WALK_TOKENS, window_of
from weightsmith.quantizers.layerwise.observing import is_experts

Progress = Callable[[int, int], object]

_ROWS = 512
"""Rows that are squared at a time."""
_NAMES: Mapping[str, str] = {
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "qkv_proj": "attn_qkv",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "gate_up_proj": "ffn_up",
    "down_proj": "ffn_down",
}
"""Name of a linear layer -> llama.cpp's (gguf-py/gguf/tensor_mapping.py)."""
_GATED, _DOWN = ("ffn_gate_exps", "ffn_up_exps"), ("ffn_down_exps",)


@dataclass(slots=True)
class Sums:
    """Of one tensor of llama.cpp's, which may have the matrices of all experts."""

    squares: np.ndarray
    """float64 [matrices, columns]"""
    counts: np.ndarray
    """int64 [matrices]: inputs that each matrix got."""

    @classmethod
    def empty(cls, matrices: int, columns: int) -> Sums:
        """Return those of no inputs."""
        return cls(np.zeros((matrices, columns)), np.zeros(matrices, np.int64))

    def add(self, rows: torch.Tensor, matrix: int = 0) -> None:
        """Add a matrix's inputs [rows, columns]."""
        for part in torch.split(rows, _ROWS):
            self.squares[matrix] += part.double().square_().sum(0).numpy()
        self.counts[matrix] += len(rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """The sums of a model by llama.cpp's names of tensors."""

    sums: Mapping[str, Sums]
    chunks: int
    window: int
    """Tokens of a chunk."""


def importance(
    model: Path, texts: Sequence[str], tokens: int, progress: Progress = lambda *_: None
) -> Measured:
    """Return the importance of each matrix of the layers, on the windows of llama-imatrix.

    `texts`, of `tokens` tokens by themselves, are joined by line ends. One layer at a time is in
    memory in float32, and the states of 65,536 tokens. In an environment of `AVX2_LOOPS`, the bits
    do not depend on the CPU. Raises InputRefused for too little text, for a checkpoint that lacks a
    tensor, and for inputs that are not finite.
    """
    window = window_of(model, len(texts), tokens)
    chunks = list(_windows(load_tokenizer(model), "\n".join(texts), window))
    found: dict[str, Sums] = {}
    step = max(1, WALK_TOKENS // window)
    starts = range(0, len(chunks), step)
    with reproducible(product):
        for number, start in enumerate(starts):
            layers = Layers(model, chunks[start : start + step])
            total = len(layers.layers)
            for layer in range(total):
                _run(layers, layer, found)
                progress(number * total + layer + 1, len(starts) * total)
    return Measured(sums=found, chunks=len(chunks), window=window)


def _windows(tokenizer: Any, text: str, window: int) -> Iterator[list[int]]:
    """Yield the whole windows of a text; each begins as the tokenizer begins a text."""
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin = tokenizer.bos_token_id
    begins = begin is not None and tokenizer("a")["input_ids"][:1] == [begin]
    if begins:
        ids = [begin, *ids]
    for start in range(0, len(ids) - window + 1, window):
        chunk = ids[start : start + window]
        yield [begin, *chunk[1:]] if begins else chunk


def _run(layers: Layers, number: int, found: dict[str, Sums]) -> None:
    """Run a layer on all chunks, add its matrices' inputs, and move the states behind it."""
    with layers.loaded(number) as layer:
        hooks = list(_hooks(layer, f"blk.{number}.", found))
        for batch in range(len(layers.batches)):
            layers.states[batch] = layers.run(number, batch)
        layers.require_finite(number, layers.states)
        for hook in hooks:
            hook.remove()


def _hooks(layer: Any, block: str, found: dict[str, Sums]) -> Iterator[Any]:
    for name, module in layer.named_modules():
        if is_experts(module):
            yield module.register_forward_pre_hook(partial(_see_experts, block, found))
        elif type(module) is nn.Linear and (known := _NAMES.get(name.rpartition(".")[2])):
            shared = "_shexp" if "shared_expert" in name else ""
            tensor = f"{block}{known}{shared}.weight"
            yield module.register_forward_pre_hook(partial(_see, tensor, found))


def _see(tensor: str, found: dict[str, Sums], module: Any, args: tuple[torch.Tensor, ...]) -> None:
    rows = args[0].reshape(-1, module.in_features)
    found.setdefault(tensor, Sums.empty(1, module.in_features)).add(rows)


def _see_experts(
    block: str, found: dict[str, Sums], module: Any, args: tuple[torch.Tensor, ...]
) -> None:
    """Add what each expert gets; what it makes of that is computed again here."""
    experts, _, columns = module.gate_up_proj.shape
    rows, inner = args[0].reshape(-1, columns), module.down_proj.shape[2]
    chosen = args[1].reshape(len(rows), -1)
    for part, width in ((_GATED, columns), (_DOWN, inner)):
        for name in part:
            found.setdefault(f"{block}{name}.weight", Sums.empty(experts, width))
    for expert in range(experts):
        mine = rows[(chosen == expert).any(1)]
        if not len(mine):
            continue
        for name in _GATED:
            found[f"{block}{name}.weight"].add(mine, expert)
        gate, up = product(mine, module.gate_up_proj[expert]).chunk(2, 1)
        found[f"{block}{_DOWN[0]}.weight"].add(module.act_fn(gate) * up, expert)


def write_importance(path: Path, measured: Measured) -> None:
    """Write the file that llama-imatrix would: sums and counts in float32, sorted by tensor.

    The format is that of `IMatrixCollector::save_imatrix` (tools/imatrix/imatrix.cpp).
    """
    import gguf

    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration"])
    writer.add_uint32("imatrix.chunk_count", measured.chunks)
    writer.add_uint32("imatrix.chunk_size", measured.window)
    for name, sums in sorted(measured.sums.items()):
        writer.add_tensor(f"{name}.in_sum2", sums.squares.astype(np.float32))
        writer.add_tensor(f"{name}.counts", sums.counts.astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
