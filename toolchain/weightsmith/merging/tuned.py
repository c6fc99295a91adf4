"""The change of a layer by PEFT's other tuners; PEFT is imported only when it is computed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith.core.errors import InputRefused
from weightsmith.merging.layer import BaseLayer
from weightsmith.merging.names import plain_key
from weightsmith.merging.outputs import Files, MergedTensor, Rows, StoredTensor, TensorSource

if TYPE_CHECKING:
    import numpy as np


_BY_ROWS = {
    "ADALORA": ("lora_B",),
    "HIRA": ("hira_B",),
    "IA3": ("ia3_l",),
    "LOHA": ("hada_w1_a", "hada_w2_a"),
}
"""Tuners that change each row of a linear layer independently -> their tensors with one row each.
They are merged some rows at a time, which halves the CPU time, because blocks stay in cache."""
BIASED = frozenset({"BEFT", "GLORA", "IA3", "ROAD"})
"""Tuners that also change a layer's bias."""


_BLOCK = 1 << 22
"""float64 elements that some rows take, rounded up."""
_IMPORTS = (270 << 20) // 8
"""float64 elements that the import of torch and PEFT takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A layer's weight or bias merged by PEFT in float32, whole or some rows at a time."""

    layer: BaseLayer
    parameter: str
    """`weight` or `bias`."""
    base: tuple[tuple[str, TensorSource], ...]
    """The layer's parameters by name."""
    keys: tuple[StoredTensor, ...]
    """The adapter's tensors for the layer."""
    raw: str
    """adapter_config.json."""
    file: Path
    shared: tuple[BaseLayer, ...] = ()
    """All layers of the adapter, if they share tensors."""
    shared_keys: tuple[str, ...] = ()
    """Names of all the tuner's tensors, if layers share some."""
    folder: Path | None = None
    """The base's folder, if the order of layers matters."""

    by_row: bool = False
    """False: not to float64 accuracy."""

    @property
    def whole(self) -> bool:
        """Whether the tensor is computed as one block."""
        linear = self.parameter == "weight" and self.layer.kind == "linear"
        return not linear or self._kind not in _BY_ROWS

    @property
    def _kind(self) -> str:
        return str(json.loads(self.raw)["peft_type"])

    def held_elements(self, output: MergedTensor) -> int:
        """Return the peak memory in float64 elements: base, delta and result in float32."""
        own = sum(stored.info.size for stored in self.keys) // 8
        return _IMPORTS + own + (3 * output.rows * output.columns if self.whole else _BLOCK)

    def begin(self, output: MergedTensor, files: Files) -> Rows:
        """Return a function that computes rows, or the whole tensor."""
        return self._whole(output, files) if self.whole else self._by_rows(output, files)

    def _by_rows(self, output: MergedTensor, files: Files) -> Rows:
        parts, kept = _BY_ROWS[self._kind], {}
        cut: dict[str, StoredTensor] = {}
        for stored in self.keys:
            key = plain_key(stored.info.name)
            if stored.shape[0] == output.rows and any(f".{part}" in key for part in parts):
                cut[key] = stored
            else:
                kept[key] = _array(stored, files)
        (weight,) = (source for name, source in self.base if name == "weight")

        def rows(first: int, count: int) -> np.ndarray:
            from weightsmith.merging.peft_layers import merge_layer

            adapter = kept | {
                key: files.rows(stored.path, stored.info, first, count, stored.shape[1])
                for key, stored in cut.items()
            }
            layer = replace(self.layer, shape=(count, output.columns), bias=False)
            base = {"weight": weight.rows(files, first, count, output.columns)}
            return merge_layer(layer, self.raw, base, adapter)["weight"]

        return rows

    def _whole(self, output: MergedTensor, files: Files) -> Rows:
        def rows(first: int, count: int) -> np.ndarray:
            from weightsmith.merging.peft_layers import merge_layer, merge_shared_layer

            base = {name: _array(source, files) for name, source in self.base}
            if self.shared:
                state = (self.file, self.shared_keys)
                merged = merge_shared_layer(
                    self.layer, self.shared, self.raw, base, state, self.folder
                )
            else:
                adapter = {plain_key(s.info.name): _array(s, files) for s in self.keys}
                merged = merge_layer(self.layer, self.raw, base, adapter)
            self._check(merged, base)
            return merged[self.parameter].reshape(output.rows, output.columns)[first:][:count]

        return rows

    def _check(self, merged: dict[str, np.ndarray], base: dict[str, np.ndarray]) -> None:
        """Refuse a changed bias that the plan would not write."""
        import numpy as np

        if "bias" in base and self._kind not in BIASED:
            before = base["bias"].reshape(-1).astype(merged["bias"].dtype)
            same = np.array_equal(merged["bias"], before)
            if not same:
                raise InputRefused(
                    f"{self._kind} unexpectedly changes the bias of {self.layer.module}",
                    hint="serve this adapter unmerged, and report this with the version of PEFT",
                )


def _array(source: TensorSource, files: Files) -> np.ndarray:
    """Return a whole tensor in its own dtype."""
    if isinstance(source, StoredTensor):
        return files.array(source.path, source.info)
    count, columns = math.prod(source.shape[:-1]), source.shape[-1]
    return source.rows(files, 0, count, columns).reshape(source.shape)
