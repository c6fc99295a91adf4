"""Mixes of llama.cpp's types: which may be mixed, and those of a file within a budget.

Types with blocks of 256 weights err less for their bits, and need rows of whole blocks; rows of
other lengths have the types of 32. Types below four bits are mixed only where they are allowed. A
tensor without measured losses, such as one that the converter computes, becomes Q8_0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.kernels import quants
from weightsmith.core.safe_parse import RECORD, parse_file
from weightsmith.core.values import JsonValue
from weightsmith.models.facts import ModelFacts
from weightsmith.quantizers import mixing
from weightsmith.quantizers.gguf_header import GgufTensorInfo
from weightsmith.quantizers.gguf_types import FILE_TYPES, MIX, TENSOR_TYPES

UNMIXED = "q8_0"
"""The file type whose types tensors have that are not chosen, and the largest that is."""
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
LOSS, BOUND = "weightsmith.mix.loss", "weightsmith.mix.bound"
"""GGUF keys: what the chosen types are expected to lose in nats per token, and what the best
choice of the same size loses at least."""
Losses = Mapping[str, Mapping[str, float]]
"""Tensor -> type -> what the model loses by it, in nats per token."""

LOSS_TOKENS = 2048
"""Losses are means over so many tokens, in windows from all parts of the text."""
_OF_32 = ("MXFP4", "Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
_OF_256 = ("IQ4_XS", "Q4_K", "Q5_K", "Q6_K")
_LOW = ("Q2_K", "Q3_K", "IQ3_S")
_FEWEST, _FEWEST_LOW, _MOST = 4.25, 2.625, 16
"""Bits per weight of the smallest types, and of the checkpoint."""
_ADDED = 4096
"""Bytes that keys of ours may add to a header."""
_PADDING = 32
_FLOATS = frozenset({"f32", "f16", "bf16", "f64"})
_GUESSED = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m", "mxfp4": "mxfp4_moe"}
"""The file type that llama.cpp takes a file to have without one, where most tensors have this type
(llama-model-loader.cpp)."""
_LAYER = re.compile(r"(?:^blk|\.layers)\.(\d+)\.")
"""In llama.cpp's names, and in those of checkpoints."""
_BUDGETS = ("bits", "size", "fit", "mix")
_HOW = (
    "set one of quantize.bits (--bits 4.4), quantize.size (--size 8GB), quantize.fit (gpu, in a"
    " recipe) and quantize.mix (--mix FILE)"
)


def kinds_of_rows(columns: int, *, low: bool) -> tuple[str, ...]:
    """Return the types that rows of so many weights may have."""
    if columns % 32:
        return ()
    if columns % 256:
        return _OF_32
    return (*_OF_32, *_OF_256, *(_LOW if low else ()))


def fewest_bits(*, low: bool, columns: int = 256) -> float:
    """Return the bits per weight of the smallest type that rows of so many weights may have."""
    if columns % 32:
        return _MOST
    return _FEWEST_LOW if low and columns % 256 == 0 else _FEWEST


def budget_options(
    requested: Mapping[str, JsonValue], fewest: float = 0, *, name: str = MIX.name
) -> dict[str, JsonValue]:
    """Return what a mix is made of: `bits`, `size` in bytes, or a file's `mix`.

    `fewest` are the bits of the smallest type, of llama.cpp's by default. Raises UsageError unless
    it is exactly one of them, and for bits below the smallest type's.
    """
    given = {name: requested[name] for name in _BUDGETS if requested.get(name)}
    if len(given) != 1:
        what = " and ".join(f"quantize.{name}" for name in given)
        raise UsageError(
            f"{what} cannot be combined" if given else f"the format {name} needs a budget",
            hint=_HOW,
        )
    low = bool(requested.get("allow_low_bits")) and not fewest
    bits, least = given.get("bits"), fewest or fewest_bits(low=low)
    if isinstance(bits, int | float) and not least <= bits <= _MOST:
        raise UsageError(
            f"quantize.bits: {bits:g} is not between {least:g}, the bits of the "
            f"smallest type, and {_MOST}",
            hint=f"set quantize.bits to {min(max(bits, least), _MOST):g}"
            + (
                ""
                if low or fewest
                else "; quantize.allow_low_bits (--allow-low-bits) adds smaller types"
            ),
        )
    return {**given, **({"low": True} if low and "mix" not in given else {})}


def read_mix(path: Path, kinds: Iterable[str] = ()) -> dict[str, str]:
    """Return the types in a mix's file, `{"tensor_types": {TENSOR: TYPE}}`, or in a build.json.

    Types are in lower case, and some of `kinds`, llama.cpp's by default. Raises InputRefused for
    anything else.
    """
    one = '"model.layers.0.self_attn.q_proj": "fp8"' if kinds else '"blk.0.attn_q.weight": "q4_k"'
    wanted = f'give a build.json, or {{"tensor_types": {{{one}, …}}}}'
    try:
        data = parse_file(path, largest=RECORD, unique=True)  # of two types one would win
    except OSError as error:
        raise InputRefused(f"cannot read {path}: {error.strerror}", hint=wanted) from None
    except ValueError as error:
        raise InputRefused(f"{path} is not JSON: {error}", hint=wanted) from None
    for key in ("artifact", "details"):
        data = data[key] if isinstance(data, dict) and isinstance(data.get(key), dict) else data
    types = data.get("tensor_types") if isinstance(data, dict) else None
    if not isinstance(types, dict) or not types:
        raise InputRefused(f"{path} has no tensor_types", hint=wanted)
    own = (row.name for row in TENSOR_TYPES.values() if row.selectable)
    names, engine = sorted(kinds or own), "vLLM's mix" if kinds else "llama.cpp"
    for tensor, kind in types.items():
        if not isinstance(kind, str) or kind.lower() not in names:
            raise InputRefused(
                f"{path}: {engine} has no type {str(kind)[:40]!r} for {tensor[:80]!r}",
                hint=f"types: {', '.join(names)}",
            )
    return {tensor: kind.lower() for tensor, kind in sorted(types.items())}


