"""Further dimensions of a decoder in config.json, for counting parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import JsonValue

_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vision:
    """A vision tower's layers and widths; 0 layers for a model without one."""

    layers: int = 0
    hidden: int = 0
    intermediate: int = 0
    patches: int = 0
    """Of a picture; 0 if pictures keep their size."""
    windowed: bool = False
    """Whether some layers see only a part of the picture."""
    gated: bool = False
    """Whether the feed-forward has a gate."""
    merged: int = 1
    """Patches along each side that become one token before they are projected."""
    mergers: int = 1
    """Projections: one, and one for each layer whose output the decoder gets too."""

    @property
    def weights(self) -> int:
        """How many weights its layers have, at most."""
        width = self.intermediate or 3 * self.hidden
        return self.layers * self.hidden * (4 * self.hidden + 3 * width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrices:
    """Dimensions that affect a checkpoint's size; 0 if config.json does not set them."""

    experts: int
    """Routed experts per sparse layer."""
    sparse_layers: int
    """Layers with experts instead of a feed-forward network."""
    expert_width: int
    shared_experts: int
    shared_width: int
    """Width of shared experts, if it is set separately."""
    predicted_layers: int
    """Additional layers for multi-token prediction."""
    query_rank: int
    """Rank of the query projection in multi-head latent attention."""
    nope_head_dim: int
    """Part of each head without rotary embedding, in multi-head latent attention."""
    vision: Vision

    @classmethod
    def of(cls, text: Mapping[str, JsonValue], vision: JsonValue, layers: int) -> Matrices:
        """Read text config and `vision_config`; raises InputRefused for invalid numbers."""
        experts = next((count(text, name) for name in _EXPERTS if text.get(name)), 0)
        return cls(
            experts=experts,
            sparse_layers=_sparse_layers(text, layers) if experts else 0,
            expert_width=count(text, "moe_intermediate_size"),
            shared_experts=count(text, "n_shared_experts") or count(text, "moe_num_shared_experts"),
            shared_width=count(text, "shared_expert_intermediate_size"),
            predicted_layers=count(text, "num_nextn_predict_layers") if experts else 0,
            query_rank=count(text, "q_lora_rank"),
            nope_head_dim=count(text, "qk_nope_head_dim"),
            vision=_vision(vision),
        )


def _sparse_layers(text: Mapping[str, JsonValue], layers: int) -> int:
    step = count(text, "decoder_sparse_step") or count(text, "moe_layer_interval") or 1
    starts = ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers")
    first = next((count(text, name) for name in starts if text.get(name)), 0)
    end = text.get("moe_layer_end_index")
    last = layers - 1 if end is None or end == -1 else count(text, "moe_layer_end_index")
    listed = text.get("mlp_only_layers")
    plain = listed if isinstance(listed, list) else []
    return sum(first <= i <= last and (i + 1) % step == 0 and i not in plain for i in range(layers))


def _vision(tower: JsonValue) -> Vision:
    if not isinstance(tower, Mapping) or not tower.get("hidden_size"):
        return Vision()
    more = tower.get("deepstack_visual_indexes")
    return Vision(
        layers=count(tower, "num_hidden_layers") or count(tower, "depth"),
        # Qwen2-VL's hidden size is the decoder's.
        hidden=count(tower, "embed_dim") or count(tower, "hidden_size"),
        intermediate=count(tower, "intermediate_size"),
        patches=_patches(tower),
        windowed=bool(tower.get("window_size")),
        gated=tower.get("hidden_act") == "silu",
        merged=count(tower, "spatial_merge_size") or 1,
        mergers=1 + len(more) if isinstance(more, list) else 1,
    )


def _patches(tower: Mapping[str, JsonValue]) -> int:
    sizes = tower.get("image_size"), tower.get("patch_size")
    whole = all(isinstance(size, int) and size > 0 for size in sizes)
    return (count(tower, "image_size") // count(tower, "patch_size")) ** 2 if whole else 0


def count(config: Mapping[str, JsonValue], name: str) -> int:
    """Return a count, 0 if it is missing; raise InputRefused if it is invalid."""
    value = config.get(name) or 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 10_000_000:
        raise InputRefused(
            f"config.json: {name} is {value!r}, not a non-negative integer",
            hint="check the checkpoint's config.json",
        )
    return value
