"""LoRA and its variants: W + factor · B·A for all layers that PEFT supports."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from weightsmith.core.errors import InputRefused
from weightsmith.merging.claim import SHOWN, AdapterView, Claim, Family, Variant
from weightsmith.merging.dora import Dora
from weightsmith.merging.duplicates import same_transposed
from weightsmith.merging.families import experts, fused_slices
from weightsmith.merging.kasa import Kasa
from weightsmith.merging.names import CONV1D_MODELS, is_conv1d, module_key, plain_module
from weightsmith.merging.outputs import MatrixView, Term, matrix_columns
from weightsmith.merging.tying import has_head, is_embedding, is_head
from weightsmith.models.safetensors import TensorInfo

_KEY = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_(?:embedding_)?[AB]|lora_magnitude_vector|lora_diag"
    r"|lora_velora_embed|lora_monteclora_sampler)(?P<rest>(?:\.[^.]+)*)"
)
_REST = re.compile(r"(?:\.(?!weight$|bias$)[^.]+)?(?P<end>\.weight|\.bias)?")
_SETTINGS = {
    "lora_magnitude_vector": "use_dora",
    "lora_diag": "kasa_config",
    "lora_B.bias": "lora_bias",
}
"""Part of a module's keys -> the setting that it belongs to."""
_TRAINING_ONLY = ("lora_velora_embed", "lora_monteclora_sampler")


@dataclass(slots=True)
class ModuleKeys:
    """The keys of one wrapped module, by role."""

    raw: str
    """The module's name in the file."""
    module: str
    keys: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def _claim(view: AdapterView) -> Iterator[Claim]:
    mismatches: list[str] = []
    stacks: dict[str, list[experts.FactorPair]] = {}
    groups = _groups(view)
    split: dict[str, tuple[TensorInfo, TensorInfo]] = {}
    roles: set[str] = set()
    tied_copy = _has_tied_copy(view, groups)
    for group in groups.values():
        if group.unused:
            yield Claim(keys=tuple(group.unused), module=group.module)
        if not group.keys:
            continue
        a, b = _factors(view, group)
        if len(a.shape) == 2 and experts.is_expert(view, group.module):
            stacks.setdefault(group.module, []).append(experts.FactorPair(group.raw, a, b))
        elif len(a.shape) == 2 and fused_slices.is_piece(view, group.module):
            split[group.module] = a, b
            roles.update(group.keys)
        elif tied_copy and view.is_head(group.module):
            # The embedding's factors, transposed: already applied to the shared weight.
            yield Claim(keys=(a.name, b.name), module=group.module)
        else:
            yield from _layer(view, group, (a, b), tied_copy, mismatches)
    for module, pairs in stacks.items():
        yield from experts.claims(view, module, pairs)
    yield from fused_slices.claims(view, split, sorted(roles))
    if mismatches:
        raise InputRefused(
            f"{view.path} was trained on another model: {len(mismatches)} shapes differ, such as "
            + "; ".join(mismatches[:SHOWN]),
            hint=f"its adapter_config.json names the base {view.config.base_model or '(none)'!r}",
        )


FAMILY = Family(
    name="lora",
    kinds=frozenset({"LORA"}),
    claim=_claim,
    variants=(
        Variant(name="LoRA on linear layers", how="exact: W + s·BA, rounded once"),
        Variant(name="LoRA on transposed layers (Conv1D, `fan_in_fan_out`)", how="exact"),
        Variant(name="LoRA on Conv1d, Conv2d, Conv3d", how="exact; not with groups > 1"),
        Variant(name="LoRA on embeddings and heads", how="exact; tied ones are untied if needed"),
        Variant(name="LoRA on MultiheadAttention", how="exact: in_proj and out_proj"),
        Variant(
            name="`target_parameters`: matrices and stacked experts",
            how="exact, also for bases with one tensor per expert",
        ),
        Variant(name="LoRA on layers that the base stores in one tensor", how="exact; LoRA alone"),
        Variant(name="`layer_replication`", how="exact: every replica is written out"),
        Variant(name="`rank_pattern`, `alpha_pattern`, `use_rslora`", how="exact"),
        Variant(name="`lora_bias`", how="exact: b + s·bias; the base must have a bias"),
        Variant(name="MiCA, VeLoRA, MonteCLoRA, EVA, orthogonal", how="exact, like plain LoRA"),
        Variant(name="BD-LoRA", how="exact, as block-diagonal factors"),
        Variant(name="DoRA", how="float64, rounded once"),
        Variant(name="KaSA", how="float64 singular values, rounded once"),
    ),
)


