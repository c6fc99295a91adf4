"""Facts about a model, read once from its files for planners, quantizers and renderers.

Passed along, config.json had a rule for a missing key at each reader. A wrong number is refused
when it is needed, not when it is read: a model that cannot be planned can still be packaged.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import TypeVar, cast

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import SMALL, json_object, read_bytes
from weightsmith.core.values import JsonValue
from weightsmith.models.gguf_config import gguf_config, gguf_pooling
from weightsmith.models.shape import ModelShape, has_states_alone
from weightsmith.models.task import (
    NO_SENTENCES,
    ModelTask,
    SentenceTransformers,
    read_sentence_transformers,
    task_of,
)
from weightsmith.models.templates import own_template

_STATEFUL = re.compile(
    "mamba|ssm|state_size|conv_kernel|linear_num|lora_rank|chunk|recurrent|retention|index_topk"
    "|global_head_dim|global_key_value|kv_shared|attn_layer|hybrid|cross_attention|compress|rwkv"
    "|hyena|per_layer_config|^swa_"
)
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_OFFSET = frozenset({"camembert", "roberta", "xlm-roberta"})
"""Model types whose first position is the one behind `pad_token_id` (transformers,
create_position_ids_from_input_ids), so that texts may have fewer tokens than there are positions.
"""
_KEPT = 1 << 20
"""Bytes of configurations whose facts stay in memory for who asks next."""
_Part = TypeVar("_Part")
_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
"""Keys of the length (vLLM 0.33, model_arch_config_convertor.py)."""
PREDICTING = (
    "num_nextn_predict_layers",
    "mtp_num_hidden_layers",
    "mtp_num_layers",
    "num_mtp_layers",
    "num_nextn_layers",
)
"""Keys of the number of layers that predict further tokens."""
_EXPERTS = ("num_local_experts", "n_routed_experts", "num_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """The layout of quantized weights."""

    method: str
    """`quant_method`, such as `awq`, `gptq`, `fp8` or `compressed-tensors`; "" if it is not set."""
    bits: int
    """Bits per weight; 4 if it is not set, 0 if it is invalid."""
    group_size: int
    """Weights per scale, the largest where several are; -1 for a whole row."""
    symmetric: bool
    reordered: bool
    """GPTQ's `desc_act`: columns are ordered by activations."""
    block: tuple[int, ...]
    """`weight_block_size`: rows and columns per scale; () if it is not set."""
    kinds: frozenset[str]
    """Kinds of Format with which it can be served; empty if no target supports it."""

    @classmethod
    def of(cls, value: JsonValue) -> Packing | None:
        """Read a `quantization_config`; return None if the weights are not quantized."""
        if not value:
            return None
        settings = value if isinstance(value, Mapping) else {}
        method, block = str(settings.get("quant_method", "")), settings.get("weight_block_size")
        return cls(
            method=method,
            bits=_whole(settings.get("bits", settings.get("w_bit", 4))),
            group_size=max(_group_sizes(settings), default=-1),
            symmetric=settings.get("sym") is not False,
            reordered=settings.get("desc_act") is True,
            block=tuple(map(_whole, block if isinstance(block, list) else [block]))
            if block
            else (),
            kinds=_kinds(method, settings),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionSettings:
    """Lengths and rope parameters; numbers are 0 if they are not set."""

    lengths: tuple[int, ...]
    """Every configured length, in tokens."""
    scaling: str
    """The rope type, such as `llama3`, `yarn` or `linear`; `default` for no scaling."""
    factor: float
    """Rope's scaling factor; 0 if it is not a number up to 1000."""
    original: int
    """The length before scaling."""
    theta: float
    """`rope_theta` in `rope_parameters`."""
    transformers_5_only: bool
    """Only `rope_parameters` has the theta, which transformers 4 does not read."""

    @classmethod
    def of(cls, text: Mapping[str, JsonValue]) -> PositionSettings:
        """Read them from the text config."""
        parameters = text.get("rope_parameters")
        both = (parameters, text.get("rope_scaling"))
        found = next((one for one in both if isinstance(one, Mapping)), {})
        nested = found.get("full_attention")  # transformers 5: one per kind of layer
        rope = nested if isinstance(nested, Mapping) else found
        factor = _number(rope.get("factor", 1.0))
        original = rope.get("original_max_position_embeddings")
        return cls(
            lengths=tuple(filter(None, (whole(text.get(key)) for key in _LENGTHS))),
            scaling=str(rope.get("rope_type") or rope.get("type") or "default"),
            factor=factor if 0 < factor <= 1000 else 0,
            original=whole(original or text.get("original_max_position_embeddings")),
            theta=_number(parameters.get("rope_theta")) if isinstance(parameters, Mapping) else 0,
            transformers_5_only=isinstance(parameters, Mapping) and "rope_theta" not in text,
        )


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
    linear_rows: int
    """Rows of Q, K and V together in a layer of linear attention; 0 for other models."""
    per_layer_width: int
    """Width of Gemma 3n's second embedding, of which each layer has a part; 0 for other models."""
    nope_head_dim: int
    """Part of each head without rotary embedding, in multi-head latent attention."""
    vision: Vision

    @classmethod
    def of(cls, text: Mapping[str, JsonValue], vision: JsonValue, layers: int) -> Matrices:
        """Read text config and `vision_config`; raises InputRefused for invalid numbers."""
        experts = next((count(text, name) for name in _EXPERTS if text.get(name)), 0)
        sparse = _sparse_layers(text, layers) if experts else 0
        return cls(
            # A Nemotron-H that transformers 5 saved counts experts that no layer has.
            experts=0 if text.get("model_type") == _NEMOTRON_H and not sparse else experts,
            sparse_layers=sparse,
            expert_width=count(text, "moe_intermediate_size"),
            shared_experts=count(text, "n_shared_experts") or count(text, "moe_num_shared_experts"),
            shared_width=count(text, "shared_expert_intermediate_size"),
            predicted_layers=count(text, "num_nextn_predict_layers") if experts else 0,
            query_rank=count(text, "q_lora_rank"),
            linear_rows=sum(
                n * count(text, f"linear_num_{of}_heads") * count(text, f"linear_{of}_head_dim")
                for n, of in ((2, "key"), (1, "value"))
            ),
            per_layer_width=layers * count(text, "hidden_size_per_layer_input"),
            nope_head_dim=count(text, "qk_nope_head_dim"),
            vision=_vision(vision),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model's facts according to its configuration.

    Reading never refuses a configuration: invalid numbers raise only when `shape` or `matrices` is
    used, so that a model that cannot be planned can still be packaged.
    """

    architecture: str
    """The model class, such as `LlamaForCausalLM`; "" if it is not set."""
    model_type: str
    text_model_type: str
    """The language model's, which may be only a part of the model."""
    encoder_decoder: bool
    states_alone: bool
    """Whether no layer attends: it has states in place of keys and values, as Mamba and RWKV do."""
    sees_images: bool
    text_architecture: str
    """The language model's own class, or the model's."""
    vision_architecture: str
    """The vision tower's own class, or the model's."""
    describes_images: bool
    """Whether a file says how its pictures are prepared."""
    stated_dtype: str
    """The weights' dtype, such as `bfloat16`; "" if it is not set."""
    layers: int
    """0 if it is not set, which `shape` refuses."""
    predicting_layers: int
    """Layers behind these that predict further tokens (multi-token prediction, MTP)."""
    hidden: int
    tied_embeddings: bool | None
    """`tie_word_embeddings`; None if it is not set."""
    packing: Packing | None
    positions: PositionSettings
    query_scalar: float
    """`query_pre_attn_scalar`; 0 if it is not set."""
    stateful_keys: tuple[str, ...]
    """Keys of layers that cache something other than keys and values of every token."""
    switches: Mapping[str, bool]
    """The language model's settings that are true or false."""
    chat_template: str
    """"" without one."""
    tokenizer_class: str
    tokenizer_length: int
    """The tokenizer's limit in tokens; 0 for none."""
    read_task: ModelTask | InputRefused
    read_shape: ModelShape | InputRefused
    read_matrices: Matrices | InputRefused

    @property
    def task(self) -> ModelTask:
        """What it is asked for; raises InputRefused if files that say so are invalid."""
        return _checked(self.read_task)

    @property
    def shape(self) -> ModelShape:
        """The decoder's dimensions; raises InputRefused if one is missing or invalid."""
        return _checked(self.read_shape)

    @property
    def matrices(self) -> Matrices:
        """Further dimensions for counting parameters; raises InputRefused as `shape` does."""
        return _checked(self.read_matrices)

    @property
    def weight_kinds(self) -> frozenset[str]:
        """The kinds of Format with which its folder of safetensors can be served."""
        return self.packing.kinds if self.packing else frozenset({"safetensors"})

    @classmethod
    def of(
        cls,
        config: Mapping[str, JsonValue],
        tokenizer: Mapping[str, JsonValue] | None = None,
        *,
        describes_images: bool = False,
        sentence: SentenceTransformers | InputRefused = NO_SENTENCES,
        chat_template: str = "",
    ) -> ModelFacts:
        """Return the facts in a config.json and a tokenizer_config.json."""
        cut = sentence.most_tokens if isinstance(sentence, SentenceTransformers) else 0
        text, settings = _usable(text_part(config), cut), tokenizer or {}
        architecture, dtype = _architecture(config), _dtype(config)
        tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
        shape = _read(lambda: ModelShape.of(text, architecture, dtype))
        return cls(
            architecture=architecture,
            model_type=str(config.get("model_type") or ""),
            text_model_type=str(text.get("model_type") or config.get("model_type") or ""),
            encoder_decoder=bool(config.get("is_encoder_decoder")),
            states_alone=has_states_alone(text),
            sees_images=isinstance(config.get("vision_config"), Mapping),
            text_architecture=_architecture(config.get("text_config")) or architecture,
            vision_architecture=_architecture(config.get("vision_config")) or architecture,
            describes_images=describes_images,
            stated_dtype=dtype,
            layers=whole(text.get("num_hidden_layers")),
            predicting_layers=next((n for key in PREDICTING if (n := whole(text.get(key)))), 0),
            hidden=whole(text.get("hidden_size")),
            tied_embeddings=None if tied is None else bool(tied),
            packing=Packing.of(config.get("quantization_config")),
            positions=PositionSettings.of(text),
            query_scalar=_number(text.get("query_pre_attn_scalar")),
            stateful_keys=tuple(sorted(k for k in text if _STATEFUL.search(k) and text[k])),
            switches={name: value for name, value in text.items() if isinstance(value, bool)},
            chat_template=chat_template,
            tokenizer_class=str(settings.get("tokenizer_class") or ""),
            tokenizer_length=whole(settings.get("model_max_length")),
            read_task=sentence
            if isinstance(sentence, InputRefused)
            else _read(lambda: task_of(config, sentence)),
            read_shape=shape,
            read_matrices=shape
            if isinstance(shape, InputRefused)
            else _read(lambda: Matrices.of(text, config.get("vision_config"), shape.layers)),
        )


def read_facts(path: Path) -> ModelFacts:
    """Return the facts of a checkpoint's folder, or of a GGUF file by its header.

    Raises InputRefused for an invalid GGUF file or config.json.
    """
    if path.suffix == ".gguf" and not path.is_dir():
        stated = gguf_config(path)
        return ModelFacts.of(stated, sentence=gguf_pooling(stated))
    config = read_bytes(path / "config.json", SMALL)
    images = any((path / name).is_file() for name in _PROCESSORS)
    sentence = _read(lambda: read_sentence_transformers(path))
    try:
        tokenizer = read_bytes(path / "tokenizer_config.json", SMALL)
    except InputRefused:
        tokenizer = b""
    try:
        template = own_template(path) or ""
    except InputRefused:
        template = ""  # whoever needs it says why
    size = len(config) + len(tokenizer) + len(template)
    read = _facts if size <= _KEPT else _facts.__wrapped__
    return read(path, config, tokenizer, template, images, sentence)


@lru_cache(maxsize=8)
def _facts(
    path: Path,
    config: bytes,
    tokenizer: bytes,
    template: str,
    describes_images: bool,
    sentence: SentenceTransformers | InputRefused,
) -> ModelFacts:
    """Return the facts in files with this content; a build asks for them ten times."""
    try:
        settings = json_object(tokenizer, str(path / "tokenizer_config.json"), unique=True)
    except InputRefused:
        settings = None
    model = json_object(config, str(path / "config.json"), unique=True)
    return ModelFacts.of(
        model,
        settings,
        describes_images=describes_images,
        sentence=sentence,
        chat_template=template,
    )


def _usable(text: Mapping[str, JsonValue], cut: int) -> Mapping[str, JsonValue]:
    """Return a configuration whose positions are those that a text's tokens can have.

    `cut` is after how many tokens sentence-transformers cuts texts off; 0 for never.
    """
    name, pad = "max_position_embeddings", text.get("pad_token_id", 1)
    count = whole(text.get(name))
    if str(text.get("model_type")) in _OFFSET and isinstance(pad, int):
        count -= pad + 1
    count = min(count, cut) if cut else count
    return text if count == text.get(name) or count <= 0 else {**text, name: count}


def _read(reader: Callable[[], _Part]) -> _Part | InputRefused:
    try:
        return reader()
    except InputRefused as refused:
        return refused


def _checked(part: _Part | InputRefused) -> _Part:
    if isinstance(part, InputRefused):
        raise InputRefused(part.message, hint=part.hint)
    return part


def _architecture(config: JsonValue) -> str:
    names = config.get("architectures") if isinstance(config, Mapping) else None
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def _dtype(config: Mapping[str, JsonValue]) -> str:
    inner = config.get("text_config")
    for place in (inner if isinstance(inner, Mapping) else {}, config):
        for name in ("dtype", "torch_dtype"):
            if isinstance(place.get(name), str):
                return str(place[name]).removeprefix("torch.")
    return ""


_NEMOTRON_H = "nemotron_h"
_HEADS = ("num_key_value_heads", "head_dim")
"""What many classes work out from other numbers, and some set: Qwen 3's heads are 128 wide."""


def text_part(config: Mapping[str, JsonValue]) -> Mapping[str, JsonValue]:
    """Return the language model's configuration: `text_config` with its class's defaults.

    Without a `text_config`, the whole configuration, which is complete but for what people leave
    out who write it themselves (`_HEADS`). Multimodal checkpoints such as Gemma 3 store only values
    that differ from the defaults (`PretrainedConfig.to_diff_dict`): Gemma 3 4B has no number of
    heads.
    """
    text = config.get("text_config")
    if isinstance(text, Mapping):
        return {**_defaults().get(str(text.get("model_type")), {}), **text}
    own = _defaults().get(str(config.get("model_type")), {})
    missing = {name: own[name] for name in _HEADS if name in own and name not in config}
    return {**missing, **config} if missing else config


@cache
def _defaults() -> Mapping[str, Mapping[str, int]]:
    """Return model type -> its class's defaults; a test compares them with transformers."""
    text = resources.files(__package__).joinpath("text_defaults.json").read_text("utf-8")
    return cast("Mapping[str, Mapping[str, int]]", json.loads(text))


def whole(value: JsonValue) -> int:
    """Return a whole number above 0, and 0 for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _number(value: JsonValue) -> float:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else 0


def _whole(value: JsonValue) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


_MODELOPT = {"FP8": "modelopt-fp8", "NVFP4": "modelopt-nvfp4", "W4A16_AWQ": "modelopt-awq"}


def _kinds(method: str, settings: Mapping[str, JsonValue]) -> frozenset[str]:
    """Return the kinds of Format that engines load.

    compressed-tensors with 4-bit weights may be AWQ or GPTQ; with other integers it is that.
    """
    if method in {"awq", "gptq", "fp8", "mxfp4"}:
        return frozenset({method})
    if method == "modelopt":
        kind = _MODELOPT.get(str(settings.get("quant_algo")))
        return frozenset({kind} if kind else ())
    if method != "compressed-tensors":
        return frozenset()
    found = set[str]()
    for weights in _weight_schemes(settings):
        if weights.get("type") == "float" and weights.get("num_bits") == 8:
            found.add("mxfp8" if _whole(weights.get("group_size")) == 32 else "fp8")
        if weights.get("type") == "float" and weights.get("num_bits") == 4:
            found |= {16: {"nvfp4"}, 32: {"mxfp4"}}.get(_whole(weights.get("group_size")), set())
        if weights.get("type") == "int" and weights.get("num_bits") == 4:
            found |= {"awq", "gptq"}
        if weights.get("type") == "int" and weights.get("num_bits") in {2, 3, 5, 8}:
            found.add("compressed-tensors")
    return frozenset(found)


def _weight_schemes(settings: Mapping[str, JsonValue]) -> Iterator[Mapping[str, JsonValue]]:
    """Yield how each of compressed-tensors' groups of modules has its weights."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            yield weights


def _group_sizes(settings: Mapping[str, JsonValue]) -> Iterator[int]:
    """Yield every number of weights per scale that a `quantization_config` has."""
    for one in (settings, *_weight_schemes(settings)):
        if "group_size" in one:
            yield _whole(one["group_size"])


def _sparse_layers(text: Mapping[str, JsonValue], layers: int) -> int:
    if text.get("model_type") == _NEMOTRON_H:
        blocks = text.get("layers_block_type") or text.get("hybrid_override_pattern")
        return sum(one in ("moe", "E") for one in blocks) if isinstance(blocks, list | str) else 0
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
    sizes = tower.get("image_size"), tower.get("patch_size")
    fixed = all(isinstance(size, int) and size > 0 for size in sizes)
    return Vision(
        layers=count(tower, "num_hidden_layers") or count(tower, "depth"),
        # Qwen2-VL's hidden size is the decoder's.
        hidden=count(tower, "embed_dim") or count(tower, "hidden_size"),
        intermediate=count(tower, "intermediate_size"),
        patches=(count(tower, "image_size") // count(tower, "patch_size")) ** 2 if fixed else 0,
        windowed=bool(tower.get("window_size")),
        gated=tower.get("hidden_act") == "silu",
        merged=count(tower, "spatial_merge_size") or 1,
        mergers=1 + len(more) if isinstance(more, list) else 1,
    )


def count(config: Mapping[str, JsonValue], name: str) -> int:
    """Return a count, 0 if it is missing; raise InputRefused if it is invalid."""
    value = config.get(name) or 0
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 10_000_000:
        raise InputRefused(
            f"config.json: {name} is {value!r}, not a non-negative integer",
            hint="check the checkpoint's config.json",
        )
    return value
