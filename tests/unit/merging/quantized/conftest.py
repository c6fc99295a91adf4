"""Quantized tensors as files hold them, and the layout that is read from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from weightsmith.merging.quantized.decode import decode
from weightsmith.merging.quantized.layout import QuantizedLayout, read_layout
from weightsmith.models.safetensors import TensorInfo, read_header
from weightsmith.models.tensors import array_type

Decode = Callable[..., tuple[QuantizedLayout, dict[str, np.ndarray]]]


@pytest.fixture
def decode_file(tmp_path: Path) -> Decode:
    """Save tensors, read their layout back, and decode every weight."""

    def run(
        tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]
    ) -> tuple[QuantizedLayout, dict[str, np.ndarray]]:
        path = tmp_path / "model.safetensors"
        save_file(dict(tensors), path)
        data = path.read_bytes()
        infos = {info.name: info for info in read_header(path).tensors}

        def array(info: TensorInfo) -> np.ndarray:
            raw = np.frombuffer(data[info.start : info.end], array_type(info.dtype))
            return raw.reshape(info.shape)

        layout = read_layout(config, infos, lambda info: data[info.start : info.end])
        decoded = {
            name: decode(weight, {part: array(info) for part, info in weight.parts.items()})
            for name, weight in layout.packed.items()
        }
        return layout, decoded

    return run


def bits(values: np.ndarray | torch.Tensor) -> np.ndarray:
    """Return 16- or 32-bit floats as integers, so that every bit is compared."""
    if isinstance(values, torch.Tensor):
        kind = torch.int16 if values.element_size() == 2 else torch.int32
        return values.contiguous().view(kind).numpy()
    return values.view(np.int16 if values.itemsize == 2 else np.int32)
