"""PEFT's other tuners: PEFT's own code merges each layer (`peft_layers.py`)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from weightsmith.core.errors import InputRefused
from weightsmith.merging.claim import AdapterView, Claim, Family
from weightsmith.merging.names import is_conv1d, module_key, plain_key
from weightsmith.merging.outputs import (
    BaseLayer,
    Files,
    MergedTensor,
    Rows,
    StoredTensor,
    TensorSource,
)
from weightsmith.merging.tying import is_embedding

if TYPE_CHECKING:
    import numpy as np

_OWN = {
    "ADALORA": "AdaLoRA",
    "BEFT": "BEFT",
    "BOFT": "BOFT",
    "C3A": "C3A",
    "DEFT": "DEFT",
    "DELORA": "DeLoRA",
    "FOURIERFT": "FourierFT",
    "GLORA": "GLoRA",
    "GRALORA": "GraLoRA",
    "HIRA": "HiRA",
    "HRA": "HRA",
    "IA3": "IA³",
    "LOHA": "LoHa",
    "LOKR": "LoKr",
    "MISS": "MiSS",
    "OFT": "OFT",
    "OSF": "OSF",
    "PEANUT": "PEANuT",
    "PSOFT": "PSOFT",
    "ROAD": "RoAd",
    "SHIRA": "SHiRA",
    "SUPERTUNING": "SuperTuning",
    "WAVEFT": "WaveFT",
}
"""`peft_type` -> name of tuners with independent layers."""
_SHARED = {
    "PVERA": "PVeRA",
    "RANDLORA": "RandLoRA",
    "TINYLORA": "TinyLoRA",
    "UNILORA": "UniLoRA",
    "VBLORA": "VB-LoRA",
    "VERA": "VeRA",
}
"""`peft_type` -> name of tuners whose layers share projections or banks."""
_ORDERED = ("TINYLORA", "UNILORA")
"""Tuners that number layers in the model's order."""
_NORM = "LN_TUNING"
_WHOLE = frozenset({"base_layer", "modules_to_save", "original_module"})
"""Parts of keys of whole tensors, which the family `replaced` handles."""
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


def _claim(view: AdapterView) -> Iterator[Claim]:
    if view.config.kind == _NORM:
        for key in view.keys:
            name, _, parameter = module_key(key).rpartition(".")
            name = name.removesuffix(".ln_tuning_layers")
            target, whole = view.need(name, parameter), view.stored(key)
            yield Claim(keys=(key,), module=name, target=target, replacement=whole)
        return
    modules, rest, kind = *_by_module(view), view.config.kind
    shared = kind in _SHARED
    if shared and not modules:
        # Tuners without tensors per module change what the configuration targets.
        tied = [view.tie.head] if view.tie and view.tie.head not in view.sources else []
        stored = [name for name in view.sources if name.endswith(".weight")]
        names = [name.removesuffix(".weight") for name in (*stored, *tied)]
        modules = dict.fromkeys(filter(view.config.targets, names), ())
    if not modules:
        raise InputRefused(
            f"{view.path} does not change any module of the base",
            hint=f"the adapter was trained on another model: {view.config.base_model!r}",
        )
    layers = {module: _layer(view, module, keys) for module, keys in modules.items()}
    every = tuple(sorted((*(key for keys in modules.values() for key in keys), *rest)))
    for number, (module, keys) in enumerate(modules.items()):
        own = keys + (rest if shared and not number else ())
        source = view.source(view.need(module)) if kind in _ORDERED else None
        tuned = partial(
            _Tuned,
            layer=layers[module],
            base=_base(view, module),
            keys=tuple(view.stored(key) for key in keys),
            raw=_raw(view, keys),
            file=view.file,
            shared=tuple(layers.values()) if shared else (),
            shared_keys=every if shared else (),
            folder=source.path.parent if isinstance(source, StoredTensor) else None,
        )
        if kind != "BEFT":
            yield Claim(
                keys=own,
                module=module,
                target=view.need(module),
                change=tuned(parameter="weight"),
            )
        if kind in BIASED and (bias := view.find(module, "bias")):
            yield Claim(
                keys=own if kind == "BEFT" else (),
                module=module,
                target=bias,
                change=tuned(parameter="bias"),
            )