def module_of(name: str) -> str:
    """Return the wrapped module of a key without PEFT's prefix, as named in the file, or ""."""
    match = _KEY.fullmatch(name)
    return match["module"] if match else ""


def _groups(view: AdapterView) -> dict[str, ModuleKeys]:
    """Group the family's keys by module."""
    groups: dict[str, ModuleKeys] = {}
    for key in view.keys:
        match = _KEY.fullmatch(module_key(key))
        if not match:
            continue
        raw, part = match["module"], match["part"]
        group = groups.setdefault(raw, ModuleKeys(raw=raw, module=plain_module(raw)))
        if part in _TRAINING_ONLY:
            group.unused.append(key)
            continue
        rest = _REST.fullmatch(match["rest"])
        if not rest:
            continue
        role = part + (".bias" if rest["end"] == ".bias" else "")
        if role in group.keys:
            raise InputRefused(
                f"{view.path}: duplicate {role} for {raw}: {group.keys[role]} and {key}",
                hint="export one adapter per folder",
            )
        group.keys[role] = key
    return {raw: group for raw, group in groups.items() if group.keys or group.unused}


def _has_tied_copy(view: AdapterView, groups: dict[str, ModuleKeys]) -> bool:
    """Return whether a tied head has its embedding's factors (`ensure_weight_tying`)."""
    embeddings = [g for g in groups.values() if "lora_embedding_A" in g.keys]
    heads = [g for g in groups.values() if view.is_head(g.module) and "lora_A" in g.keys]
    if not view.tie or len(embeddings) != 1 or len(heads) != 1:
        return False
    a, b = _factors(view, embeddings[0])
    head_a, head_b = _factors(view, heads[0])
    return same_transposed(view.file, a, head_b) and same_transposed(view.file, b, head_a)


def _layer(
    view: AdapterView,
    group: ModuleKeys,
    factors: tuple[TensorInfo, TensorInfo],
    tied_copy: bool,
    mismatches: list[str],
) -> Iterator[Claim]:
    """Yield the claims of one layer; append shapes that do not match to `mismatches`."""
    a, b = factors
    embedding = "lora_embedding_A" in group.keys
    parameter = "weight"
    if not embedding and not view.find(group.module):
        parameter = "in_proj_weight" if view.find(group.module, "in_proj_weight") else "weight"
    if is_embedding(group.module) and _is_shared_by_stacks(view):
        raise _encoder_decoder_error(view, group.module)
    target = view.need(group.module, parameter)
    view.require_plain(group.module)
    shape = _shape(view, group, target)
    if embedding and _may_be_tied(view, group.module, shape):
        raise InputRefused(
            f"{view.path} has LoRA on {group.module}, which may be an embedding tied to the head: "
            "the base stores no head",
            hint="serve it unmerged, or train it without the embeddings in target_modules",
        )
    left, right = _oriented(view, group, shape, a, b)
    scaling = view.config.scaling(view.config.pattern_name(group.module))
    term = Term(
        adapter=view.index, left=left, right=right, scaling=scaling, factor=view.factor(scaling)
    )
    columns = matrix_columns(shape)
    if (shape[0], columns) != term.shape:
        mismatches.append(f"{target}: base {list(shape)}, adapter {list(term.shape)}")
        return
    claim = Claim(
        keys=(a.name, b.name), module=group.module, target=target, columns=columns, terms=(term,)
    )
    both = embedding and bool(view.tie) and (tied_copy or view.config.ties(group.module))
    yield replace(_variant(view, group, claim), both=both)
    if "lora_B.bias" in group.keys:
        yield _bias(view, group, scaling)
    elif view.config.raw.get("lora_bias") and not embedding:
        raise _incomplete(view, "lora_bias", group.module, "lora_B.bias")


def _is_shared_by_stacks(view: AdapterView) -> bool:
    """Return whether encoder and decoder share an embedding; Whisper's decoder has its own."""
    both = bool(view.base_config.get("is_encoder_decoder"))
    tables = [name for name in view.sources if is_embedding(name.removesuffix(".weight"))]
    return both and not all(".decoder." in f".{name}" for name in tables)


