"""What config.json says of a decoder's matrices beside its shape: enough to count parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightsmith.errors import InputRefused
from weightsmith.values import Json

_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vision:
    """A vision tower: its layers and their widths; 0 layers for a model without one."""

    layers: int = 0
    hidden: int = 0
    intermediate: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrices:
    """Numbers that decide what a checkpoint weighs; 0 for what config.json does not name."""

    experts: int
    """Routed experts of a sparse layer."""
    sparse_layers: int
    """Layers that have experts instead of one feed-forward."""
    expert_width: int
    shared_experts: int
    shared_width: int
    """Width of an expert that sees every token, where it has one of its own."""
    predicted_layers: int
    """Further layers at the end for multi-token prediction, which the files have."""
    query_rank: int
    """Width that queries are factored through, in multi-head latent attention."""
    nope_head_dim: int
    """Part of each head without rotary positions, in multi-head latent attention."""
    vision: Vision

    @classmethod
    def of(cls, text: Mapping[str, Json], vision: Json, layers: int) -> Matrices:
        """Read the text model's part and `vision_config`; raises InputRefused for odd numbers."""
        experts = next((count(text, name) for name in _EXPERTS if text.get(name)), 0)
        return cls(
            experts=experts,
            sparse_layers=_sparse_layers(text, layers) if experts else 0,
            expert_width=count(text, "moe_intermediate_size"),
            shared_experts=count(text, "n_shared_experts"),
            shared_width=count(text, "shared_expert_intermediate_size"),
            predicted_layers=count(text, "num_nextn_predict_layers") if experts else 0,
            query_rank=count(text, "q_lora_rank"),
            nope_head_dim=count(text, "qk_nope_head_dim"),
            vision=_vision(vision),
        )


def _sparse_layers(text: Mapping[str, Json], layers: int) -> int:
    step = count(text, "decoder_sparse_step") or 1
    first = count(text, "first_k_dense_replace")
    listed = text.get("mlp_only_layers")
    plain = listed if isinstance(listed, list) else []
    return sum(i >= first and (i + 1) % step == 0 and i not in plain for i in range(layers))


def _vision(tower: Json) -> Vision:
    if not isinstance(tower, Mapping) or not tower.get("hidden_size"):
        return Vision()
    return Vision(
        layers=count(tower, "num_hidden_layers"),
        hidden=count(tower, "hidden_size"),
        intermediate=count(tower, "intermediate_size"),
    )


def count(config: Mapping[str, Json], name: str) -> int:
    """Return a number of things, 0 where it is not there; InputRefused for anything else."""
    value = config.get(name) or 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 10_000_000:
        raise InputRefused(
            f"config.json: {name} is {value!r}, not a whole number from 0 on",
            hint="check the checkpoint's config.json",
        )
    return value
