"""Adapters on a model, loaded by PEFT, unmerged; the one way for all that run them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import read_json
from weightsmith.forward.libraries import ModelFails, reading, running, unreadable
from weightsmith.forward.network import has_no_weights, is_missing, missing, set_missing
from weightsmith.models.folder import check_adapter_folder
from weightsmith.models.peft_patterns import KEY_MAPPING, check_peft_keys, check_peft_patterns
from weightsmith.models.safetensors import read_header

if TYPE_CHECKING:
    from weightsmith.forward.kinds import Model

_HINT = (
    "check that adapter_config.json is complete and that the adapter was trained on this base; "
    "export it again with PEFT's save_pretrained"
)
_WRAPPERS = frozenset({"base_layer", "original_module", "token_adapter", "modules_to_save"})


class IncompatibleAdapters(Exception):
    """PEFT cannot load these adapters together: they are of different kinds or share a module."""


class NeedsWeights(ModelFails):
    """PEFT computes with the base's weights as it loads an adapter, and they are read later."""


def with_adapters(model: Model, adapters: Sequence[tuple[Path, float]]) -> Model:
    """Load adapters with PEFT, unmerged and all active, on a model with or without its weights.

    Their weights are in memory in float32. If they were trained with another number of tokens, the
    model gets it too. Raises IncompatibleAdapters if PEFT cannot load them together, NeedsWeights
    if it needs the model's weights for that, and InputRefused for values in an adapter's files that
    PEFT refuses.
    """
    names = [f"adapter_{number}" for number in range(len(adapters))]
    whole = not any(is_missing(parameter) for parameter in model.parameters())
    for root, _ in adapters:
        check_adapter_folder(root)
        check_peft_keys(root)
    resized = _resize(model, [root for root, _ in adapters])
    for name, (root, _) in zip(names, adapters, strict=True):
        check_peft_patterns(root, (name for name, _ in model.named_modules()))
        how = {"adapter_name": name, "low_cpu_mem_usage": not whole, "key_mapping": KEY_MAPPING}
        with reading(f"the adapter in {root}", _HINT) if whole else _without_weights(root):
            model = _loaded(model, root, how)
    model.base_model.set_adapter(names)
    # Beside an adapter's copy of a base weight in 16 bits, PEFT rounds the factors to 16 bits.
    short = any(parameter.dtype != torch.float32 for parameter in model.parameters())
    if short or any(parameter.device.type == "meta" for parameter in model.parameters()):
        _load_again(model, dict(zip(names, adapters, strict=True)))
    if resized:
        _tie_again(model.get_base_model())
    _use_saved_basis(model)
    return model.eval().requires_grad_(requires_grad=False)


def _loaded(model: Model, root: Path, how: Mapping[str, Any]) -> Model:
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        try:
            return PeftModel.from_pretrained(model, root, **how)
        except ValueError as error:  # other errors may be due to the missing weights
            raise unreadable(f"the adapter in {root}", error, _HINT) from error
    try:
        model.load_adapter(root, **how)
    except (ValueError, KeyError) as error:
        raise IncompatibleAdapters(f"{type(error).__name__}: {error}") from error
    return model


@contextmanager
def _without_weights(root: Path) -> Iterator[None]:
    # It would make zeros of FRoD's factors, without an error.
    if read_json(root / "adapter_config.json").get("peft_type") == "FROD":
        raise NeedsWeights("PEFT computes FRoD's factors from the base's weights")
    with running():
        try:
            yield
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise NeedsWeights("PEFT decomposes the base's weights") from error


@running()
def _load_again(model: Model, adapters: Mapping[str, tuple[Path, float]]) -> None:
    """Load all tensors in float32, such as those of layers that PEFT replicates."""
    from peft import load_peft_weights, set_peft_model_state_dict

    set_missing(model)
    for name, (root, _) in adapters.items():
        stored = load_peft_weights(
            str(root), device="cpu", key_mapping=KEY_MAPPING, use_safetensors=True
        )
        weights = {n: t.float() if t.is_floating_point() else t for n, t in stored.items()}
        set_peft_model_state_dict(model, weights, adapter_name=name, low_cpu_mem_usage=True)


