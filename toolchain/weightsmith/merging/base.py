"""The base's tensors under the user's choice for quantized bases; no torch or numpy here.

The default is a refusal with the numbers: adapters do not record whether they were trained on 4-bit
weights, and both 16-bit bases are in use. Quantizing a merge again on the same grid is not offered,
because it erases small adapters.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import JsonValue
from weightsmith.merging.names import is_conv1d
from weightsmith.merging.outputs import Files, StoredTensor, TensorSource
from weightsmith.merging.quantized.layout import Packed, quantization_of, read_layout
from weightsmith.models.facts import whole
from weightsmith.models.predicting import predicting, predicting_tensors
from weightsmith.models.safetensors import CheckpointIndex, TensorInfo

if TYPE_CHECKING:
    import numpy as np

_LAYER = re.compile(
    r"(?P<before>(?:.*\.)?(?:layers|h|encoder\.layer))\.(?P<number>\d+)\.(?P<after>.+)"
)
Layers = tuple[tuple[int, int], ...]
"""PEFT's `layer_replication`: consecutive ranges of layers, end excluded."""
STALE = frozenset(
    {"hf_quant_config.json", "quant_config.json", "quantize_config.json", "quant_log.csv"}
)
"""Files of quantized checkpoints that do not apply to plain weights."""
_IN_LAYER = re.compile(r"(?:.*\.)?\d+\..+\.weight")
_NOT_LINEAR = ("embed", "wte", "wpe", "relative_attention_bias", "norm", "shared")
_MIXTURES = (".experts.", ".router.", ".block_sparse_moe.")
_ADVICE = (
    "choose one: (1) merge onto the original 16-bit checkpoint: a better base, but the adapter "
    "was trained with this one's rounding errors, which measured 1.5 to 46 times the adapter's "
    "own size; if the adapter was trained in 4-bit, --quantized-base simulate-nf4 with that base "
    "reproduces the training; (2) --quantized-base dequantize: dequantize this base to 16 bits "
    "and merge there, which reproduces the training and writes a plain 16-bit checkpoint. "
    "Requantizing the sum on the same grid is not offered: it kept only 0.2 % to 1.6 % of "
    "adapters up to a fiftieth of the weights' size"
)
_BYTES = 20
"""Bytes per element while dequantizing: codes, expanded scales and products in 32 bits, and the
result, of which two are kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseTensors:
    """Every tensor of the base by name, and the result's files with their tensor names in order."""

    sources: Mapping[str, TensorSource]
    layout: tuple[tuple[str, tuple[str, ...]], ...]


def replicate(
    base: BaseTensors, config: Mapping[str, JsonValue], layers: Layers
) -> tuple[BaseTensors, dict[str, JsonValue]]:
    """Return a base with the layers of the given ranges, renumbered, and its changed settings.

    PEFT shares the weights of replicas; here each has its own name, so that each can be changed
    separately. Same order as `replicate_layers` in PEFT's tuners_utils.py. The settings are
    config.json's layer counts and per-layer lists.
    """
    old = [number for first, end in layers for number in range(first, end)]
    names = ("num_hidden_layers", "n_layer", "num_layers")
    count = next((whole(config[name]) for name in names if name in config), 0)
    further = frozenset(predicting_tensors(config, base.sources))
    numbered = {name: m for name in base.sources if (m := _LAYER.fullmatch(name))}
    found = {int(match["number"]) for name, match in numbered.items() if name not in further}
    if not old or not set(old) <= found:
        raise InputRefused(
            f"layer_replication in adapter_config.json names layers {sorted(set(old) - found)}, "
            "which the base does not have",
            hint="the adapter was trained on another model",
        )
    copies: dict[str, list[str]] = {}
    for name in base.sources:
        match = numbered.get(name)
        if match is None:
            copies[name] = [name]
        elif name in further:  # those that are numbered on come behind the last copy
            moved = int(match["number"]) >= count
            copies[name] = [_renumbered(match, len(old) - count) if moved else name]
        else:
            copies[name] = [
                _renumbered(match, new - number)
                for new, number in enumerate(old)
                if number == int(match["number"])
            ]
    tensors = BaseTensors(
        sources={new: base.sources[name] for name, some in copies.items() for new in some},
        layout=tuple(
            (shard, tuple(new for name in names for new in copies[name]))
            for shard, names in base.layout
        ),
    )
    settings: dict[str, JsonValue] = {name: len(old) for name in names if name in config}
    for name, value in config.items():
        if isinstance(value, list) and len(value) == count and name.endswith(("types", "layers")):
            settings[name] = [value[number] for number in old]
    return tensors, settings


