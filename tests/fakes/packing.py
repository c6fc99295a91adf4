"""Weights of four bits, packed as AWQ and GPTQ do, by plain loops."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

Pack = Callable[[np.ndarray, np.ndarray], tuple[torch.Tensor, torch.Tensor]]
HIDDEN, INNER, GROUP = 64, 128, 32
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 100,
    "torch_dtype": "bfloat16",
}
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
GPTQ_CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True}


def words(numbers: np.ndarray, order: tuple[int, ...]) -> torch.Tensor:
    """Pack rows of eight 4-bit numbers, the one of column order[i] in nibble i, by plain loops."""
    rows, columns = numbers.shape
    out = np.zeros((rows, columns // 8), np.uint32)
    for row in range(rows):
        for word in range(columns // 8):
            for nibble, column in enumerate(order):
                out[row, word] |= np.uint32(int(numbers[row, word * 8 + column]) << (4 * nibble))
    return torch.from_numpy(out.view(np.int32))


def four_bits(weight: torch.Tensor, *, symmetric: bool) -> tuple[np.ndarray, ...]:
    """Return q [in, out], zeros and scales [groups, out] of rounding to nearest."""
    by_group = weight.float().T.reshape(-1, GROUP, weight.shape[0])
    low, high = by_group.amin(1), by_group.amax(1)
    if symmetric:
        scales = torch.maximum(-low, high) / 7.5
        zeros = torch.full_like(scales, 8)
    else:
        scales = (high - low) / 15
        zeros = torch.round(-low / scales).clamp(0, 15)
    scales = scales.half().float()
    q = torch.round(by_group / scales[:, None] + zeros[:, None]).clamp(0, 15)
    return q.reshape(-1, weight.shape[0]).numpy(), zeros.numpy(), scales.numpy()


def save_awq(model: Path, raw: Path) -> None:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    _save(model, raw, False, lambda q, zeros: (words(q, order), words(zeros, order)))


def save_gptq(model: Path, raw: Path) -> None:
    order = tuple(range(8))
    _save(
        model, raw, True,
        lambda q, zeros: (words(q.T, order).T.contiguous(), words(zeros - 1, order)),
    )  # fmt: skip


def _save(model: Path, raw: Path, symmetric: bool, pack: Pack) -> None:
    """Write the folder that a tool of this kind would."""
    out = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if "_proj" not in name:
            out[name] = weight.float()
            continue
        q, zeros, scales = four_bits(weight, symmetric=symmetric)
        module = name.removesuffix("weight")
        out[module + "qweight"], out[module + "qzeros"] = pack(q, zeros)
        out[module + "scales"] = torch.from_numpy(scales).half()
    raw.mkdir()
    save_file(out, raw / "model.safetensors")
