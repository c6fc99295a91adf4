"""A view of a model: a checkpoint with or without adapters that shares its matrix reads."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from weightsmith.core.errors import InputRefused
from weightsmith.forward.adapters import replication, with_adapters
from weightsmith.forward.experts import (
    Deltas,
    Parts,
    call_only,
    is_stacked,
    read_one_by_one,
    wrapped_experts,
)
from weightsmith.forward.heads import multiplied
from weightsmith.forward.libraries import ModelFails
from weightsmith.forward.lockstep import Key, Lockstep
from weightsmith.forward.network import (
    Head,
    base_name,
    fill_while_running,
    is_missing,
    lacking,
    missing_below,
    skeleton_with_weights,
)
from weightsmith.forward.products import Matrix, Rows
from weightsmith.forward.weights import Weights

if TYPE_CHECKING:
    from weightsmith.forward.kinds import Model


def view(
    checkpoint: Path,
    adapters: Sequence[tuple[Path, float]],
    lockstep: Lockstep,
    number: int,
) -> Model:
    """Return a transformers model, with PEFT's layers on it, in float32 and ready to run.

    Views of the same checkpoint share a `number`. Raises InputRefused if the checkpoint lacks a
    tensor, and ModelFails if it cannot be built without its weights in memory.
    """
    model, weights = skeleton_with_weights(checkpoint)
    require_complete(checkpoint, model, weights)
    if adapters:
        model = with_adapters(model, adapters)
        if (layers := replication(model)) is not None:
            weights.replicate(layers)
    stream(model, weights, lockstep, number)
    model.get_output_embeddings().register_forward_hook(require_finite)
    return model


def view_with_head(
    checkpoint: Path,
    adapters: Sequence[tuple[Path, float]],
    head: Head,
    lockstep: Lockstep,
    number: int,
) -> Model:
    """Return the same of a model that ends in another head, which an adapter may bring.

    What it returns is not checked.
    """
    model, weights = skeleton_with_weights(checkpoint, head)
    names = lacking(model, weights)
    model = with_adapters(model, adapters) if adapters else model
    replaced = _replaced(model)
    require_no_more(checkpoint, [name for name in names if name not in replaced])
    stream(model, weights, lockstep, number, [*replaced.values()])
    return model


def _replaced(model: Model) -> dict[str, nn.Module]:
    """Return the parameters of modules that an adapter replaces as wholes, with these modules."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        own = getattr(module, "original_module", None)
        if isinstance(own, nn.Module) and getattr(module, "modules_to_save", None):
            names = (base_name(f"{path}.{name}") for name, _ in own.named_parameters())
            found |= dict.fromkeys(names, own)
    return found


def require_complete(checkpoint: Path, model: Model, weights: Weights) -> None:
    """Raise InputRefused if a checkpoint lacks a tensor of its architecture."""
    require_no_more(checkpoint, lacking(model, weights))


def require_no_more(checkpoint: Path, names: Sequence[str]) -> None:
    """Raise InputRefused if these tensors, which a checkpoint lacks, are any."""
    if names:
        more = f" and {len(names) - 1} more" if names[1:] else ""
        raise InputRefused(
            f"{checkpoint} has no tensor {names[0]}{more}, which its architecture needs",
            hint="download or save the checkpoint again; all its shards must be there",
        )


def stream(
    model: Model,
    weights: Weights,
    lockstep: Lockstep,
    number: int,
    skip: Sequence[torch.nn.Module] = (),
) -> None:
    """Make every module without weights read them when it runs; modules in `skip` are left alone.

    Matrices are multiplied in the lockstep, as those of checkpoint `number`.
    """
    left = {id(module) for layer in skip for module in layer.modules()}
    own = []
    for layer in _layers_reading_weights(model):
        if id(layer) in left:
            continue
        if (found := reads_one_by_one(model, layer, weights)) is None:
            own.append(layer)
            continue
        path, module, deltas = found
        call_only(layer, module)
        _stream(path, module, weights, lockstep, number, deltas)
    for path, layer in model.named_modules():
        if layer in own:
            fill_while_running(layer, weights, missing_below(layer, path))
    left |= {id(module) for layer in own for module in layer.modules()}
    for path, module in model.named_modules():
        if id(module) not in left:
            _stream(path, module, weights, lockstep, number)


def reads_one_by_one(
    model: Model, layer: torch.nn.Module, weights: Weights
) -> tuple[str, torch.nn.Module, Mapping[str, Deltas]] | None:
    """Return path and module of experts with adapters, and what these add to each parameter.

    None if they cannot be read one by one.
    """
    if (found := wrapped_experts(layer)) is None:
        return None
    module, deltas = found
    path = next(path for path, one in model.named_modules() if one is module)
    stacks = _stacks(path, module, weights)
    return (path, module, deltas) if deltas.keys() <= stacks.keys() else None


