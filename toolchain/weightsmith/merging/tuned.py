"""A layer that one of PEFT's other tuners changes: what is known before PEFT is imported."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith.errors import InputRefused
from weightsmith.merging.layer import Layer
from weightsmith.merging.names import plain_key
from weightsmith.merging.outputs import Files, Output, Rows, Source, Stored

if TYPE_CHECKING:
    import numpy as np


_BY_ROWS = {
    "ADALORA": ("lora_B",),
    "HIRA": ("hira_B",),
    "IA3": ("ia3_l",),
    "LOHA": ("hada_w1_a", "hada_w2_a"),
}
"""Tuners that change each row of a linear layer by itself, and their tensors with a row for each:
a layer of some rows is then merged at a time. Half the CPU time too, since blocks stay in cache."""
BIASED = frozenset({"BEFT", "GLORA", "IA3", "ROAD"})
"""Tuners that change a layer's bias as well."""


_BLOCK = 1 << 22
"""float64 elements that some rows take, generously."""
_IMPORTS = (270 << 20) // 8
"""And what torch and PEFT take once they are imported."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """A layer's weight or bias as PEFT merges it in float32: some rows at a time, or the whole."""

    layer: Layer
    parameter: str
    """`weight` or `bias`."""
    base: tuple[tuple[str, Source], ...]
    """The layer's parameters by name."""
    keys: tuple[Stored, ...]
    """The layer's own tensors of the adapter."""
    raw: str
    """adapter_config.json."""
    file: Path
    shared: tuple[Layer, ...] = ()
    """All layers of the adapter, where they share something."""
    shared_keys: tuple[str, ...] = ()
    """Names of all tensors of the tuner, likewise."""
    folder: Path | None = None
    """The base's, where the order of its layers counts."""

    by_row: bool = False
    """Not to float64's accuracy."""

    @property
    def whole(self) -> bool:
        """The tensor is one block."""
        linear = self.parameter == "weight" and self.layer.kind == "linear"
        return not linear or self._kind not in _BY_ROWS

    @property
    def _kind(self) -> str:
        return str(json.loads(self.raw)["peft_type"])

    def held_elements(self, output: Output) -> int:
        """Return how many float64 elements are in memory: base, delta and result in float32."""
        own = sum(stored.info.size for stored in self.keys) // 8
        return _IMPORTS + own + (3 * output.rows * output.columns if self.whole else _BLOCK)

    def begin(self, output: Output, files: Files) -> Rows:
        """Return what computes rows, or the whole tensor."""
        return self._whole(output, files) if self.whole else self._by_rows(output, files)

    def _by_rows(self, output: Output, files: Files) -> Rows:
        parts, kept = _BY_ROWS[self._kind], {}
        cut: dict[str, Stored] = {}
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

    def _whole(self, output: Output, files: Files) -> Rows:
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
        """Refuse a changed bias that the plan does not write."""
        import numpy as np

        if "bias" in base and self._kind not in BIASED:
            before = base["bias"].reshape(-1).astype(merged["bias"].dtype)
            same = np.array_equal(merged["bias"], before)
            if not same:
                raise InputRefused(
                    f"{self._kind} changes the bias of {self.layer.module}, which is not expected",
                    hint="serve this adapter unmerged, and report it with the version of PEFT",
                )


def _array(source: Source, files: Files) -> np.ndarray:
    """Return a whole tensor in its own type."""
    if isinstance(source, Stored):
        return files.array(source.path, source.info)
    count, columns = math.prod(source.shape[:-1]), source.shape[-1]
    return source.rows(files, 0, count, columns).reshape(source.shape)