def _encoder_decoder_error(view: AdapterView, module: str) -> InputRefused:
    """Return the error: encoder, decoder and head share an embedding, but PEFT adapts only one."""
    return InputRefused(
        f"{view.path} has LoRA on {module}, whose embedding is shared by encoder and decoder: "
        + (
            "neither uses it by this name, so the factors had no effect in training"
            if module.rpartition(".")[2] == "shared"
            else "a merge would need separate embeddings, which most programs do not load"
        ),
        hint="train it without the embeddings in target_modules; train new words with "
        "trainable_token_indices, which can be merged",
    )


def _may_be_tied(view: AdapterView, module: str, shape: tuple[int, ...]) -> bool:
    """Return whether an embedding with an unknown name may be tied to a head without weights."""
    words = shape[0] == view.base_config.get("vocab_size")
    unknown = view.tie is None and words and not is_embedding(module)
    headless = not any(is_head(name.removesuffix(".weight")) for name in view.sources)
    return unknown and headless and has_head(view.base_config)


def _has_copy(module: str) -> bool:
    """Return whether PEFT may save the base's weight with the factors (resized vocabularies)."""
    return is_embedding(module) or is_head(module)


def _shape(view: AdapterView, group: ModuleKeys, target: str) -> tuple[int, ...]:
    """Return the shape of the weight that the factors change: the adapter's copy, if any."""
    for prefix in ("base_model.model.", "") if _has_copy(group.module) else ():
        if info := view.keys.get(f"{prefix}{group.raw}.base_layer.weight"):
            return info.shape
    return view.shape(target)


def _factors(view: AdapterView, group: ModuleKeys) -> tuple[TensorInfo, TensorInfo]:
    """Return A and B; raise InputRefused if one is missing or has an unsupported dtype or shape."""
    embedding = "lora_embedding_A" in group.keys or "lora_embedding_B" in group.keys
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if not all(name in group.keys for name in names):
        raise InputRefused(
            f"{view.path}: {group.module} has only one of lora_A and lora_B",
            hint="the adapter is incomplete; export it again with save_pretrained",
        )
    a, b = (view.keys[group.keys[name]] for name in names)
    for info in (a, b):
        if info.dtype not in ("F32", "F16", "BF16"):
            raise InputRefused(
                f"{view.path}: {info.name} has the unsupported dtype {info.dtype}",
                hint="save the adapter in float32, float16 or bfloat16",
            )
    if len(a.shape) != len(b.shape) or not 2 <= len(a.shape) <= 5 or 0 in (*a.shape, *b.shape):
        raise InputRefused(
            f"{view.path}: {group.module} has invalid LoRA shapes (lora_A {list(a.shape)},"
            f" lora_B {list(b.shape)})",
            hint="sharded training may save empty or flat tensors: gather them before saving",
        )
    return a, b


def _oriented(
    view: AdapterView, group: ModuleKeys, shape: tuple[int, ...], a: TensorInfo, b: TensorInfo
) -> tuple[MatrixView, MatrixView]:
    """Return (left, right) in the layout of the base's weight."""
    a_blocks, b_blocks = _blocks(view, group)
    right = MatrixView(stored=view.stored(a.name), height=a.shape[0], blocks=a_blocks)
    left = MatrixView(stored=view.stored(b.name), height=b.shape[0], blocks=b_blocks)
    _check_rank(view, group.module, right.shape[0], left.shape[1])
    if len(a.shape) > 2 and math.prod(b.shape[2:]) != 1:
        raise InputRefused(
            f"{view.path}: {b.name} is not a 1x1 convolution, as in PEFT",
            hint="export the adapter again with PEFT's save_pretrained",
        )
    embedding = "lora_embedding_A" in group.keys
    if embedding or (len(a.shape) == 2 and _is_transposed(view, group.module, shape, left, right)):
        return right.transpose, left.transpose
    return left, right


def _blocks(view: AdapterView, group: ModuleKeys) -> tuple[int, int]:
    """Return the numbers of diagonal blocks of A and B (PEFT's `BdLoraLinearVariant`)."""
    raw = view.config.raw.get("use_bdlora")
    if not isinstance(raw, dict) or "lora_embedding_A" in group.keys:
        return 1, 1
    count = int(raw.get("nblocks") or 1)
    last = group.module.rpartition(".")[2]
    for place, name in enumerate(("target_modules_bd_a", "target_modules_bd_b")):
        if any(pattern in last for pattern in raw.get(name) or ()):
            return (count, 1) if place == 0 else (1, count)
    return 1, 1