def _stacks(path: str, module: torch.nn.Module, weights: Weights) -> dict[str, Sequence[Parts]]:
    """Return a module's missing parameters whose matrices can be read one by one."""
    names = [n for n, p in module.named_parameters(recurse=False) if is_missing(p)]
    found = {n: weights.experts(base_name(f"{path}.{n}")) for n in names if is_stacked(module, n)}
    return {name: experts for name, experts in found.items() if experts}


def _layers_reading_weights(model: Model) -> list[nn.Module]:
    """Return the outermost of PEFT's layers that read the base's weight beside calling its layer.

    A parameter is filled once, before any of the layers inside each other changes it.
    """
    if not hasattr(model, "peft_config"):
        return []
    from peft.tuners.lora import Embedding, Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        and (
            not isinstance(layer, Linear | Embedding)
            or any(getattr(layer, "use_dora", {}).values())
        )
    ]
    inside = {id(m) for layer in layers for m in layer.modules() if m is not layer}
    return [layer for layer in layers if id(layer) not in inside]


def _stream(
    path: str,
    module: nn.Module,
    weights: Weights,
    lockstep: Lockstep,
    number: int,
    deltas: Mapping[str, Deltas] | None = None,
) -> None:
    """Make a module read its weights when it runs; vectors such as norms stay in memory.

    So do filters of single channels, which models with states read without calling their layer.
    `deltas` has what adapters add to its stacked parameters.
    """
    if stacks := _stacks(path, module, weights):
        tensors = weights.tensors_of(base_name(f"{path}.{next(iter(stacks))}"))
        key = (weights.order[tensors[0]], number)
        read_one_by_one(module, stacks, key, lockstep, deltas or {})
    names = [n for n, p in module.named_parameters(recurse=False) if is_missing(p)]
    places = {name: base_name(f"{path}.{name}") for name in names}
    tensor = weights.tensor_of(places.get("weight", ""))
    matrix = functools.partial(_matrix, weights, tensor, module)
    if tensor and type(module) is nn.Linear:
        places.pop("weight")
        key = (weights.order[tensor], number)
        setattr(module, "forward", functools.partial(_linear, module, lockstep, key, matrix))  # noqa: B010
    elif tensor and looks_up(module):
        places.pop("weight")
        lookup = functools.partial(look_up, module, type(module).forward, matrix)
        setattr(module, "forward", lookup)  # noqa: B010
    alone = isinstance(module, nn.Conv1d) and module.groups == module.in_channels
    for name in [n for n in places if alone or module.get_parameter(n).dim() < 2]:
        module.get_parameter(name).data = weights.whole(places.pop(name))
    if places:
        fill_while_running(module, weights, {(module, n): p for n, p in places.items()})


def _linear(
    module: Any,
    lockstep: Lockstep,
    key: Key,
    matrix: Callable[[], Matrix],
    x: torch.Tensor,
) -> torch.Tensor:
    product = multiplied(x, lambda some: lockstep.multiply(key, some, matrix()))
    return product if module.bias is None else product + module.bias


def looks_up(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Return whether a module is an embedding, or Gemma's that scales what it looks up."""
    scaled = isinstance(module, nn.Embedding) and "ScaledWordEmbedding" in type(module).__name__
    return scaled or type(module) is nn.Embedding


def _matrix(weights: Weights, tensor: str, module: nn.Module) -> Matrix:
    """Return the tensor; ModelFails if it does not have the shape of the module's weight."""
    matrix = weights.mapped(tensor)
    shape = module.get_parameter("weight").shape
    if matrix.shape != shape:
        raise ModelFails(f"{tensor} has shape {[*matrix.shape]}, not {[*shape]}")
    return matrix


def look_up(
    module: nn.Embedding,
    forward: Callable[[nn.Embedding, torch.Tensor], torch.Tensor],
    matrix: Callable[[], Rows],
    ids: torch.Tensor,
) -> torch.Tensor:
    """Look ids up in the rows that are used, by the module's own forward."""
    unique, places = torch.unique(ids, return_inverse=True)
    missing, padding = module.weight, module.padding_idx
    module.weight = nn.Parameter(matrix()[unique].float(), requires_grad=False)
    module.padding_idx = None
    try:
        found: torch.Tensor = forward(module, places)
        return found
    finally:
        module.weight, module.padding_idx = missing, padding


def require_finite(_: torch.nn.Module, __: tuple[torch.Tensor, ...], logits: torch.Tensor) -> None:
    """Raise ModelFails if logits are not finite: a weight was used without its module."""
    # The sum of finite logits is finite, and takes a fifth of the time of a test of each.
    if not math.isfinite(logits.sum()):
        raise ModelFails("the logits are not finite")
