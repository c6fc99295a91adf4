"""Tuners other than LoRA, merged by PEFT's own layer, one base tensor at a time.

Besides `torch_kernel` and `reference`, only this module of the merge imports torch. PEFT computes
in float32 for every base dtype; the result is rounded once.

Thirty methods have merge code of their own, which changes with every release of PEFT. So a PEFT
model is built with one layer, at its real module path, so that patterns by name still match: one
file for all methods, with one tensor in memory. If layers share projections, all are built once,
around weights that take no memory; if rows change independently, a layer is built for a few rows.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from weightsmith.core.errors import InputRefused
from weightsmith.merging.adapter_config import names_match
from weightsmith.merging.names import plain_key
from weightsmith.merging.outputs import BaseLayer, Files
from weightsmith.merging.rounding import F32

if TYPE_CHECKING:
    from peft import PeftConfig

    from weightsmith.forward.kinds import Model

Arrays = Mapping[str, np.ndarray]
State = tuple[Path, tuple[str, ...]]
FLOAT64_TUNERS = frozenset({"RANDLORA"})
"""Tuners computed in float64: their sums cancel, and float32 loses a thousandth of the change."""
_lock = threading.Lock()
"""One layer at a time, to save memory and because PEFT uses global random generators."""


def merge_layer(layer: BaseLayer, raw: str, base: Arrays, adapter: Arrays) -> dict[str, np.ndarray]:
    """Return the layer's merged parameters, `weight` and possibly `bias`, in float32.

    `raw` is adapter_config.json, `base` the layer's parameters, `adapter` its tensors by key.
    Raises InputRefused if PEFT cannot build or load the layer.
    """
    with _lock, warnings.catch_warnings(action="ignore"), _one_thread():
        model = _build((layer,), raw, {layer.module: base})
        _load(model, {name: _tensor(value) for name, value in adapter.items()}, layer.module)
        merged = _merged(model, layer)
        # Free the weights' memory at once: modules are in reference cycles.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = torch.empty(0, dtype=tensor.dtype)
        return merged


def merge_shared_layer(
    layer: BaseLayer,
    layers: tuple[BaseLayer, ...],
    raw: str,
    base: Arrays,
    state: State,
    files: Files,
    folder: Path | None = None,
) -> dict[str, np.ndarray]:
    """Return a layer's merged parameters if layers share projections or banks.

    All `layers` are built once with placeholder weights, and the tuner's tensors (`state`: file and
    names) are loaded once; each layer has its real weight only while it is merged. With the base's
    `folder`, layers are in the order of its model.
    """
    with _lock, warnings.catch_warnings(action="ignore"), _one_thread():
        build = partial(_shared, layers, raw, state, folder)
        return _merged(files.for_all((layers, raw, state, folder), build), layer, base)


def _shared(layers: tuple[BaseLayer, ...], raw: str, state: State, folder: Path | None) -> Model:
    from safetensors import safe_open

    model = _build(_ordered(layers, folder) if folder else layers, raw, {})
    path, names = state
    with safe_open(path, "pt") as file:
        stored = {plain_key(name): file.get_tensor(name) for name in names}
    tensors = {n: t.float() if t.is_floating_point() else t for n, t in stored.items()}
    _load(model, tensors, "its layers")
    return model


def _ordered(layers: Sequence[BaseLayer], folder: Path) -> list[BaseLayer]:
    """Return the layers in the order of the base's model, which is built without weights."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    names = [name for name in config.architectures or () if hasattr(transformers, name)]
    kind = getattr(transformers, names[0]) if names else None
    try:
        with torch.device("meta"):
            model = kind(config) if kind else transformers.AutoModel.from_config(config)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        raise InputRefused(
            f"transformers cannot build a {config.model_type} model to get the order of its "
            f"layers: {error}",
            hint="serve this adapter unmerged with PEFT",
        ) from error
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    if unknown := [layer.module for layer in layers if layer.module not in order]:
        raise InputRefused(
            f"a {config.model_type} model has no {unknown[0]}: the order of layers is unknown",
            hint="serve this adapter unmerged with PEFT",
        )
    return sorted(layers, key=lambda layer: order[layer.module])


def _build(layers: Sequence[BaseLayer], raw: str, base: Mapping[str, Arrays]) -> Model:
    from peft import get_peft_model

    root = nn.Module()
    for layer in layers:
        parent, (*path, last) = root, layer.module.split(".")
        for name in path:
            if name not in dict(parent.named_children()):
                parent.add_module(name, nn.Module())
            parent = parent.get_submodule(name)
        own, made = base.get(layer.module, {}), _empty(layer)
        for name, parameter in list(made.named_parameters()):
            # An expanded zero is a placeholder.
            tensor = _tensor(own[name]) if name in own else torch.zeros(1)
            view = tensor.view(parameter.shape) if name in own else tensor.expand(parameter.shape)
            setattr(made, name, nn.Parameter(view, requires_grad=False))
        parent.add_module(last, made)
    try:
        config = _config(json.loads(raw), layers)
        # Some tuners draw at random here, so make it reproducible.
        torch.manual_seed(0)
        model = get_peft_model(root, config).eval()
        return model.double() if str(config.peft_type) in FLOAT64_TUNERS else model
    except (ValueError, TypeError, KeyError, NotImplementedError, ImportError) as error:
        raise InputRefused(
            f"PEFT cannot build {json.loads(raw).get('peft_type')} for {layers[0].module}: {error}",
            hint="serve this adapter unmerged with PEFT",
        ) from error


