"""LoRA on stacked experts (`target_parameters`), for bases with and without stacked experts.

PEFT stores all experts of a layer in one pair of factors: A has a block of rows per expert, B
has expert e in every E-th column (`ParamWrapper.get_delta_weight`, peft/tuners/lora/layer.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

from weightsmith.core.errors import InputRefused
from weightsmith.merging.claim import AdapterView, Claim
from weightsmith.merging.outputs import Term
from weightsmith.models.safetensors import TensorInfo

_ORDER = ("gate_up_proj", "gate_proj", "up_proj", "down_proj")
"""The order in which expert classes register their parameters, and PEFT wraps them."""
_PIECES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
"""Stacked parameter -> names of its parts in checkpoints with one tensor per expert, in order."""
_TRANSPOSED_MODELS = ("gpt_oss", "aria", "aria_text", "openai_privacy_filter")
"""Models whose expert classes set `is_transposed`: parameters are (experts, in, out)."""
_ONE = re.compile(r"(?P<stack>.+\.experts)\.(?P<number>\d+)\.(?P<name>\w+)")


@dataclass(frozen=True, slots=True)
class FactorPair:
    """The factors of one of PEFT's wrappers."""

    raw: str
    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True, slots=True)
class _StackedTensors:
    """One stacked parameter's tensors in the base."""

    parameter: str
    tensor: str
    """The stacked tensor; empty if each expert has its own tensors."""
    pieces: tuple[tuple[str, ...], ...]
    """Expert -> its tensors, in the order of the stack's rows."""


def is_expert(view: AdapterView, module: str) -> bool:
    """Return whether a module is a stack of experts, or one expert that the base stacks."""
    if own := view.find(module):
        # A module that calls its stack `weight`, as JetMoE's.
        return len(view.shape(own)) == 3 and bool(_stacks(view, module))
    if view.find(module, "in_proj_weight"):
        return False
    one = _ONE.fullmatch(module)
    return bool(_stacks(view, module) or (one and _place(view, one["stack"], one["name"])))


def is_one_of_stack(module: str) -> bool:
    """Return whether a module is a layer of one expert, which transformers 5 loads in a stack."""
    return _ONE.fullmatch(module) is not None


def claims(view: AdapterView, module: str, pairs: Sequence[FactorPair]) -> Iterator[Claim]:
    """Yield one claim per base tensor that a module's pairs change.

    Raises InputRefused if it is ambiguous which parameter a wrapper changes, or if ranks or
    shapes do not match.
    """
    if (one := _ONE.fullmatch(module)) and not _stacks(view, module):
        yield _one_of_stack(view, one, module, pairs[0])
        return
    for pair, stack in _assigned(view, module, pairs):
        keys: tuple[str, ...] = (pair.a.name, pair.b.name)
        name = f"{module}.{stack.parameter}"
        for target, terms in _terms(view, name, stack, pair).items():
            columns = view.shape(target)[-1]
            yield Claim(keys=keys, module=name, target=target, columns=columns, terms=terms)
            keys = ()


def _stacks(view: AdapterView, module: str) -> list[_StackedTensors]:
    """Return the targeted parameters of a module in the order in which PEFT wraps them."""
    targets = view.config.raw.get("target_parameters") or ()
    names = {name.rpartition(".")[2] for name in targets}
    names = {n for n in names if any(f".{module}.{n}".endswith(f".{name}") for name in targets)}
    order = sorted(names, key=lambda n: (_ORDER.index(n) if n in _ORDER else len(_ORDER), n))
    return [stack for name in order if (stack := _stack(view, module, name))]


def _stack(view: AdapterView, module: str, parameter: str) -> _StackedTensors | None:
    if tensor := view.find(module, parameter):
        return _StackedTensors(parameter, tensor, ())
    for names in _PIECES.get(parameter, ((parameter,),)):
        pieces: list[tuple[str, ...]] = []
        while all(view.find(f"{module}.{len(pieces)}.{name}") for name in names):
            pieces.append(tuple(view.find(f"{module}.{len(pieces)}.{name}") for name in names))
        if pieces:
            return _StackedTensors(parameter, "", tuple(pieces))
    return None


