"""Facts about a model, read once from its files for planners, quantizers and renderers.

Passed along, config.json had a rule for a missing key at each reader. A wrong number is refused
when it is needed, not when it is read: a model that cannot be planned can still be packaged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import SMALL, json_object, read_bytes
from weightsmith.core.values import JsonValue
from weightsmith.models.gguf_config import gguf_config
from weightsmith.models.matrices import Matrices
from weightsmith.models.packing import Packing
from weightsmith.models.positions import PositionSettings, whole
from weightsmith.models.shape import ModelShape, has_states_alone
from weightsmith.models.text import text_part

_STATEFUL = re.compile(
    "mamba|ssm|state_size|conv_kernel|linear_num|lora_rank|chunk|recurrent|retention|index_topk"
    "|global_head_dim|global_key_value|kv_shared|attn_layer|hybrid|cross_attention|compress|rwkv"
    "|hyena|per_layer_config|^swa_"
)
_SENTENCE_TRANSFORMERS = "modules.json"
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_KEPT = 1 << 20
"""Bytes of configurations whose facts stay in memory for who asks next."""
_GENERATES = re.compile(
    r"For(?:CausalLM|ConditionalGeneration|BlockDiffusion)|(?<!BERT)LMHead|Chat|Omni(?:Model|_)"
    r"|Ultravox|DecoderModel"
)
"""In names of classes that continue texts."""
_TASKS = (
    (r"For\w*Classification|ForMultipleChoice|ForNextSentence|Reward", "gives scores"),
    (r"ForMaskedLM|ForPreTraining|BERTLMHead", "fills gaps in texts"),
    (r"ForQuestionAnswering", "marks an answer in a text"),
    (r"For(?:CTC|RNNT|TDT)$", "writes down speech"),
    (r"For[A-Z]", "is for something else than to continue texts"),
    (r"(?:Model|Encoder|Backbone|Transformer|BERT)$|bert|^t5encoder$|-embedding$", "gives vectors"),
)
"""Pattern in the name of a class, or of a GGUF file's architecture -> what such models do."""
_Part = TypeVar("_Part")


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
    gives_vectors: bool
    """Whether a file says that sentence-transformers makes vectors of its outputs."""
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
    hidden: int
    tied_embeddings: bool | None
    """`tie_word_embeddings`; None if it is not set."""
    packing: Packing | None
    positions: PositionSettings
    stateful_keys: tuple[str, ...]
    """Keys of layers that cache something other than keys and values of every token."""
    tokenizer_class: str
    tokenizer_length: int
    """The tokenizer's limit in tokens; 0 for none."""
    read_shape: ModelShape | InputRefused
    read_matrices: Matrices | InputRefused

    @property
    def other_task(self) -> str:
        """What the model's class does instead of continuing texts; "" for one that does."""
        name = self.architecture
        if not name or _GENERATES.search(name):
            return ""
        return next((what for pattern, what in _TASKS if re.search(pattern, name)), "")

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
        gives_vectors: bool = False,
    ) -> ModelFacts:
        """Return the facts in a config.json and a tokenizer_config.json."""
        text, settings = text_part(config), tokenizer or {}
        architecture, dtype = _architecture(config), _dtype(config)
        tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
        shape = _read(lambda: ModelShape.of(text, architecture, dtype))
        return cls(
            architecture=architecture,
            model_type=str(config.get("model_type") or ""),
            text_model_type=str(text.get("model_type") or config.get("model_type") or ""),
            encoder_decoder=bool(config.get("is_encoder_decoder")),
            states_alone=has_states_alone(text),
            gives_vectors=gives_vectors,
            sees_images=isinstance(config.get("vision_config"), Mapping),
            text_architecture=_architecture(config.get("text_config")) or architecture,
            vision_architecture=_architecture(config.get("vision_config")) or architecture,
            describes_images=describes_images,
            stated_dtype=dtype,
            layers=whole(text.get("num_hidden_layers")),
            hidden=whole(text.get("hidden_size")),
            tied_embeddings=None if tied is None else bool(tied),
            packing=Packing.of(config.get("quantization_config")),
            positions=PositionSettings.of(text),
            stateful_keys=tuple(sorted(k for k in text if _STATEFUL.search(k) and text[k])),
            tokenizer_class=str(settings.get("tokenizer_class") or ""),
            tokenizer_length=whole(settings.get("model_max_length")),
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
        return ModelFacts.of(gguf_config(path))
    config = read_bytes(path / "config.json", SMALL)
    present: dict[str, bool] = {
        "describes_images": any((path / name).is_file() for name in _PROCESSORS),
        "gives_vectors": (path / _SENTENCE_TRANSFORMERS).is_file(),
    }
    try:
        tokenizer = read_bytes(path / "tokenizer_config.json", SMALL)
    except InputRefused:
        tokenizer = b""
    read = _facts if len(config) + len(tokenizer) <= _KEPT else _facts.__wrapped__
    return read(path, config, tokenizer, **present)


@lru_cache(maxsize=8)
def _facts(path: Path, config: bytes, tokenizer: bytes, **present: bool) -> ModelFacts:
    """Return the facts in two files with this content; a build asks for them ten times."""
    try:
        settings = json_object(tokenizer, str(path / "tokenizer_config.json"), unique=True)
    except InputRefused:
        settings = None
    model = json_object(config, str(path / "config.json"), unique=True)
    return ModelFacts.of(model, settings, **present)


def _read(reader: Callable[[], _Part]) -> _Part | InputRefused:
    """Return a part, or the error that reading it raises."""
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
