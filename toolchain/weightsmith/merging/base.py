"""The base's tensors: where each is read from, and which file its result is written to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import JsonValue
from weightsmith.merging.outputs import StoredTensor, TensorSource
from weightsmith.models.safetensors import CheckpointIndex

_LAYER = re.compile(
    r"(?P<before>(?:.*\.)?(?:layers|h|encoder\.layer))\.(?P<number>\d+)\.(?P<after>.+)"
)
Layers = tuple[tuple[int, int], ...]
"""PEFT's `layer_replication`: consecutive ranges of layers, end excluded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseTensors:
    """Every tensor of the base by name, and the result's files with their tensor names in order."""

    sources: Mapping[str, TensorSource]
    layout: tuple[tuple[str, tuple[str, ...]], ...]


def stored_tensors(index: CheckpointIndex) -> BaseTensors:
    """Return the base's tensors in the order of its files."""
    return BaseTensors(
        sources={
            info.name: StoredTensor(path=shard.path, info=info)
            for shard in index.shards
            for info in shard.tensors
        },
        layout=tuple(
            (shard.path.name, tuple(info.name for info in shard.tensors)) for shard in index.shards
        ),
    )


def replicate(base: BaseTensors, layers: Layers) -> BaseTensors:
    """Return a base with the layers of the given ranges, renumbered.

    PEFT shares the weights of replicas; here each has its own name, so that each can be changed
    separately. Same order as `replicate_layers` in PEFT's tuners_utils.py.
    """
    old = [number for first, end in layers for number in range(first, end)]
    found = {int(m["number"]) for name in base.sources if (m := _LAYER.fullmatch(name))}
    if not old or not set(old) <= found:
        raise InputRefused(
            f"layer_replication in adapter_config.json names layers {sorted(set(old) - found)}, "
            "which the base does not have",
            hint="the adapter was trained on another model",
        )
    copies: dict[str, list[str]] = {}
    for name in base.sources:
        match = _LAYER.fullmatch(name)
        copies[name] = (
            [
                f"{match['before']}.{new}.{match['after']}"
                for new, number in enumerate(old)
                if number == int(match["number"])
            ]
            if match
            else [name]
        )
    return BaseTensors(
        sources={new: base.sources[name] for name, some in copies.items() for new in some},
        layout=tuple(
            (shard, tuple(new for name in names for new in copies[name]))
            for shard, names in base.layout
        ),
    )


def replicated_settings(config: Mapping[str, JsonValue], layers: Layers) -> dict[str, JsonValue]:
    """Return config.json's settings for replicated layers: layer counts and per-layer lists."""
    old = [number for first, end in layers for number in range(first, end)]
    names = ("num_hidden_layers", "n_layer", "num_layers")
    settings: dict[str, JsonValue] = {name: len(old) for name in names if name in config}
    count = next((config[name] for name in names if name in config), 0)
    for name, value in config.items():
        if isinstance(value, list) and len(value) == count and name.endswith(("types", "layers")):
            settings[name] = [value[number] for number in old]
    return settings


def same_layers(configured: Sequence[Any]) -> Layers:
    """Return the `layer_replication` of all adapters; raise InputRefused if they differ."""
    try:
        found = {tuple((int(first), int(end)) for first, end in each or ()) for each in configured}
    except (TypeError, ValueError, OverflowError):
        raise InputRefused(
            "an adapter_config.json's layer_replication is not a list of pairs of layers",
            hint="export the adapter again with PEFT's save_pretrained",
        ) from None
    if len(found) > 1:
        raise InputRefused(
            "the adapters' layer_replication settings differ",
            hint="merge one of them, and train the others on the result",
        )
    return next(iter(found), ())
