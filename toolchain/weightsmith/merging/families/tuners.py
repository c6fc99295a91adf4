"""PEFT's other tuners: PEFT's own code merges each layer (`peft_layers.py`)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from weightsmith.core.errors import InputRefused
from weightsmith.merging.claim import AdapterView, Claim, Family, Variant
from weightsmith.merging.layer import BaseLayer
from weightsmith.merging.names import is_conv1d, module_key
from weightsmith.merging.outputs import StoredTensor, TensorSource
from weightsmith.merging.tuned import BIASED, Tuned
from weightsmith.merging.tying import is_embedding

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


def _claim(view: AdapterView) -> Iterator[Claim]:
    if view.config.kind == _NORM:
        yield from _norms(view)
        return
    modules, rest = _by_module(view)
    kind = view.config.kind
    shared = kind in _SHARED
    if shared and not modules:
        modules = dict.fromkeys(_targeted(view), ())
    if not modules:
        raise InputRefused(
            f"{view.path} does not change any module of the base",
            hint=f"the adapter was trained on another model: {view.config.base_model!r}",
        )
    layers = {module: _layer(view, module, keys) for module, keys in modules.items()}
    every = tuple(sorted((*(key for keys in modules.values() for key in keys), *rest)))
    for number, (module, keys) in enumerate(modules.items()):
        own = keys + (rest if shared and not number else ())
        tuned: dict[str, Any] = {
            "layer": layers[module],
            "base": _base(view, module),
            "keys": tuple(view.stored(key) for key in keys),
            "raw": _raw(view, keys),
            "file": view.file,
            "shared": tuple(layers.values()) if shared else (),
            "shared_keys": every if shared else (),
            "folder": _folder(view, module) if kind in _ORDERED else None,
        }
        if kind != "BEFT":
            yield Claim(
                keys=own,
                module=module,
                target=view.need(module),
                change=Tuned(parameter="weight", **tuned),
            )
        if kind in BIASED and (bias := view.find(module, "bias")):
            yield Claim(
                keys=own if kind == "BEFT" else (),
                module=module,
                target=bias,
                change=Tuned(parameter="bias", **tuned),
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


def _targeted(view: AdapterView) -> list[str]:
    """Return the modules that the configuration targets, for tuners without tensors per module."""
    stored = [name for name in view.sources if name.endswith(".weight")]
    tied = [view.tie.head] if view.tie and view.tie.head not in view.sources else []
    names = [name.removesuffix(".weight") for name in (*stored, *tied)]
    return [name for name in names if view.config.targets(name)]


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
    if kind == "linear" and _is_embedding_layer(module, keys):
        kind = "embedding"
    return BaseLayer(module=module, kind=kind, shape=shape, bias=bool(view.find(module, "bias")))


def _is_embedding_layer(module: str, keys: tuple[str, ...]) -> bool:
    """Return whether a layer is an embedding, by names, because the shape cannot tell."""
    last = module.rpartition(".")[2]
    named = is_embedding(module) or last.endswith(("embeddings", "embed_positions", "wpe"))
    return named or any("_embedding_" in key for key in keys)


def _folder(view: AdapterView, module: str) -> Path | None:
    """Return the base's folder, whose configuration gives the order of layers."""
    source = view.source(view.need(module))
    return source.path.parent if isinstance(source, StoredTensor) else None


def _norms(view: AdapterView) -> Iterator[Claim]:
    """Yield the claims of trained norms, which replace the base's tensors."""
    for key in view.keys:
        module, _, parameter = module_key(key).rpartition(".")
        module = module.removesuffix(".ln_tuning_layers")
        yield Claim(
            keys=(key,),
            module=module,
            target=view.need(module, parameter),
            replacement=view.stored(key),
        )


_ALONE = "merged by PEFT's own layer, one base tensor at a time, in float32, rounded once"
_TOGETHER = "the same; tensors shared by layers are loaded once"
_WIDER = "; in float64, because its sums cancel"

FAMILY = Family(
    name="tuners",
    kinds=frozenset({*_OWN, *_SHARED, _NORM}),
    claim=_claim,
    variants=(
        *(Variant(name=name, how=_ALONE) for name in _OWN.values()),
        *(
            Variant(name=name, how=_TOGETHER + _WIDER * (kind == "RANDLORA"))
            for kind, name in _SHARED.items()
        ),
        Variant(name="LayerNorm tuning", how="the adapter's tensor replaces the base's"),
    ),
)