def _renumbered(match: re.Match[str], by: int) -> str:
    return f"{match['before']}.{int(match['number']) + by}.{match['after']}"


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


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseView:
    """The base's tensors as plain weights, its remaining configuration, and the choice made."""

    tensors: BaseTensors
    config: Mapping[str, JsonValue]
    dropped: tuple[str, ...] = ()
    """Keys of config.json that the result omits."""
    findings: tuple[str, ...] = ()
    record: Mapping[str, JsonValue] = field(default_factory=dict)


def base_view(index: CheckpointIndex, config: Mapping[str, JsonValue], choice: str) -> BaseView:
    """Return the base's tensors as plain weights.

    Raises InputRefused for a quantized base without a choice, one that cannot be dequantized, and
    a base on which 4-bit training cannot be reproduced.
    """
    method = quantization_of(config, index.tensors)
    if method and choice != "dequantize":
        raise refuse(index.root, method, simulates=simulates(choice))
    if method:
        return _decoded(index, config, method)
    stored = BaseTensors(
        sources={
            info.name: StoredTensor(path=shard.path, info=info)
            for shard in index.shards
            for info in shard.tensors
        },
        layout=tuple(
            (shard.path.name, tuple(info.name for info in shard.tensors)) for shard in index.shards
        ),
    )
    if simulates(choice):
        return _simulated(stored, config, choice)
    note = () if choice == "refuse" else ("the base is not quantized: nothing to dequantize",)
    return BaseView(tensors=stored, config=config, findings=note)


def refuse(base: Path, method: str, *, simulates: bool = False) -> InputRefused:
    """Return the error for a quantized base, with the choices and their drawbacks."""
    if simulates:
        return InputRefused(
            f"{base} is already quantized ({method}), but simulate-nf4 needs a 16-bit base",
            hint="use --quantized-base dequantize to merge onto this base's dequantized weights",
        )
    return InputRefused(f"{base} is quantized ({method})", hint=_ADVICE)


def simulates(choice: str) -> bool:
    """Return whether the choice rounds a 16-bit base to 4 bits first."""
    return choice.startswith("simulate-nf4")


def _decoded(index: CheckpointIndex, config: Mapping[str, JsonValue], method: str) -> BaseView:
    paths = {info.name: shard.path for shard in index.shards for info in shard.tensors}

    def read(info: TensorInfo) -> bytes:
        with paths[info.name].open("rb") as file:
            file.seek(info.start)
            return file.read(info.size)

    layout = read_layout(config, index.tensors, read)
    owners, kind = layout.owners(), str(config.get("model_type", ""))
    sources: dict[str, TensorSource] = {}
    files = []
    for shard in index.shards:
        names = []
        for info in shard.tensors:
            name = owners.get(info.name, info.name)
            weight = layout.packed.get(name)
            if info.name in layout.dropped or (weight and weight.parts["weight"] != info):
                continue  # of its tensors, a weight takes the place of its codes
            names.append(name)
            if weight:
                # Quantizers put a linear layer, which is (out, in), in a Conv1D's place.
                transposed = is_conv1d(kind, name.removesuffix(".weight"))
                sources[name] = _decoded_weight(weight, paths, transposed=transposed)
            else:
                sources[name] = StoredTensor(path=shard.path, info=info)
        files.append((shard.path.name, tuple(names)))
    keys = [key for key in ("quantization_config", "compression_config") if key in config]
    return BaseView(
        tensors=BaseTensors(sources=sources, layout=tuple(files)),
        config={key: value for key, value in config.items() if key not in keys},
        dropped=tuple(keys),
        findings=(
            f"{len(layout.packed)} weights of a {method} base were dequantized before the merge",
        ),
        record={
            "choice": "dequantize",
            "method": method,
            "tensors": len(layout.packed),
            "left_out": sorted(layout.dropped),
        },
    )