def _by_module(view: AdapterView) -> tuple[dict[str, tuple[str, ...]], tuple[str, ...]]:
    """Return the keys by their module of the base, and the keys without one."""
    modules: dict[str, tuple[str, ...]] = {}
    rest: list[str] = []
    for key in view.keys:
        parts = module_key(key).split(".")
        if _WHOLE.intersection(parts) or view.names.find(module_key(key)):
            continue
        names = (".".join(parts[:cut]) for cut in range(len(parts) - 1, 0, -1))
        module = next((name for name in names if view.find(name)), "")
        own = f"{module}.weight", f"{module}.bias"
        if module and module_key(key) not in own:
            modules[module] = (*modules.get(module, ()), key)
        elif view.config.kind in _SHARED and not module:
            rest.append(key)
    return modules, tuple(rest)


def _raw(view: AdapterView, keys: tuple[str, ...]) -> str:
    """Return the configuration for one layer.

    WaveFT distributes frequencies over all layers; the tensor's shape gives this layer's number.
    """
    raw = dict(view.config.raw)
    if raw.get("proportional_parameters"):
        own = next((view.keys[key].shape[0] for key in keys if "waveft_spectrum" in key), 0)
        raw |= {"proportional_parameters": False, "n_frequency": own, "n_frequency_pattern": {}}
    return json.dumps(raw, sort_keys=True)


def _base(view: AdapterView, module: str) -> tuple[tuple[str, TensorSource], ...]:
    """Return a layer's parameters: the adapter's copies if it has any, else the base's."""
    found: list[tuple[str, TensorSource]] = []
    for name in ("weight", "bias"):
        if target := view.find(module, name):
            own = (f"{prefix}{module}.base_layer.{name}" for prefix in ("base_model.model.", ""))
            copy = next((key for key in own if key in view.keys), "")
            found.append((name, view.stored(copy) if copy else view.source(target)))
    return tuple(found)


def _layer(view: AdapterView, module: str, keys: tuple[str, ...]) -> BaseLayer:
    shape = dict(_base(view, module))["weight"].shape
    kinds = {1: "norm", 2: "linear", 3: "conv", 4: "conv", 5: "conv"}
    if len(shape) not in kinds:
        raise InputRefused(
            f"{view.path}: {module} has the unsupported shape {list(shape)}",
            hint="serve this adapter unmerged with PEFT",
        )
    kind = kinds[len(shape)]
    if kind == "linear" and is_conv1d(str(view.base_config.get("model_type", "")), module):
        kind = "conv1d"
    # By names, because the shape cannot tell.
    last = module.rpartition(".")[2]
    named = is_embedding(module) or last.endswith(("embeddings", "embed_positions", "wpe"))
    if kind == "linear" and (named or any("_embedding_" in key for key in keys)):
        kind = "embedding"
    return BaseLayer(module=module, kind=kind, shape=shape, bias=bool(view.find(module, "bias")))


_ALONE = "merged by PEFT's own layer, one base tensor at a time, in float32, rounded once"
_TOGETHER = "the same; tensors shared by layers are loaded once"
_WIDER = "; in float64, because its sums cancel"

FAMILY = Family(
    name="tuners",
    kinds=frozenset({*_OWN, *_SHARED, _NORM}),
    claim=_claim,
    variants=dict.fromkeys(_OWN.values(), _ALONE)
    | {name: _TOGETHER + _WIDER * (kind == "RANDLORA") for kind, name in _SHARED.items()}
    | {"LayerNorm tuning": "the adapter's tensor replaces the base's"},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tuned:
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
                key: stored.rows(files, first, count, stored.shape[1])
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
                    self.layer, self.shared, self.raw, base, state, files, self.folder
                )
            else:
                adapter = {plain_key(s.info.name): _array(s, files) for s in self.keys}
                merged = merge_layer(self.layer, self.raw, base, adapter)
            # The plan would not write a changed bias of other tuners.
            if "bias" in base and self._kind not in BIASED:
                before = base["bias"].reshape(-1).astype(merged["bias"].dtype)
                if (merged["bias"] != before).any():
                    raise InputRefused(
                        f"{self._kind} unexpectedly changes the bias of {self.layer.module}",
                        hint="serve this adapter unmerged, and report this with the version of "
                        "PEFT",
                    )
            return merged[self.parameter].reshape(output.rows, output.columns)[first:][:count]

        return rows


def _array(source: TensorSource, files: Files) -> np.ndarray:
    if isinstance(source, StoredTensor):
        return files.array(source)
    count, columns = math.prod(source.shape[:-1]), source.shape[-1]
    return source.rows(files, 0, count, columns).reshape(source.shape)