def _check_rank(view: AdapterView, module: str, a: int, b: int) -> None:
    rank = view.config.rank(view.config.pattern_name(module))
    if not a == b == rank:
        raise InputRefused(
            f"{view.path}: {module} has rank {a} in lora_A and {b} in lora_B,"
            f" but {rank} in adapter_config.json",
            hint="configuration and weights are from different trainings; export both together",
        )


def _variant(view: AdapterView, group: ModuleKeys, claim: Claim) -> Claim:
    """Return the claim, changed to DoRA's or KaSA's if the module has their keys."""
    (term,) = claim.terms
    _check_settings(view, group)
    # These scale the base too, so the adapter's weight applies to the whole change.
    plain = replace(term, factor=term.scaling)
    if magnitude := group.keys.get("lora_magnitude_vector"):
        return replace(
            claim,
            keys=(*claim.keys, magnitude),
            terms=(),
            change=Dora(
                term=plain, magnitude=view.stored(magnitude), by_column=term.left.transposed
            ),
        )
    if view.config.raw.get("use_dora"):
        raise _incomplete(view, "use_dora", claim.module, "lora_magnitude_vector")
    if diagonal := group.keys.get("lora_diag"):
        change = Kasa(term=plain, diagonal=view.stored(diagonal))
        return replace(claim, keys=(*claim.keys, diagonal), terms=(), change=change)
    if view.config.raw.get("kasa_config") and not is_head(claim.module):
        raise _incomplete(view, "kasa_config", claim.module, "lora_diag")
    return claim


def _check_settings(view: AdapterView, group: ModuleKeys) -> None:
    """Refuse weights without the setting that makes PEFT load them."""
    for part, setting in _SETTINGS.items():
        if part in group.keys and not view.config.raw.get(setting):
            raise InputRefused(
                f"{view.path}: {group.module} has {part}, but adapter_config.json does not set "
                f"{setting}, without which PEFT ignores it",
                hint=f"set {setting} if the adapter was trained with it; else export it again",
            )


def _incomplete(view: AdapterView, setting: str, module: str, key: str) -> InputRefused:
    return InputRefused(
        f"{view.path}: adapter_config.json sets {setting}, but {module} has no {key}",
        hint="the adapter is incomplete; export it again with save_pretrained",
    )


def _bias(view: AdapterView, group: ModuleKeys, scaling: float) -> Claim:
    """Return the claim b + scaling · bias: a rank-1 term on the bias as a column."""
    key = group.keys["lora_B.bias"]
    target = view.find(group.module, "bias")
    shape = view.keys[key].shape
    if not target or view.sources[target].shape != shape:
        raise InputRefused(
            f"{view.path} has a LoRA bias for {group.module}, but that layer has no bias",
            hint="PEFT cannot merge this either: serve the adapter unmerged, or train it without "
            "lora_bias",
        )
    part = MatrixView(stored=view.stored(key), height=shape[0])
    factor = view.factor(scaling)
    term = Term(adapter=view.index, left=part, right=None, scaling=scaling, factor=factor)
    return Claim(keys=(key,), module=group.module, target=target, columns=1, terms=(term,))


def _is_transposed(
    view: AdapterView, module: str, shape: tuple[int, ...], b: MatrixView, a: MatrixView
) -> bool:
    """Return whether the base stores (in, out).

    As in PEFT, the layer's class overrides `fan_in_fan_out`. If the class is unknown, the shape
    decides, and a square matrix with `fan_in_fan_out` is refused.
    """
    straight = (b.shape[0], a.shape[1])
    kind = str(view.base_config.get("model_type", ""))
    if kind in CONV1D_MODELS:
        return is_conv1d(kind, module)
    if not view.config.fan_in_fan_out or straight[0] != straight[1]:
        return view.config.fan_in_fan_out and shape == straight[::-1]
    raise InputRefused(
        f"{view.path} sets fan_in_fan_out, but {module} is square, and whether "
        f"{kind or 'this model'!r} stores weights transposed is unknown",
        hint="set fan_in_fan_out to false in adapter_config.json if its layers are nn.Linear",
    )