def check_layers(model: ModelFacts, chosen: Mapping[str, JsonValue]) -> None:
    """Raise InputRefused for a mix's file of another number of layers, before any work."""
    if not isinstance(given := chosen.get("mix"), dict):
        return
    named = {int(found[1]) for name in given if (found := _LAYER.search(name))}
    lacking = sorted(set(range(model.layers)) - named)
    more = sorted(one for one in named if one >= model.layers + model.predicting_layers)
    if lacking or (more and model.layers):
        what = f"no type for layer {lacking[0]}" if lacking else f"a type for layer {more[0]}"
        raise InputRefused(
            f"the mix is of another model: it has {what}, and this one has {model.layers} layers",
            hint="give the mix of a model with the same layers and widths, or a budget",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixed:
    """The types of a file's tensors."""

    types: Mapping[str, str]
    """Tensor -> type, in lower case, of all that llama-quantize quantizes."""
    about: Mapping[str, str]
    """Keys of the file."""


def guessed_type(kinds: Iterable[str]) -> str:
    """Return the file type of a file whose tensors have these types: that of most, but floats."""
    counts = Counter(kind.lower() for kind in kinds if kind.lower() not in _FLOATS)
    most = max(sorted(counts), key=lambda kind: counts[kind], default=UNMIXED)
    name = _GUESSED.get(most, most)
    return name if name in FILE_TYPES else UNMIXED


def mixed(
    wanted: Mapping[str, JsonValue],
    tensors: Mapping[str, GgufTensorInfo],
    targets: Mapping[str, tuple[str, bool]],
    losses: Losses,
    headers: int,
) -> Mixed:
    """Return the types that `budget_options` asks for.

    `targets` are, of all tensors, the type as an `UNMIXED` file and whether it is quantized;
    `headers` are the bytes before the data. Raises InputRefused for a budget below the smallest
    types, and for the mix of another model.
    """
    chosen = {name for name, (_, quantized) in targets.items() if quantized}
    if isinstance(given := wanted.get("mix"), dict):
        return Mixed(types=_given(given, tensors, chosen), about={})
    sizes = {name: _size(kind, tensors[name]) for name, (kind, _) in targets.items()}
    fixed = sum(size for name, size in sizes.items() if name not in chosen)
    choices = {
        name: [
            mixing.Choice(kind, _size(kind, tensors[name]), loss)
            # None were measured of a tensor whose rows are no whole blocks of any type.
            for kind, loss in (losses.get(name) or {targets[name][0]: 0.0}).items()
        ]
        for name in chosen
    }
    if bits := wanted.get("bits"):
        weights = sum(each.rows * each.columns for each in tensors.values())
        whole, before = int(float(str(bits)) * weights / 8), 0
    else:
        whole, before = int(str(wanted["size"])), headers + _ADDED + _PADDING * len(tensors)
    left, least = whole - before - fixed, mixing.smallest(choices)
    if left < least:
        weights = sum(each.rows * each.columns for each in tensors.values())
        smallest = (least + fixed) * 8 / weights
        size = least + fixed + headers + _ADDED + _PADDING * len(tensors)
        raise InputRefused(
            f"no mix is that small: the smallest has {smallest:.3f} bits per weight,"
            f" {-(-size // 10**6)}MB",
            hint=f"set quantize.bits to {int(smallest * 1000 + 1) / 1000:g}, or quantize.size to"
            f" {-(-size // 10**6)}MB"
            + ("" if wanted.get("low") else ", or quantize.allow_low_bits for smaller types"),
        )
    found = mixing.choose(choices, left)
    return Mixed(
        types={name: kind.lower() for name, kind in found.kinds.items()},
        about={LOSS: f"{found.loss:.6g}", BOUND: f"{min(found.bound, found.loss):.6g}"},
    )


def _size(kind: str, tensor: GgufTensorInfo) -> int:
    return quants.row_bytes(kind, tensor.columns) * tensor.rows


def _others(names: Sequence[str]) -> str:
    return f" and {len(names) - 1} others" if len(names) > 1 else ""


def _given(
    types: Mapping[str, str], tensors: Mapping[str, GgufTensorInfo], chosen: set[str]
) -> dict[str, str]:
    """Return the types of a mix's file; raise InputRefused unless it is one of this model."""
    hint = "give the mix of a model with the same layers, widths and vocabulary, or a budget"
    if unknown := sorted(types.keys() - tensors.keys()):
        raise InputRefused(
            f"the mix is of another model: this one has no {unknown[0][:80]!r}{_others(unknown)}",
            hint=hint,
        )
    if lacking := sorted(chosen - types.keys()):
        raise InputRefused(
            f"the mix is of another model: it has no type for {lacking[0]}{_others(lacking)}",
            hint=hint,
        )
    for name in sorted(chosen):
        if tensors[name].columns % TENSOR_TYPES[types[name]].block:
            raise InputRefused(
                f"{name} cannot have the type {types[name]}: its rows of {tensors[name].columns} "
                f"weights are no multiple of {TENSOR_TYPES[types[name]].block}",
                hint=hint,
            )
    return {name: types[name] for name in chosen}
