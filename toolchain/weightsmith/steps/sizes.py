"""What is foreseen of files that are not there: weights, results, and the memory to calibrate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import INDEX, parse_file
from weightsmith.core.values import FileEntry, Format, JsonValue, Sources, Tree, UnreadDigest
from weightsmith.evaluating.walks import LETTERS
from weightsmith.forward.memory import BATCH_TOKENS, START, UNKNOWN, token_bytes
from weightsmith.models.facts import ModelFacts, read_facts
from weightsmith.models.folder import check_model_folder, pickles_in
from weightsmith.quantizers import of_format
from weightsmith.quantizers.architectures import converted_as, has_projector
from weightsmith.quantizers.calibration import Texts
from weightsmith.quantizers.gguf_mix import fewest_bits
from weightsmith.quantizers.gguf_planned import (
    AS_LLAMA,
    OF_70B,
    QKV,
    MixedLayers,
    Part,
    planned_bits,
)
from weightsmith.quantizers.running import BLOCK
from weightsmith.serving.architectures import check_served
from weightsmith.serving.engine import Projector
from weightsmith.serving.parameters import NO_WEIGHTS, is_gated, is_tied, weights_from_config
from weightsmith.serving.targets import Target

_INDEX_FILE = "model.safetensors.index.json"
_FROM_INDEX = f"{NO_WEIGHTS}{_INDEX_FILE}'s"
_FROM_CONFIG = f"{NO_WEIGHTS}worked out from config.json, an estimate"
_SHARD = 5_000_000_000
"""The largest file that transformers writes."""
_COPIES = 3
"""Of a layer in float32 that is calibrated: itself, as it was, and a group of its matrices."""
_SQUARES = 12
"""Float32 numbers per pair of inputs while errors are compensated: two Gram matrices, and five in
float64 (`quantizers/layerwise/quantizing.py`)."""


_NORMS = 0.01
"""Share of the weights that may be norms and biases, which count as the others."""


class _BitsOfRows(Protocol):
    def __call__(
        self, columns: int, part: Part, layer: int = ..., /, *, stacked: bool = ...
    ) -> float: ...


class ForeseenTree(Tree):
    """A folder without weights, and the files that will hold them."""

    __slots__ = ()

    @property
    def note(self) -> str:
        """Where the size of the weights is from."""
        return expected_weights(self.root, read_facts(self.root))[1]


def foreseen(sources: Sources) -> tuple[Sources, str]:
    """Return the sources with the base's weights by their expected size, and where that is from.

    They are returned as they are, with "", if the weights are there. Raises InputRefused for a size
    that cannot be worked out, for weights that are there as pickles, and for what is no model.
    """
    tree = sources.base.tree
    is_model = tree.has("config.json") and not tree.has("adapter_config.json")
    if not is_model or (not tree.weight_bytes and pickles_in(tree.root)):
        check_model_folder(tree.root)
    if tree.weight_bytes:
        return sources, ""
    size, note = expected_weights(tree.root, read_facts(tree.root))
    count = -(-size // _SHARD)
    weights = tuple(
        FileEntry(
            path=f"model-{number:05}-of-{count:05}.safetensors",
            size=size * number // count - size * (number - 1) // count,
            digest=UnreadDigest.of(b"%d of %d" % (number, size)),
        )
        for number in range(1, count + 1)
    )
    whole = ForeseenTree(root=tree.root, files=(*tree.files, *weights), places=tree.places)
    return replace(sources, base=replace(sources.base, tree=whole)), note


def expected_weights(folder: Path, model: ModelFacts) -> tuple[int, str]:
    """Return the bytes of the weights that a folder lacks, and a note that says how it is known.

    Raises InputRefused for a model that no target serves, and if neither its index nor its
    config.json says.
    """
    check_served(model)  # what it is comes before what its config.json lacks
    try:
        size = parse_file(folder / _INDEX_FILE, largest=INDEX)["metadata"]["total_size"]
    except (OSError, ValueError, KeyError, TypeError):
        size = 0
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size, _FROM_INDEX
    return weights_from_config(model), _FROM_CONFIG


def estimated_bytes(checkpoint_bytes: int, format_: Format, model: ModelFacts | None = None) -> int:
    """Return the estimated size of an artifact in bytes, from nominal bits per weight.

    The checkpoint has 16 bits per weight unless its config.json says 32. Packed checkpoints keep
    the embeddings, and a separate output layer, in 16 bits; in GGUF files, rows that are not whole
    blocks of their type have more bits than nominal.
    """
    if not format_.packed:
        return checkpoint_bytes
    if model and model.stated_dtype == "float32":
        checkpoint_bytes //= 2
    kept = kept_bytes(checkpoint_bytes, format_, model)
    bits = None
    if model and format_.suffix == ".gguf":
        bits = _mean_bits(format_, model, (checkpoint_bytes - kept) // 2)
    return kept + int((checkpoint_bytes - kept) * (bits or format_.bits_per_weight) / 16)


def _mean_bits(format_: Format, model: ModelFacts, weights: int) -> float | None:
    """Return the bits per weight of a decoder's matrices by the types that they get, or None."""
    try:
        shape, experts = model.shape, model.matrices.experts
    except InputRefused:
        return None
    name, group = converted_as(model), shape.heads // max(1, shape.kv_heads)
    of = MixedLayers(
        layers=shape.layers,
        group=group,
        experts=experts,
        falcon=name == "FalconForCausalLM",
        is_70b=shape.layers == OF_70B.get(name) and (group > 1 or name not in AS_LLAMA),
    )
    return _mean(model, partial(planned_bits, format_, of), weights)


