"""Tuners other than LoRA: PEFT's own layer, built around one base tensor at a time and merged.

The only place of the merge besides `torch_kernel` and `reference` that imports torch. PEFT computes
in float32, whatever the base's type; the result is rounded once.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from toolchain.errors import InputRefused
from toolchain.merging.rounding import F32

Arrays = Mapping[str, np.ndarray]
_lock = threading.Lock()
"""One layer at a time: memory stays that of one tensor, and PEFT draws from global generators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer of the base that an adapter changes."""

    module: str
    """Its path in the model, which patterns in the configuration may speak about."""
    kind: str
    """`linear`, `conv1d` (GPT-2's, which stores (in, out)), `conv`, `embedding` or `norm`."""
    shape: tuple[int, ...]
    """Of the base's weight."""
    bias: bool


def merge_layer(layer: Layer, raw: str, base: Arrays, adapter: Arrays) -> dict[str, np.ndarray]:
    """Return the layer's merged parameters, `weight` and perhaps `bias`, in float32.

    `raw` is adapter_config.json, `base` the layer's parameters, `adapter` its tensors by their keys
    in the file. Raises InputRefused where PEFT cannot build or load the layer.
    """
    with _lock, _quiet():
        model = _build((layer,), raw, {layer.module: base})
        _load(model, adapter, layer.module)
        return _merged(model, layer)


def merge_shared_layer(
    layer: Layer, layers: tuple[Layer, ...], raw: str, base: Arrays, file: Path
) -> dict[str, np.ndarray]:
    """Return a layer's merged parameters where layers share projections or banks.

    All `layers` are built once, around weights that take no memory, and the adapter is loaded
    once; each layer gets its real weight only while it is merged.
    """
    with _lock, _quiet():
        return _merged(_shared(layers, raw, file), layer, base)


@lru_cache(maxsize=1)
def _shared(layers: tuple[Layer, ...], raw: str, file: Path) -> Any:
    from safetensors.torch import load_file

    model = _build(layers, raw, {})
    _load(model, {name: t.float().numpy() for name, t in load_file(file).items()}, "its layers")
    return model


def _build(layers: Sequence[Layer], raw: str, base: Mapping[str, Arrays]) -> Any:
    """Return a PEFT model of nothing but these layers, each at its own path."""
    from peft import get_peft_model

    root = nn.Module()
    for layer in layers:
        parent, (*path, last) = root, layer.module.split(".")
        for name in path:
            if name not in dict(parent.named_children()):
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        parent.add_module(last, _plain(layer, base.get(layer.module)))
    try:
        config = _config(json.loads(raw), layers)
        # Tuners that draw or decompose at random do it again here: as from a fresh start.
        torch.manual_seed(0)
        return get_peft_model(root, config).eval()
    except (ValueError, TypeError, KeyError, NotImplementedError, ImportError) as error:
        raise InputRefused(
            f"PEFT cannot build {json.loads(raw).get('peft_type')} around {layers[0].module}: "
            f"{error}",
            hint="serve this adapter unmerged with PEFT",
        ) from error


def _plain(layer: Layer, base: Arrays | None) -> nn.Module:
    """Return the layer with its weights, or with one number in place of all of them."""
    made = _empty(layer)
    for name, parameter in list(made.named_parameters()):
        if base is not None and name in base:
            tensor = torch.from_numpy(np.array(base[name], F32)).view(parameter.shape)
        else:
            tensor = torch.zeros(1).expand(parameter.shape)
        setattr(made, name, nn.Parameter(tensor, requires_grad=False))
    return made


def _empty(layer: Layer) -> nn.Module:
    shape, device = layer.shape, torch.device("meta")
    match layer.kind:
        case "conv1d":
            from transformers.pytorch_utils import Conv1D

            with device:
                return Conv1D(shape[1], shape[0])  # type: ignore[no-any-return]
        case "conv":
            kinds = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
            size: Any = shape[2:]
            made = kinds[len(shape)](shape[1], shape[0], size, bias=layer.bias, device=device)
            return made  # type: ignore[no-any-return]
        case "embedding":
            return nn.Embedding(shape[0], shape[1], device=device)
        case "norm":
            return nn.LayerNorm(shape[0], bias=layer.bias, device=device)
        case _:
            return nn.Linear(shape[1], shape[0], bias=layer.bias, device=device)


def _config(raw: dict[str, Any], layers: Sequence[Layer]) -> Any:
    """Return PEFT's configuration of these layers alone, which it must not look for elsewhere."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = PEFT_TYPE_TO_CONFIG_MAPPING[raw["peft_type"]]
    known = kind.__dataclass_fields__
    modules = [layer.module for layer in layers]
    wanted = {name: value for name, value in raw.items() if name in known}
    wanted |= {"inference_mode": True, "task_type": None, "modules_to_save": None}
    wanted["target_modules"] = modules
    for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        if name in known:
            wanted[name] = None
    if feedforward := raw.get("feedforward_modules"):
        wanted["feedforward_modules"] = [m for m in modules if _named(m, feedforward)]
    if raw["peft_type"] == "ADALORA" and raw.get("rank_pattern"):
        wanted["rank_pattern"] = {
            name: kept
            for name, kept in raw["rank_pattern"].items()
            if name.startswith(tuple(f"{module}." for module in modules))
        }
    config = kind(**{name: value for name, value in wanted.items() if name in known})
    config.peft_type = raw["peft_type"]
    return config


def _named(module: str, names: str | list[str]) -> bool:
    import re

    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _load(model: Any, adapter: Arrays, what: str) -> None:
    from peft import set_peft_model_state_dict

    tensors = {name: torch.from_numpy(np.array(value, F32)) for name, value in adapter.items()}
    try:
        result = set_peft_model_state_dict(model, tensors)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputRefused(
            f"the adapter's tensors of {what} do not fit: {error}",
            hint="configuration and weights are of different trainings; export both together",
        ) from error
    strange = list(result.unexpected_keys)
    missing = [name for name in result.missing_keys if model.base_model.prefix in name]
    if strange or missing:
        raise InputRefused(
            f"the adapter's tensors of {what} are incomplete or unknown: "
            + ", ".join((strange + missing)[:5]),
            hint="export the adapter again with PEFT's save_pretrained",
        )


def _merged(model: Any, layer: Layer, base: Arrays | None = None) -> dict[str, np.ndarray]:
    """Merge one layer and return its parameters; with `base`, around these for the moment."""
    tuned = model.base_model.model.get_submodule(layer.module)
    plain = tuned.get_base_layer()
    stand_ins = {name: parameter.data for name, parameter in plain.named_parameters()}
    for name, value in (base or {}).items():
        plain.get_parameter(name).data = torch.from_numpy(np.array(value, F32))
    with torch.no_grad():
        tuned.merge(safe_merge=False)
    # The layer may have been replaced by one that was trained as a whole.
    result = {name: p.data.float().numpy() for name, p in tuned.get_base_layer().named_parameters()}
    if base is not None:
        tuned.merged_adapters.clear()
        for name, stand_in in stand_ins.items():
            plain.get_parameter(name).data = stand_in
    return result


class _quiet(warnings.catch_warnings):  # noqa: N801 - used like a function
    """Leave out PEFT's warnings about models without a configuration and adapters' order."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.simplefilter("ignore")
        return entered
