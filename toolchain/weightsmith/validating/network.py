"""Models without weights: built from a configuration, fed from files while they run."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weightsmith.checkpoints.folder import check_adapter_folder, check_model_folder
from weightsmith.checkpoints.peft_keys import KEY_MAPPING, check_peft_keys
from weightsmith.checkpoints.peft_patterns import check_peft_patterns
from weightsmith.validating.weights import Weights

PEFT_PREFIX = "base_model.model."
_WRAPPERS = frozenset({"base_layer", "original_module", "token_adapter"})


class Apart(Exception):
    """Adapters that PEFT cannot hold side by side: of several kinds, or upon the same module."""


def skeleton(root: Path) -> Any:
    """Return the folder's model in float32 with every parameter missing; buffers are real.

    A missing parameter is one NaN shown in the parameter's shape: what computes with it unnoticed
    cannot give a number.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    check_model_folder(root)
    config = AutoConfig.from_pretrained(root, local_files_only=True, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
    _hollow(model)
    return model.eval()


def _hollow(model: Any) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.device.type == "meta":
                setattr(module, name, _missing(parameter.shape))


def load_buffers(model: Any, weights: Weights) -> None:
    """Fill the buffers that the checkpoint holds."""
    for name, buffer in model.named_buffers():
        if weights.has(name):
            buffer.copy_(weights.whole(name))


def with_adapters(model: Any, adapters: Sequence[tuple[Path, float]]) -> Any:
    """Put adapters beside the model's layers with PEFT, all active, each as it is.

    What they trained is in memory, in float32. Raises Apart where PEFT cannot.
    """
    from peft import PeftModel

    names = [f"adapter_{number}" for number in range(len(adapters))]
    for name, (root, _) in zip(names, adapters, strict=True):
        check_adapter_folder(root)
        check_peft_keys(root)
        check_peft_patterns(root, (name for name, _ in model.named_modules()))
        how: Any = {"adapter_name": name, "low_cpu_mem_usage": True, "key_mapping": KEY_MAPPING}
        if name == names[0]:
            model = PeftModel.from_pretrained(model, root, **how)
            continue
        try:
            model.load_adapter(root, **how)
        except (ValueError, KeyError) as error:
            raise Apart(f"{type(error).__name__}: {error}") from error
    model.base_model.set_adapter(names)
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        _load_again(model, dict(zip(names, adapters, strict=True)))
    return model.eval().requires_grad_(requires_grad=False)


def resize(model: Any, like: Any) -> bool:
    """Give a skeleton another's vocabulary size, whose rows adapters must bring; say if it did."""
    rows = like.get_input_embeddings().weight.shape[0]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if embedding.weight.shape[0] == rows:
        return False
    embedding.weight = _missing(torch.Size((rows, embedding.weight.shape[1])))
    embedding.num_embeddings = rows
    if head is not None:
        head.weight = _missing(torch.Size((rows, head.weight.shape[1])))
        head.out_features = rows
    model.config.get_text_config().vocab_size = rows
    return True


def tie_again(model: Any) -> None:
    """Let a tied parameter that is missing be the one that an adapter brought instead."""
    for target, source in dict(getattr(model, "all_tied_weights_keys", {})).items():
        mine, theirs = (_parameter(model, name) for name in (target, source))
        if mine is not None and theirs is not None and is_missing(mine) and not is_missing(theirs):
            mine.data = theirs.data


def _parameter(model: Any, name: str) -> Any:
    """Return a parameter by the name it had before PEFT came, or None where it is elsewhere now."""
    try:
        return model.get_parameter(name)
    except AttributeError:
        module, _, last = name.rpartition(".")
        try:
            return model.get_parameter(f"{module}.base_layer.{last}")
        except AttributeError:
            return None


def _load_again(model: Any, adapters: Mapping[str, tuple[Path, float]]) -> None:
    """Bring what PEFT left on the meta device, where it puts the layers that it replicates."""
    from peft import load_peft_weights, set_peft_model_state_dict

    _hollow(model)
    for name, (root, _) in adapters.items():
        weights = load_peft_weights(
            str(root), device="cpu", key_mapping=KEY_MAPPING, use_safetensors=True
        )
        set_peft_model_state_dict(model, weights, adapter_name=name, low_cpu_mem_usage=True)
    for parameter in model.parameters():
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


def replication(model: Any) -> list[int] | None:
    """Return which layer of the base each layer is, where an adapter replicates them."""
    for config in model.peft_config.values():
        spans = getattr(config, "layer_replication", None)
        if spans:
            return [layer for first, last in spans for layer in range(first, last)]
    return None


def is_missing(parameter: torch.Tensor) -> bool:
    """Say whether a parameter still waits for its weights."""
    return parameter.numel() > 0 and not any(parameter.stride()) and _is_nan(parameter)


def base_name(name: str) -> str:
    """Return the model's own name of a parameter that PEFT has wrapped."""
    parts = name.removeprefix(PEFT_PREFIX).split(".")
    return ".".join(part for part in parts if part not in _WRAPPERS)


def stream(model: Any, weights: Weights, *, skip: Sequence[Any] = ()) -> None:
    """Let every module of the model read its weights when it runs, and forget them afterwards.

    Linear layers and embeddings read a few rows at a time, whatever their size; other modules
    their own parameters at once. Modules in `skip` are left alone.
    """
    left = {id(part) for module in skip for part in module.modules()}
    for path, module in model.named_modules():
        names = [n for n, p in module.named_parameters(recurse=False) if is_missing(p)]
        if not names or id(module) in left:
            continue
        places = {name: base_name(f"{path}.{name}") for name in names}
        direct = bool(weights.tensor_of(places.get("weight", "")))
        if direct and type(module) is nn.Linear:
            setattr(module, "forward", functools.partial(_linear, module, weights, places))  # noqa: B010
        elif direct and type(module) is nn.Embedding:
            embed = functools.partial(_embedding, weights, places["weight"])
            setattr(module, "forward", embed)  # noqa: B010
        else:
            fill_while_running(module, weights, {(module, n): p for n, p in places.items()})


def fill_while_running(
    outer: Any, weights: Weights, places: dict[tuple[Any, str], str] | None = None
) -> None:
    """Give a module the parameters it lacks before it runs, and take them away afterwards."""
    places = missing_below(outer, "") if places is None else places

    def fill(*_: object) -> None:
        for (module, name), parameter in places.items():
            getattr(module, name).data = weights.whole(parameter)

    def empty(*_: object) -> None:
        for module, name in places:
            part = getattr(module, name)
            part.data = _missing(part.shape).data

    outer.register_forward_pre_hook(fill)
    outer.register_forward_hook(empty, always_call=True)


def missing_below(outer: Any, path: str) -> dict[tuple[Any, str], str]:
    """Return (module, attribute) -> the model's own name of every missing parameter below."""
    return {
        (module, name): base_name(".".join(p for p in (path, inner, name) if p))
        for inner, module in outer.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if is_missing(parameter)
    }


def fill(model: Any, weights: Weights) -> None:
    """Load every missing parameter of a model, for good."""
    for (module, name), parameter in missing_below(model, "").items():
        getattr(module, name).data = weights.whole(parameter)


def decoder_layers(model: Any) -> list[Any]:
    """Return the model's repeated blocks: the longest list of modules in it."""
    lists: list[Any] = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=len, default=()))


def _missing(shape: torch.Size) -> nn.Parameter:
    value = torch.full((), math.nan).expand(shape)
    return nn.Parameter(value, requires_grad=False)


def _is_nan(parameter: torch.Tensor) -> bool:
    return bool(torch.isnan(parameter[(0,) * parameter.dim()]))


def _linear(module: Any, weights: Weights, places: dict[str, str], x: torch.Tensor) -> torch.Tensor:
    out = x.new_empty((*x.shape[:-1], module.out_features))
    for first, rows in weights.rows(places["weight"]):
        out[..., first : first + len(rows)] = x @ rows.float().T
    if "bias" in places:
        out += weights.whole(places["bias"])
    elif module.bias is not None:
        out += module.bias
    return out


def _embedding(weights: Weights, name: str, ids: torch.Tensor) -> torch.Tensor:
    wanted, places = torch.unique(ids, return_inverse=True)
    tensor = weights.tensor_of(name)
    table = torch.cat([weights.slice(tensor, i, i + 1) for i in wanted.tolist()]).float()
    return table[places]
