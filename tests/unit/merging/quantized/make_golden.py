"""Write `data/golden.safetensors`: tensors quantized and decoded by bitsandbytes and by
compressed-tensors themselves, for tests that need neither.

    pip install bitsandbytes==0.50.2 compressed-tensors==0.20.0 loguru
    python -m tests.unit.merging.quantized.make_golden
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "data" / "golden.safetensors"


def weight(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(shape, generator=generator) * 0.05
    made[0, :3] = 0.0
    return made.to(dtype)


def bitsandbytes_4bit() -> dict[str, torch.Tensor]:
    from bitsandbytes import functional

    tensors = {}
    cases = [
        ("nf4", False, torch.bfloat16, (24, 64)),
        ("nf4", True, torch.bfloat16, (300, 64)),
        ("nf4", True, torch.float16, (9, 96)),
        ("nf4", False, torch.float32, (7, 30)),
        ("fp4", False, torch.bfloat16, (24, 64)),
        ("fp4", True, torch.float16, (300, 64)),
    ]
    for number, (kind, double, dtype, shape) in enumerate(cases):
        original = weight(shape, dtype, number)
        packed, state = functional.quantize_4bit(
            original, quant_type=kind, compress_statistics=double
        )
        name = f"bnb{number}.weight"
        tensors[name] = packed
        for key, value in state.as_dict(packed=True).items():
            tensors[f"{name}.{key}"] = value
        if kind == "nf4":
            tensors[f"original.{name}"] = original
        # The plain implementation: the fused one for AVX-512 wants rows of whole blocks.
        absmax = state.absmax
        if state.nested:
            absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
        from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

        plain = _dequantize_4bit_compute(
            packed.view(-1), absmax.float(), state.code, state.blocksize, state.shape, state.dtype
        )
        if shape[1] % 64 == 0:
            assert torch.equal(plain, functional.dequantize_4bit(packed, state))
        tensors[f"decoded.{name}"] = plain
    return tensors


def bitsandbytes_int8() -> dict[str, torch.Tensor]:
    from bitsandbytes import functional

    original = weight((20, 48), torch.float16, 50)
    codes, scale, _ = functional.int8_vectorwise_quant(original)
    return {
        "int8.weight": codes,
        "int8.SCB": scale,
        "int8.weight_format": torch.tensor(0, dtype=torch.uint8),
        "decoded.int8.weight": functional.int8_vectorwise_dequant(codes, scale).half(),
    }


def compressed_tensors() -> dict[str, torch.Tensor]:
    from compressed_tensors.compressors.base import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    four: dict[str, Any] = {"num_bits": 4, "strategy": "group", "group_size": 32}
    floats: dict[str, Any] = {"num_bits": 8, "type": "float"}
    channel = {"strategy": "channel"}
    blocks = {"strategy": "block", "block_structure": [16, 32]}
    cases = {
        "w4g": ("pack-quantized", four, (16, 96)),
        "w4a": ("pack-quantized", four | {"symmetric": False}, (18, 96)),
        "w3c": ("pack-quantized", {"num_bits": 3} | channel, (16, 96)),
        "w8c": ("pack-quantized", {"num_bits": 8} | channel, (16, 40)),
        "i8c": ("int-quantized", {"num_bits": 8} | channel, (16, 40)),
        "f8c": ("float-quantized", floats | channel, (16, 40)),
        "f8t": ("float-quantized", floats | {"strategy": "tensor"}, (16, 40)),
        "f8b": ("float-quantized", floats | blocks, (40, 72)),
    }
    tensors = {}
    for number, (name, (form, options, shape)) in enumerate(cases.items()):
        args = QuantizationArgs(**options)
        scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
        original = weight(shape, torch.bfloat16, 100 + number)
        parts = original.float()
        strategy = options["strategy"]
        if strategy == "group":
            parts = parts.view(shape[0], -1, options["group_size"])
        elif strategy == "channel":
            parts = parts.unsqueeze(1)
        elif strategy == "block":
            high, wide = options["block_structure"]
            padded = torch.nn.functional.pad(parts, (0, -shape[1] % wide, 0, -shape[0] % high))
            parts = padded.unfold(0, high, high).unfold(1, wide, wide).flatten(2)
        least, most = (
            (parts.min(), parts.max()) if strategy == "tensor" else (parts.amin(-1), parts.amax(-1))
        )
        scale, zero = calculate_qparams(least, most, args)
        state = {"weight": original, "weight_scale": scale.to(torch.bfloat16)}
        state["weight_zero_point"] = zero
        compressor = BaseCompressor.get_value_from_registry(form)
        stored = compressor.compress(dict(state), scheme)
        decoded = compressor.decompress(dict(stored), scheme)["weight"]
        for key, value in stored.items():
            tensors[f"{name}.{key}"] = value.contiguous()
        tensors[f"decoded.{name}.weight"] = decoded.to(torch.bfloat16)
    return tensors


def main() -> None:
    tensors = bitsandbytes_4bit() | bitsandbytes_int8()
    more = compressed_tensors()
    tensors = {name: tensor.contiguous() for name, tensor in (tensors | more).items()}
    save_file(tensors, GOLDEN)


if __name__ == "__main__":
    main()
