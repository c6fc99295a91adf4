"""Sums of squares of a model's inputs over calibration text, as an importance matrix has them.

llama-imatrix needs a 16-bit GGUF file of the whole model. Here the sums are over its windows, in
float64, and are written sorted and in float32, with the same bits on every CPU with AVX2. More than
65,536 tokens are walked in parts, so that states do not fill the memory. DeepSeek is refused: the
converter splits `kv_b_proj` into two matrices with other inputs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import nn

from weightsmith.forward.layers import TOKENS, Layers
from weightsmith.forward.libraries import load_tokenizer
from weightsmith.forward.reproducible import follow, reproducible
from weightsmith.forward.threads import CPUS, Pipeline, product, thread_pool, unwatched
from weightsmith.quantizers.architectures import EXPERTS
from weightsmith.quantizers.gguf_importance import WALK_TOKENS, config_of, window_of
from weightsmith.quantizers.layerwise.observing import Experts, is_experts

Progress = Callable[[int, int], object]

_ROWS = 512
"""Rows whose squares are added up by themselves; sums depend on it."""
_COLUMNS = 128
"""About as many of them stay in the CPU's cache."""
_ALIGNED = 16
"""Torch's loops for AVX2 compute so many numbers at a time, and what is left in another way."""
_SMALL = 128 << 20
"""Bytes of a decoder layer in float32 of which there may be two."""
NAMES: Mapping[str, str] = {
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
GATED, DOWN = ("ffn_gate_exps", "ffn_up_exps"), ("ffn_down_exps",)


@dataclass(frozen=True, slots=True)
class SquareSums:
    """Of the inputs that one product gets."""

    squares: Sequence[np.ndarray]
    """float64 [columns], of up to 512 inputs each: they are added up in this order."""
    count: int

    @classmethod
    def of(cls, rows: torch.Tensor) -> SquareSums:
        """Return that of inputs [rows, columns]."""
        squares, parts = list[np.ndarray](), max(1, rows.shape[1] // _COLUMNS)
        for some in torch.split(rows, _ROWS):  # each column's sum is from the first row on
            columns = torch.tensor_split(some, parts, 1)
            squares.append(torch.cat([part.double().square_().sum(0) for part in columns]).numpy())
        return cls(squares, len(rows))


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

    def add(self, part: SquareSums, matrix: int = 0) -> None:
        """Add some of a matrix's inputs."""
        for squares in part.squares:
            self.squares[matrix] += squares
        self.counts[matrix] += part.count


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
    chunks = windows(model, texts, tokens)
    window = len(chunks[0])
    found: dict[str, Sums] = {}
    step = max(1, WALK_TOKENS // window)
    starts = range(0, len(chunks), step)
    batch_per_thread = _batch_per_thread(model, window)
    tokens, workers = (_ROWS, min(CPUS, TOKENS // _ROWS)) if batch_per_thread else (TOKENS, 1)
    with reproducible(product), thread_pool(workers, partial(follow, product)) as pool:
        for number, start in enumerate(starts):
            layers = Layers(model, chunks[start : start + step], tokens)
            total = len(layers.layers)
            for layer in _run(layers, pool, 1 + batch_per_thread, found):
                progress(number * total + layer + 1, len(starts) * total)
    return Measured(sums=found, chunks=len(chunks), window=window)


def windows(model: Path, texts: Sequence[str], tokens: int) -> list[list[int]]:
    """Return the windows of llama-imatrix: ids of equal number, of the texts joined by line ends.

    `tokens` are those of the texts by themselves. Raises InputRefused for too few.
    """
    window, tokenizer = window_of(model, len(texts), tokens), load_tokenizer(model)
    ids: list[int] = tokenizer("\n".join(texts), add_special_tokens=False)["input_ids"]
    # Each window begins as the tokenizer begins a text.
    begin = tokenizer.bos_token_id
    begins = begin is not None and tokenizer("a")["input_ids"][:1] == [begin]
    ids = [begin, *ids] if begins else ids
    whole = range(0, len(ids) - window + 1, window)
    chunks = [ids[start : start + window] for start in whole]
    return [[begin, *chunk[1:]] for chunk in chunks] if begins else chunks


def _batch_per_thread(model: Path, window: int) -> bool:
    """Return whether each thread takes a batch of its own, with two layers in memory.

    That is worth it where a layer is small: what is no product takes one thread otherwise. The
    bits are the same, as windows fill the parts that are added up, and vectors. Experts get the
    inputs of all batches at once, since they also read less then.
    """
    config = config_of(model)
    hidden, inner, names = map(config.get, ("hidden_size", "intermediate_size", "architectures"))
    if not isinstance(hidden, int) or not isinstance(inner, int):
        return False
    if isinstance(names, list) and EXPERTS.intersection(map(str, names)):
        return False
    return not (_ROWS % window or window % _ALIGNED) and 16 * hidden * (hidden + inner) <= _SMALL


def _run(
    layers: Layers, pool: ThreadPoolExecutor, most: int, found: dict[str, Sums]
) -> Iterator[int]:
    """Run all chunks through the layers, and yield a layer when its matrices' inputs are added."""
    seen = _Seen()

    @contextmanager
    def watched(number: int) -> Iterator[None]:
        with layers.with_weights(number) as layer:
            hooks, block = [], f"blk.{number}."
            for name, module in layer.named_modules():
                if is_experts(module):
                    hook = partial(_see_experts, block, found)
                    hooks.append(module.register_forward_pre_hook(hook))
                elif type(module) is nn.Linear and (known := NAMES.get(name.rpartition(".")[2])):
                    shared = "_shexp" if "shared_expert" in name else ""
                    see = partial(seen.see, f"{block}{known}{shared}.weight")
                    hooks.append(module.register_forward_pre_hook(see))
            yield
            for handle in hooks:
                handle.remove()

    def run(number: int, batch: int) -> Sequence[tuple[str, SquareSums]]:
        seen.parts = []
        with torch.inference_mode():
            layers.states[batch] = layers.run(number, batch)
            layers.require_finite(number, layers.states[batch : batch + 1])
        return seen.parts

    made = Pipeline(pool, watched, run).run(len(layers.layers), len(layers.batches), most)
    for number, parts in enumerate(made):
        for tensor, part in chain.from_iterable(parts):
            found.setdefault(tensor, Sums.empty(1, len(part.squares[0]))).add(part)
        yield number


class _Seen(threading.local):
    """What a thread sees of a batch in a decoder layer's linear layers."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, SquareSums]] = []
        self._last: tuple[torch.Tensor, SquareSums] | None = None

    def see(self, tensor: str, module: torch.nn.Linear, args: tuple[torch.Tensor, ...]) -> None:
        if self._last is None or self._last[0] is not args[0]:  # Q, K and V get the same
            with unwatched():
                self._last = args[0], SquareSums.of(args[0].reshape(-1, module.in_features))
        self.parts.append((tensor, self._last[1]))


def _see_experts(
    block: str, found: dict[str, Sums], module: Experts, args: tuple[torch.Tensor, ...]
) -> None:
    """Add what each expert gets; what it makes of that is computed again here."""
    experts, _, columns = module.gate_up_proj.shape
    rows, inner = args[0].reshape(-1, columns), module.down_proj.shape[2]
    chosen = args[1].reshape(len(rows), -1)
    for part, width in ((GATED, columns), (DOWN, inner)):
        for name in part:
            found.setdefault(f"{block}{name}.weight", Sums.empty(experts, width))
    for expert in range(experts):
        routed_rows = rows[(chosen == expert).any(1)]
        if not len(routed_rows):
            continue
        inputs = SquareSums.of(routed_rows)
        for name in GATED:
            found[f"{block}{name}.weight"].add(inputs, expert)
        gate, up = product(routed_rows, module.gate_up_proj[expert]).chunk(2, 1)
        found[f"{block}{DOWN[0]}.weight"].add(SquareSums.of(module.act_fn(gate) * up), expert)


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