def _simulated(stored: BaseTensors, config: Mapping[str, JsonValue], choice: str) -> BaseView:
    """Return a 16-bit base with its linear layers rounded to NF4, as in 4-bit training.

    bitsandbytes quantizes every linear layer but the head, not only the adapter's targets.
    """
    kind, not_loaded = str(config.get("model_type", "")), predicting(config)
    rounded: dict[str, TensorSource] = {}
    for name, source in stored.sources.items():
        if not_loaded(name):  # as in training
            continue
        module = name.removesuffix(".weight")
        if any(part in name for part in _MIXTURES) or is_conv1d(kind, module):
            raise InputRefused(
                f"4-bit training cannot be reproduced on this base: whether and in which order "
                f"bitsandbytes quantizes weights like {name} depends on its version",
                hint="merge with --quantized-base dequantize onto the quantized checkpoint used "
                "in training, or onto the unchanged 16-bit base",
            )
        linear = _IN_LAYER.fullmatch(name) and not any(part in name for part in _NOT_LINEAR)
        plain = len(source.shape) == 2 and source.dtype in ("BF16", "F16", "F32")
        if isinstance(source, StoredTensor) and linear and plain:
            rounded[name] = _rounded_weight(source, double=choice.endswith("-double"))
    if not rounded:
        raise InputRefused(
            "the base has no linear layers that 4-bit training is known to quantize",
            hint="merge onto the unchanged 16-bit base",
        )
    blocks = " (block scales to 8 bits)" if choice.endswith("-double") else ""
    return BaseView(
        tensors=BaseTensors(sources={**stored.sources, **rounded}, layout=stored.layout),
        config=config,
        findings=(f"{len(rounded)} linear weights were rounded to NF4{blocks} before the merge",),
        record={"choice": choice, "method": "bitsandbytes nf4", "tensors": len(rounded)},
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ComputedSource:
    """A weight that is computed whole and kept, so that rows can be read from it."""

    dtype: str
    """The safetensors dtype of the values."""
    shape: tuple[int, ...]
    held_bytes: int
    """Memory that computing it takes; the last two are kept."""
    make: Callable[[Files], np.ndarray]
    """Computes the whole weight."""

    def rows(self, files: Files, first: int, count: int, columns: int) -> np.ndarray:
        """Return rows of the tensor viewed as a matrix with `columns` columns, in its own dtype."""
        whole = files.once(self, lambda: self.make(files))
        return whole.reshape(-1, columns)[first : first + count]


def _decoded_weight(
    weight: Packed, paths: Mapping[str, Path], *, transposed: bool
) -> ComputedSource:
    def make(files: Files) -> np.ndarray:
        import numpy as np

        from weightsmith.merging.quantized.decode import decode

        parts = {
            part: files.array(StoredTensor(path=paths[info.name], info=info))
            for part, info in weight.parts.items()
            if part not in ("state", "shape", "format")
        }
        values = decode(weight, parts)
        return np.ascontiguousarray(values.T) if transposed else values

    held = _BYTES * math.prod(weight.shape)
    shape = weight.shape[::-1] if transposed else weight.shape
    return ComputedSource(dtype=weight.dtype, shape=shape, held_bytes=held, make=make)


def _rounded_weight(source: StoredTensor, *, double: bool) -> ComputedSource:

    def make(files: Files) -> np.ndarray:
        from weightsmith.merging.quantized.decode import round_trip

        return round_trip(files.array(source), double=double)

    held = 4 * source.info.size  # input and output, of which two are kept
    return ComputedSource(dtype=source.dtype, shape=source.shape, held_bytes=held, make=make)