@running()
def _use_saved_basis(model: Model) -> None:
    """Compute FRoD's factors anew, from the basis that was saved with the adapter.

    PEFT computes them from a basis of its own, whose signs depend on the number of threads, and
    loads the saved one afterwards.
    """
    from peft.tuners.frod.layer import FrodLayer

    for layer in model.modules():
        if isinstance(layer, FrodLayer):
            weight = layer.get_base_layer().weight
            weight = weight.T if layer.fan_in_fan_out else weight
            for name, factor in layer.frod_U.items():
                made, _ = layer._calculate_frod_u_and_lambda(  # noqa: SLF001 - there is no other way
                    layer.frod_V[name], weight
                )
                layer.frod_U[name] = made.to(factor.dtype)


def _resize(model: Model, adapters: Sequence[Path]) -> bool:
    """Give embedding and head as many rows as the adapters saved; return whether any differ.

    PEFT fills them. Raises InputRefused if an adapter saved only one of two that are not tied, or
    trains a token that has no row.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    parts = {name: module for name, module in model.named_modules() if module in (embedding, head)}
    before, resized = len(embedding.weight), set[str]()
    for root in adapters:
        # (module's last name, width) -> rows of each whole matrix
        saved: dict[tuple[str, tuple[int, ...]], int] = {}
        for tensor in read_header(root / "adapter_model.safetensors").tensors:
            owner, _, parameter = tensor.name.rpartition(".")
            if parameter == "weight" and len(tensor.shape) == 2:
                *_, name = ["", *takewhile(lambda part: part not in _WRAPPERS, owner.split("."))]
                saved[name, tensor.shape[1:]] = tensor.shape[0]
        for path, module in parts.items():
            name, width = path.rpartition(".")[2], tuple(module.weight.shape[1:])
            rows = saved.get((name, width), len(module.weight))
            if rows != len(module.weight):
                _set_rows(module, rows)
                resized.add(path)
        _check_tokens(root, len(embedding.weight))
    if not resized:
        return False
    rows = len(parts[min(resized)].weight)
    for path in parts.keys() - resized:
        tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
        if f"{path}.weight" not in {*tied.keys(), *tied.values()}:
            raise InputRefused(
                f"an adapter has {rows} tokens in {min(resized)}, and {before} in {path}",
                hint="save the resized base and use it as the base, or train the adapter with both "
                "in modules_to_save or in target_modules",
            )
        _set_rows(parts[path], rows)
    model.config.get_text_config().vocab_size = rows
    return True


def _set_rows(module: torch.nn.Module, rows: int) -> None:
    for name, old in list(module.named_parameters(recurse=False)):
        new = missing((rows, *old.shape[1:]))
        # Whoever loads the weights first lets PEFT copy into them.
        setattr(module, name, new if is_missing(old) else nn.Parameter(new.clone().contiguous()))
    for name in ("num_embeddings", "out_features"):
        if hasattr(module, name):
            setattr(module, name, rows)


def _check_tokens(root: Path, rows: int) -> None:
    config = read_json(root / "adapter_config.json")
    for field in ("trainable_token_indices", "token_indices"):
        value = config.get(field)
        lists = value.values() if isinstance(value, dict) else [value]
        last = max((n for one in lists if isinstance(one, list) for n in one), default=0)
        if last >= rows:
            raise InputRefused(
                f"{root} trains token {last}; the embedding has {rows} rows",
                hint="resize the base's vocabulary as in training, or export the adapter with "
                "save_embedding_layers=True",
            )


def _tie_again(model: Model) -> None:
    """Tie tied parameters of which an adapter has saved one alone."""
    for names in dict(getattr(model, "all_tied_weights_keys", {})).items():
        both: list[nn.Parameter] = []
        for name in names:
            module, _, last = name.rpartition(".")
            for place in (name, f"{module}.base_layer.{last}"):  # PEFT may have wrapped it
                with suppress(AttributeError):
                    both.append(model.get_parameter(place))
                    break
        if len(both) < 2 or both[0].shape != both[1].shape:
            continue
        for one, other in (both, both[::-1]):
            if has_no_weights(one) and not has_no_weights(other):
                one.data = other.data


def replication(model: Model) -> list[int] | None:
    """Return the base layer of each layer if an adapter replicates layers, else None."""
    for config in model.peft_config.values():
        spans = getattr(config, "layer_replication", None)
        if spans:
            return [layer for first, last in spans for layer in range(first, last)]
    return None
