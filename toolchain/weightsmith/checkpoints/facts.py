"""What a model is, read once from its files: what planners, quantizers and renderers ask."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from weightsmith.checkpoints.gguf_config import gguf_config
from weightsmith.checkpoints.matrices import Matrices
from weightsmith.checkpoints.packing import Packing
from weightsmith.checkpoints.positions import Positions
from weightsmith.checkpoints.shape import ModelShape
from weightsmith.checkpoints.text import text_part
from weightsmith.errors import InputRefused
from weightsmith.foreign import read_json
from weightsmith.values import Json

_STATEFUL = re.compile(
    "mamba|ssm|state_size|conv_kernel|linear_num|lora_rank|chunk|recurrent|retention|index_topk"
    "|global_head_dim|kv_shared|attn_layer|hybrid|cross_attention|compress|rwkv|hyena"
)
_Part = TypeVar("_Part")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """A model as its configuration describes it; nothing here is changed by who asks.

    Reading never refuses a configuration: `shape` and `matrices` raise, when they are asked for,
    what was wrong with the numbers, so that a model that cannot be planned can still be packaged.
    """

    architecture: str
    """The model class, such as `LlamaForCausalLM`; "" where the configuration names none."""
    model_type: str
    text_model_type: str
    """The same of the language model, which may be a part of the model."""
    encoder_decoder: bool
    sees_images: bool
    stated_dtype: str
    """The weights' type, such as `bfloat16`; "" where the configuration does not say."""
    layers: int
    """0 where the configuration does not say; `shape.layers` refuses that."""
    hidden: int
    tied_embeddings: bool | None
    """Whether the output layer is the embedding; None where the configuration does not say."""
    packing: Packing | None
    positions: Positions
    stateful_keys: tuple[str, ...]
    """Keys that tell of layers which keep something else than keys and values of every token."""
    tokenizer_class: str
    tokenizer_length: int
    """The tokenizer's own limit in tokens; 0 for none."""
    read_shape: ModelShape | InputRefused
    read_matrices: Matrices | InputRefused

    @property
    def shape(self) -> ModelShape:
        """The decoder's numbers; raises InputRefused where one is missing, wrong or absurd."""
        return _asked(self.read_shape)

    @property
    def matrices(self) -> Matrices:
        """What counts its parameters beside the shape; raises InputRefused as `shape` does."""
        return _asked(self.read_matrices)

    @property
    def weight_kinds(self) -> frozenset[str]:
        """The kinds of Format that its folder of safetensors may be served as."""
        return self.packing.kinds if self.packing else frozenset({"safetensors"})

    @classmethod
    def of(
        cls, config: Mapping[str, Json], tokenizer: Mapping[str, Json] | None = None
    ) -> ModelFacts:
        """Return the facts in a config.json and a tokenizer_config.json."""
        text, told = text_part(config), tokenizer or {}
        architecture, dtype = _architecture(config), _dtype(config)
        tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
        shape = _read(lambda: ModelShape.of(text, architecture, dtype))
        return cls(
            architecture=architecture,
            model_type=str(config.get("model_type") or ""),
            text_model_type=str(text.get("model_type") or config.get("model_type") or ""),
            encoder_decoder=bool(config.get("is_encoder_decoder")),
            sees_images=isinstance(config.get("vision_config"), Mapping),
            stated_dtype=dtype,
            layers=_whole(text.get("num_hidden_layers")),
            hidden=_whole(text.get("hidden_size")),
            tied_embeddings=None if tied is None else bool(tied),
            packing=Packing.of(config.get("quantization_config")),
            positions=Positions.of(text),
            stateful_keys=tuple(sorted(k for k in text if _STATEFUL.search(k) and text[k])),
            tokenizer_class=str(told.get("tokenizer_class") or ""),
            tokenizer_length=_whole(told.get("model_max_length")),
            read_shape=shape,
            read_matrices=shape
            if isinstance(shape, InputRefused)
            else _read(lambda: Matrices.of(text, config.get("vision_config"), shape.layers)),
        )


def read_facts(path: Path) -> ModelFacts:
    """Return the facts of a checkpoint's folder, or of a GGUF file by its header.

    Raises InputRefused for a GGUF file that is not readable, and where config.json is not JSON.
    """
    if path.suffix == ".gguf" and not path.is_dir():
        return ModelFacts.of(gguf_config(path))
    config = read_json(path / "config.json")
    try:
        return ModelFacts.of(config, read_json(path / "tokenizer_config.json"))
    except InputRefused:
        return ModelFacts.of(config)


def _read(reader: Callable[[], _Part]) -> _Part | InputRefused:
    """Return a part, or why it cannot be read."""
    try:
        return reader()
    except InputRefused as refused:
        return refused


def _asked(part: _Part | InputRefused) -> _Part:
    if isinstance(part, InputRefused):
        raise InputRefused(part.message, hint=part.hint)
    return part


def _architecture(config: Mapping[str, Json]) -> str:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def _dtype(config: Mapping[str, Json]) -> str:
    inner = config.get("text_config")
    for place in (inner if isinstance(inner, Mapping) else {}, config):
        for name in ("dtype", "torch_dtype"):
            if isinstance(place.get(name), str):
                return str(place[name]).removeprefix("torch.")
    return ""


def _whole(value: Json) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