def _assigned(
    view: AdapterView, module: str, pairs: Sequence[FactorPair]
) -> Iterator[tuple[FactorPair, _StackedTensors]]:
    """Yield each pair with its parameter: the innermost wrapper has the first that fits."""
    stacks = _stacks(view, module)
    inner_first = sorted(pairs, key=lambda pair: -pair.raw.count("base_layer"))
    orders = [
        order
        for order in permutations(stacks)
        if len(order) == len(pairs)
        and all(_orientation(view, *both) for both in zip(order, inner_first, strict=True))
    ]
    known = all(stack.parameter in _ORDER for stack in stacks)
    if not orders or (len(orders) > 1 and not known):
        shapes = "; ".join(f"{p.raw}: A {list(p.a.shape)}, B {list(p.b.shape)}" for p in pairs)
        names = ", ".join(stack.parameter for stack in stacks)
        raise InputRefused(
            f"{view.path}: the {len(pairs)} pairs of factors of {module} do not fit the base's "
            f"{names or 'parameters'} ({shapes})",
            hint="the adapter was trained on another model, or its keys were renamed",
        )
    # If shapes are ambiguous, in the order of registration.
    yield from zip(inner_first, orders[0], strict=True)


def _count(view: AdapterView, stack: _StackedTensors) -> int:
    if not stack.tensor:
        return len(stack.pieces)
    shape = view.shape(stack.tensor)
    return shape[0] if len(shape) == 3 else 1


def _orientation(view: AdapterView, stack: _StackedTensors, pair: FactorPair) -> str:
    """Return `straight` if the base stores (out, in), `transposed` for (in, out), else ""."""
    given = (pair.b.shape[0], pair.a.shape[1])
    if stack.tensor:
        shape = view.shape(stack.tensor)[-2:]
    else:
        shapes = [view.shape(name) for name in stack.pieces[0]]
        shape = (sum(s[0] for s in shapes), shapes[0][1])
    experts = _count(view, stack)
    if pair.a.shape[0] % experts or pair.b.shape[1] != pair.a.shape[0]:
        return ""
    stacked = bool(stack.tensor) and experts > 1
    transposed = stacked and view.base_config.get("model_type") in _TRANSPOSED_MODELS
    if given == shape and not transposed:
        return "straight"
    return "transposed" if stacked and given == shape[::-1] else ""


def _terms(
    view: AdapterView, name: str, stack: _StackedTensors, pair: FactorPair
) -> dict[str, tuple[Term, ...]]:
    experts, orientation = _count(view, stack), _orientation(view, stack, pair)
    rank = pair.a.shape[0] // experts
    _check_rank(view, name, rank)
    found: dict[str, list[Term]] = {}
    for expert in range(experts):
        a = replace(view.matrix(pair.a), rows=slice(expert * rank, (expert + 1) * rank))
        first = 0
        for target in (stack.tensor,) if stack.tensor else stack.pieces[expert]:
            height = pair.b.shape[0] if stack.tensor else view.shape(target)[0]
            rows, columns = slice(first, first + height), slice(expert, None, experts)
            b = replace(view.matrix(pair.b), rows=rows, columns=columns)
            first += height
            left, right = (b, a) if orientation == "straight" else (a.transpose, b.transpose)
            place = expert * left.shape[0] if stack.tensor else 0
            found.setdefault(target, []).append(
                view.term(left, right, view.config.scaling(name), place)
            )
    return {target: tuple(terms) for target, terms in found.items()}


def _place(view: AdapterView, stack: str, name: str) -> tuple[str, int, int] | None:
    """Return the stacked tensor, the index of a layer of one expert in it, and the layer count."""
    for parameter, namings in _PIECES.items():
        for names in namings:
            tensor = view.find(stack, parameter)
            if name in names and tensor and len(view.shape(tensor)) == 3:
                return tensor, names.index(name), len(names)
    return None


def _one_of_stack(view: AdapterView, one: re.Match[str], module: str, pair: FactorPair) -> Claim:
    """Return the claim of one expert's layer (transformers 4) in a base with stacked experts."""
    place = _place(view, one["stack"], one["name"])
    tensor, part, parts = place or ("", 0, 1)
    shape, number = view.shape(tensor), int(one["number"])
    height = shape[1] // parts
    if (pair.b.shape[0], pair.a.shape[1]) != (height, shape[2]) or number >= shape[0]:
        raise InputRefused(
            f"{view.path}: {module} does not fit {tensor} {list(shape)}",
            hint="the adapter was trained on another model",
        )
    _check_rank(view, module, pair.a.shape[0])
    first, scaling = number * shape[1] + part * height, view.config.scaling(module)
    term = view.term(view.matrix(pair.b), view.matrix(pair.a), scaling, first)
    keys = (pair.a.name, pair.b.name)
    return Claim(keys=keys, module=module, target=tensor, columns=shape[2], terms=(term,))


def _check_rank(view: AdapterView, name: str, rank: int) -> None:
    if rank != view.config.rank(name):
        raise InputRefused(
            f"{view.path}: {name} has rank {rank} per expert, but {view.config.rank(name)} in "
            "adapter_config.json",
            hint="configuration and weights are from different trainings; export both together",
        )