def _empty(layer: BaseLayer) -> nn.Module:
    shape, device = layer.shape, torch.device("meta")
    match layer.kind:
        case "conv1d":
            from transformers.pytorch_utils import Conv1D

            with device:
                return Conv1D(shape[1], shape[0])  # type: ignore[no-any-return]
        case "conv":
            kinds = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
            size: Any = shape[2:]
            return kinds[len(shape)](shape[1], shape[0], size, bias=layer.bias, device=device)
        case "embedding":
            return nn.Embedding(shape[0], shape[1], device=device)
        case "norm":
            return nn.LayerNorm(shape[0], bias=layer.bias, device=device)
        case _:
            return nn.Linear(shape[1], shape[0], bias=layer.bias, device=device)


def _config(raw: Mapping[str, Any], layers: Sequence[BaseLayer]) -> PeftConfig:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kind = PEFT_TYPE_TO_CONFIG_MAPPING[raw["peft_type"]]
    known = kind.__dataclass_fields__
    modules = [layer.module for layer in layers]
    settings = {name: value for name, value in raw.items() if name in known}
    settings |= {"inference_mode": True, "task_type": None, "modules_to_save": None}
    settings["target_modules"] = modules
    # `layers` already says which layers, and the biases are handled elsewhere.
    settings |= dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"))
    settings["bias"] = "none"
    if feedforward := raw.get("feedforward_modules"):
        settings["feedforward_modules"] = [m for m in modules if names_match(feedforward, m)]
    if raw["peft_type"] == "ADALORA" and raw.get("rank_pattern"):
        settings["rank_pattern"] = {
            name: kept
            for name, kept in raw["rank_pattern"].items()
            if name.startswith(tuple(f"{module}." for module in modules))
        }
    config = kind(**{name: value for name, value in settings.items() if name in known})
    config.peft_type = raw["peft_type"]
    return config


def _tensor(value: np.ndarray) -> torch.Tensor:
    """Return floats as float32, integers and booleans unchanged."""
    kept = value.dtype.kind in "iu" or value.dtype == np.bool_
    return torch.from_numpy(value.copy() if kept else value.astype(F32))


def _load(model: Model, tensors: Mapping[str, torch.Tensor], what: str) -> None:
    from peft import set_peft_model_state_dict

    try:
        result = set_peft_model_state_dict(model, dict(tensors))
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputRefused(
            f"the adapter's tensors for {what} do not fit: {error}",
            hint="configuration and weights are from different trainings; export both together",
        ) from error
    parameters = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(p) for name, p in parameters.items() if name not in result.missing_keys}
    # Trained parameters that were not loaded under any of their names are missing.
    faulty = [
        *result.unexpected_keys,
        *(
            name
            for name in result.missing_keys
            if model.base_model.prefix in name
            and name in parameters
            and id(parameters[name]) not in loaded
        ),
    ]
    if faulty:
        raise InputRefused(
            f"missing or unknown adapter tensors for {what}: {', '.join(faulty[:5])}",
            hint="export the adapter again with PEFT's save_pretrained",
        )


def _merged(model: Model, layer: BaseLayer, base: Arrays | None = None) -> dict[str, np.ndarray]:
    """Merge one layer and return its parameters; `base` replaces placeholders temporarily."""
    tuned = model.base_model.model.get_submodule(layer.module)
    plain = tuned.get_base_layer()
    placeholders = {name: parameter.data for name, parameter in plain.named_parameters()}
    for name, value in (base or {}).items():
        parameter = plain.get_parameter(name)
        parameter.data = _tensor(value).to(parameter.dtype)
    try:
        with torch.no_grad():
            tuned.merge(safe_merge=False)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise InputRefused(
            f"PEFT cannot merge {layer.module}: {error}",
            hint="serve this adapter unmerged with PEFT",
        ) from error
    # PEFT may have replaced the layer by a fully trained one.
    result = {name: p.data.numpy() for name, p in tuned.get_base_layer().named_parameters()}
    if base is not None:
        tuned.merged_adapters.clear()
        for name, placeholder in placeholders.items():
            plain.get_parameter(name).data = placeholder
    return result


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: some methods' last bits, such as C3A's, depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