def fewest_mixed_bits(model: ModelFacts, *, low: bool) -> float:
    """Return the bits per weight of the smallest mix of llama.cpp's types, or fewer."""

    def bits(columns: int, *_: object, **__: object) -> float:  # each may have any type
        return fewest_bits(low=low, columns=columns)

    least = fewest_bits(low=low)
    try:
        # Only of a dense decoder each matrix is counted with its own width.
        counted = not (model.matrices.experts or model.shape.kv_lora_rank)
    except InputRefused:
        return least
    mean = _mean(model, bits) if counted else None
    return round(mean, 6) if mean else least


def _mean(model: ModelFacts, bits: _BitsOfRows, weights: int = 0) -> float | None:
    """Return the mean over a decoder's matrices, which have so many weights, if that is known."""
    try:
        shape, parts = model.shape, model.matrices
    except InputRefused:
        return None
    hidden, table = shape.hidden, shape.vocab * shape.hidden
    counted = [(table, bits(hidden, "head"))]
    if not (tied := is_tied(model)):
        counted.append((table, bits(hidden, "embedding")))
    if beside := parts.per_layer_width:
        counted.append((shape.vocab * beside, bits(beside, "head" if tied else "embedding")))
    states = sum(part.layers for part in shape.cache if part.kind == "state")
    caches = sum(part.layers for part in shape.cache) - states
    attends = caches if states else shape.layers
    attended = shape.heads * shape.v_head_dim
    # llama.cpp gives joined matrices the type of V.
    q: Part = "v" if converted_as(model) in QKV else "q"
    k: Part = "v" if converted_as(model) in QKV else "k"
    places: Sequence[int] = range(attends)
    if parts.linear_rows and attends:  # one layer in so many attends, the others are linear
        places = range(shape.layers // attends - 1, shape.layers, shape.layers // attends)
        linear = (bits(hidden, "v", n) for n in range(shape.layers) if n not in places)
        counted += [(parts.linear_rows * hidden, each) for each in linear]
    for layer in places:
        counted.append((attended * hidden, bits(attended, "o", layer)))
        if not shape.kv_lora_rank:  # the factors of latent attention are the rest
            counted += [
                (hidden * shape.heads * shape.head_dim, bits(hidden, q, layer)),
                (hidden * shape.kv_heads * shape.head_dim, bits(hidden, k, layer)),
                (hidden * shape.kv_heads * shape.v_head_dim, bits(hidden, "v", layer)),
            ]
    # Each layer of Nemotron-H is one of attention, a state or a feed-forward network.
    lone = shape.architecture.startswith("NemotronH")
    networks = shape.layers - (attends + states if lone else 0)
    ups, width = 2 if is_gated(model) else 1, parts.expert_width or shape.intermediate
    shared = parts.shared_experts * width + parts.shared_width
    dense = networks - parts.sparse_layers if parts.experts else networks
    for layer in range(networks):
        inner = shape.intermediate if layer < dense else shared
        mlp = inner * hidden
        if mlp:
            up = bits(hidden, "up", layer)
            counted += [(ups * mlp, up), (mlp, bits(inner, "down", layer))]
        if layer >= dense:
            stack = parts.experts * width * hidden
            up = bits(hidden, "up", layer, stacked=True)
            counted += [(ups * stack, up), (stack, bits(width, "down", layer, stacked=True))]
    rest = weights - sum(n for n, _ in counted)
    if rest > _NORMS * weights:
        counted.append((rest, bits(hidden, "other")))
    return sum(n * each for n, each in counted) / sum(n for n, _ in counted)


def expected_projector(target: Target, model: ModelFacts) -> Projector | None:
    """Return the projector that a target's GGUF file will have beside it, and its size, about."""
    size = projector_bytes(model) if "gguf" in target.engine.accepts else 0
    return Projector(size=size) if size else None


def disk_peak(
    checkpoint_bytes: int, format_: Format, model: ModelFacts, options: Mapping[str, JsonValue]
) -> int:
    """Return the peak disk usage, in bytes, of making and storing an artifact."""
    if not format_.packed:
        return checkpoint_bytes
    kept = kept_bytes(checkpoint_bytes, format_, model)
    return of_format(format_.name).peak_disk(checkpoint_bytes, kept, format_, options)


def kept_bytes(checkpoint_bytes: int, format_: Format, model: ModelFacts | None) -> int:
    """Return the bytes that stay in 16 bits in a packed checkpoint: embeddings, head and tower.

    Beside a GGUF file, that is the projector.
    """
    if model is None:
        return 0
    if format_.suffix == ".gguf":
        return min(checkpoint_bytes, projector_bytes(model))
    tables = 1 if is_tied(model) else 2
    weights = tables * model.shape.vocab * model.shape.hidden + model.matrices.vision.weights
    return min(checkpoint_bytes, 2 * weights)


def projector_bytes(model: ModelFacts) -> int:
    """Return about how large a model's projector for llama.cpp is; 0 if it has none."""
    return max(1, 2 * model.matrices.vision.weights) if has_projector(model) else 0


def calibration_memory(model: ModelFacts, size: int, texts: Texts, *, compensated: bool) -> int:
    """Return the peak in bytes of a walk over calibration text, one decoder layer at a time.

    The sum of libraries, the states of all text, the layer in float32, and one batch's activations
    or what it takes to compensate errors, if that is more. `size` is the checkpoint's, in bytes.
    """
    try:
        shape, experts = model.shape, model.matrices.expert_width
    except InputRefused:
        return UNKNOWN
    tokens = texts.letters // LETTERS + BATCH_TOKENS
    states = shape.hidden + BLOCK + 2 * shape.head_dim  # with a mask, and rotary factors
    if compensated:
        states += shape.hidden  # in front of the layer, which runs more than once
    if compensated and experts:  # their inputs are kept until the layer has run
        states += 2 * shape.hidden + 4 * experts
    batch = token_bytes(
        layers=0, cached=0, hidden=shape.hidden, intermediate=max(shape.intermediate, experts)
    )
    table = 2 * shape.vocab * shape.hidden  # of embeddings, which no layer has
    layer = 2 * max(0, size - table) // max(1, model.layers)
    widest = max(shape.hidden, shape.intermediate, experts)
    copies, squares = (_COPIES, 4 * _SQUARES * widest**2) if compensated else (1, 0)
    return START + 4 * tokens * states + copies * layer + max(BATCH_TOKENS * batch, squares)
