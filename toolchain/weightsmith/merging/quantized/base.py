"""The base's tensors under the user's choice for quantized bases; no torch or numpy here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from weightsmith.core.errors import InputRefused
from weightsmith.core.values import JsonValue
from weightsmith.merging.base import BaseTensors, stored_tensors
from weightsmith.merging.names import is_conv1d
from weightsmith.merging.outputs import StoredTensor, TensorSource
from weightsmith.merging.quantized.choice import refuse, simulates
from weightsmith.merging.quantized.layout import QuantizedLayout, quantization_of, read_layout
from weightsmith.merging.quantized.sources import Decoded, RoundedToNf4
from weightsmith.models.safetensors import CheckpointIndex, TensorInfo

STALE = frozenset({"quant_config.json", "quantize_config.json", "quant_log.csv"})
"""Files of quantized checkpoints that do not apply to plain weights."""
_IN_LAYER = re.compile(r"(?:.*\.)?\d+\..+\.weight")
_NOT_LINEAR = ("embed", "wte", "wpe", "relative_attention_bias", "norm", "shared")
_MIXTURES = (".experts.", ".router.", ".block_sparse_moe.")


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
        return _decoded(index, config)
    stored = stored_tensors(index)
    if simulates(choice):
        return _simulated(stored, config, choice)
    note = () if choice == "refuse" else ("the base is not quantized: nothing to dequantize",)
    return BaseView(tensors=stored, config=config, findings=note)


def _decoded(index: CheckpointIndex, config: Mapping[str, JsonValue]) -> BaseView:
    """Return a quantized base with every weight dequantized."""
    paths = {info.name: shard.path for shard in index.shards for info in shard.tensors}

    def read(info: TensorInfo) -> bytes:
        with paths[info.name].open("rb") as file:
            file.seek(info.start)
            return file.read(info.size)

    layout = read_layout(config, index.tensors, read)
    owners = layout.owners()
    sources: dict[str, TensorSource] = {}
    files = []
    for shard in index.shards:
        names = []
        for info in shard.tensors:
            name = _name(info, layout, owners)
            if not name:
                continue
            names.append(name)
            if weight := layout.packed.get(name):
                parts = {
                    p: StoredTensor(path=paths[i.name], info=i) for p, i in weight.parts.items()
                }
                sources[name] = Decoded(weight=weight, parts=parts)
            else:
                sources[name] = StoredTensor(path=shard.path, info=info)
        files.append((shard.path.name, tuple(names)))
    keys = [key for key in ("quantization_config", "compression_config") if key in config]
    what = f"{len(layout.packed)} weights of a {layout.method} base"
    return BaseView(
        tensors=BaseTensors(sources=sources, layout=tuple(files)),
        config={key: value for key, value in config.items() if key not in keys},
        dropped=tuple(keys),
        findings=(f"{what} were dequantized before the merge",),
        record={
            "choice": "dequantize",
            "method": layout.method,
            "tensors": len(layout.packed),
            "left_out": sorted(layout.dropped),
        },
    )


def _name(info: TensorInfo, layout: QuantizedLayout, owners: Mapping[str, str]) -> str:
    """Return the plain tensor that replaces a stored one, or ""."""
    if info.name in layout.dropped:
        return ""
    name = owners.get(info.name)
    if name is None:
        return info.name
    return name if layout.packed[name].parts["weight"].name == info.name else ""


def _simulated(stored: BaseTensors, config: Mapping[str, JsonValue], choice: str) -> BaseView:
    """Return a 16-bit base with its linear layers rounded to NF4, as in 4-bit training.

    bitsandbytes quantizes every linear layer but the head, not only the adapter's targets.
    """
    kind = str(config.get("model_type", ""))
    rounded: dict[str, TensorSource] = {}
    for name, source in stored.sources.items():
        module = name.removesuffix(".weight")
        if any(part in name for part in _MIXTURES) or is_conv1d(kind, module):
            raise InputRefused(
                f"4-bit training cannot be reproduced on this base: whether and in which order "
                f"bitsandbytes quantizes weights like {name} depends on its version",
                hint="merge with --quantized-base dequantize onto the quantized checkpoint used "
                "in training, or onto the unchanged 16-bit base",
            )
        if isinstance(source, StoredTensor) and _is_linear(name, source):
            rounded[name] = RoundedToNf4(source=source, double=choice.endswith("-double"))
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


def _is_linear(name: str, source: StoredTensor) -> bool:
    return (
        _IN_LAYER.fullmatch(name) is not None
        and len(source.shape) == 2
        and source.dtype in ("BF16", "F16", "F32")
        and not any(part in name for part in _NOT_LINEAR)
    )
