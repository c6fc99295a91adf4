"""LoRA and its variants: W + factor · B·A for all layers that PEFT supports.

DoRA and KaSA are computed in float64 and rounded once, without a certificate: integers are possible
here too, but slow, and the last bit differs only about once in 10^10 elements.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from weightsmith.core.errors import InputRefused
from weightsmith.merging.claim import SHOWN, AdapterView, Claim, Family
from weightsmith.merging.combining.changes import Adder, adder
from weightsmith.merging.families import experts
from weightsmith.merging.families.experts import FactorPair
from weightsmith.merging.names import (
    CONV1D_MODELS,
    SplitParameter,
    is_conv1d,
    module_key,
    plain_module,
)
from weightsmith.merging.outputs import (
    Files,
    MatrixView,
    MergedTensor,
    Rows,
    StoredTensor,
    Term,
    matrix_columns,
)
from weightsmith.merging.tying import has_head, is_embedding, is_head

if TYPE_CHECKING:
    import numpy as np

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
_PASS = 1 << 18
"""Elements processed at once when computing column norms."""


@dataclass(slots=True)
class _ModuleKeys:
    """The keys of one wrapped module, by role."""

    raw: str
    """The module's name in the file."""
    module: str
    keys: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def _claim(view: AdapterView) -> Iterator[Claim]:
    mismatches: list[str] = []
    stacks: dict[str, list[FactorPair]] = {}
    pieces: dict[str, FactorPair] = {}
    roles: set[str] = set()
    groups = _groups(view)
    tied_copy = _has_tied_copy(view, groups)
    for group in groups.values():
        module = group.module
        if group.unused:
            yield Claim(keys=tuple(group.unused), module=module)
        if not group.keys:
            continue
        pair = _factors(view, group)
        plain = len(pair.a.shape) == 2
        if plain and experts.is_expert(view, module):
            stacks.setdefault(module, []).append(pair)
        elif plain and not view.find(module) and view.names.piece(f"{module}.weight"):
            pieces[module] = pair
            roles.update(group.keys)
        elif tied_copy and view.is_head(module):
            # The embedding's factors, transposed: already applied to the shared weight.
            yield Claim(keys=(pair.a.name, pair.b.name), module=module)
        else:
            yield from _layer(view, group, pair, tied_copy, mismatches)
    for module, pairs in stacks.items():
        yield from experts.claims(view, module, pairs)
    yield from _pieces(view, pieces, roles)
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
    variants={
        "LoRA on linear layers": "exact: W + s·BA, rounded once",
        "LoRA on transposed layers (Conv1D, `fan_in_fan_out`)": "exact",
        "LoRA on Conv1d, Conv2d, Conv3d": "exact; not with groups > 1",
        "LoRA on embeddings and heads": "exact; tied ones are untied if needed",
        "LoRA on MultiheadAttention": "exact: in_proj and out_proj",
        "`target_parameters`: matrices and stacked experts": "exact, also for bases with one "
        "tensor per expert",
        "LoRA on layers that the base stores in one tensor": "exact; LoRA alone",
        "`layer_replication`": "exact: every replica is written out",
        "`rank_pattern`, `alpha_pattern`, `use_rslora`": "exact",
        "`lora_bias`": "exact: b + s·bias; the base must have a bias",
        "MiCA, VeLoRA, MonteCLoRA, EVA, orthogonal": "exact, like plain LoRA",
        "BD-LoRA": "exact, as block-diagonal factors",
        "DoRA": "float64, rounded once",
        "KaSA": "float64 singular values, rounded once",
    },
)


def module_of(name: str) -> str:
    """Return the wrapped module of a key without PEFT's prefix, as named in the file, or ""."""
    match = _KEY.fullmatch(name)
    return match["module"] if match else ""


def _groups(view: AdapterView) -> dict[str, _ModuleKeys]:
    groups: dict[str, _ModuleKeys] = {}
    for key in view.keys:
        match = _KEY.fullmatch(module_key(key))
        if not match:
            continue
        raw, part = match["module"], match["part"]
        group = groups.setdefault(raw, _ModuleKeys(raw=raw, module=plain_module(raw)))
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


def _has_tied_copy(view: AdapterView, groups: dict[str, _ModuleKeys]) -> bool:
    """Return whether a tied head has its embedding's factors (`ensure_weight_tying`)."""
    embeddings = [g for g in groups.values() if "lora_embedding_A" in g.keys]
    heads = [g for g in groups.values() if view.is_head(g.module) and "lora_A" in g.keys]
    if not view.tie or len(embeddings) != 1 or len(heads) != 1:
        return False
    own, head = _factors(view, embeddings[0]), _factors(view, heads[0])
    pairs = ((own.a, head.b), (own.b, head.a))
    return all(view.stored(a.name).is_transpose_of(view.stored(b.name)) for a, b in pairs)


def _layer(
    view: AdapterView,
    group: _ModuleKeys,
    pair: FactorPair,
    tied_copy: bool,
    mismatches: list[str],
) -> Iterator[Claim]:
    """Yield the claims of one layer; append shapes that do not match to `mismatches`."""
    module, embedding = group.module, "lora_embedding_A" in group.keys
    parameter = "weight"
    if not embedding and not view.find(module):
        parameter = "in_proj_weight" if view.find(module, "in_proj_weight") else "weight"
    _check_stacks(view, module)
    target = view.need(module, parameter)
    view.require_plain(module)
    shape = view.shape(target)
    if is_embedding(module) or is_head(module):
        # PEFT may save the base's weight with the factors (resized vocabularies).
        copies = (f"{prefix}{group.raw}.base_layer.weight" for prefix in ("base_model.model.", ""))
        shape = next((view.keys[key].shape for key in copies if key in view.keys), shape)
    if (
        embedding
        and view.tie is None
        and shape[0] == view.base_config.get("vocab_size")
        and not is_embedding(module)
        and not any(is_head(name.removesuffix(".weight")) for name in view.sources)
        and has_head(view.base_config)
    ):
        raise InputRefused(
            f"{view.path} has LoRA on {module}, which may be an embedding tied to the head: "
            "the base stores no head",
            hint="serve it unmerged, or train it without the embeddings in target_modules",
        )
    left, right = _oriented(view, group, shape, pair)
    scaling = view.config.scaling(view.config.pattern_name(module))
    term, columns = view.term(left, right, scaling), matrix_columns(shape)
    if (shape[0], columns) != term.shape:
        mismatches.append(f"{target}: base {list(shape)}, adapter {list(term.shape)}")
        return
    keys = (pair.a.name, pair.b.name)
    claim = Claim(keys=keys, module=module, target=target, columns=columns, terms=(term,))
    both = embedding and bool(view.tie) and (tied_copy or view.config.ties(module))
    yield replace(_variant(view, group, claim), both=both)
    if "lora_B.bias" in group.keys:
        yield _bias(view, group, scaling)
    elif view.config.raw.get("lora_bias") and not embedding:
        raise _incomplete(view, "lora_bias", module, "lora_B.bias")


def _check_stacks(view: AdapterView, module: str) -> None:
    """Refuse an embedding that encoder, decoder and head share: PEFT adapts only one use.

    Whisper's decoder has its own.
    """
    if not is_embedding(module) or not view.base_config.get("is_encoder_decoder"):
        return
    tables = [name for name in view.sources if is_embedding(name.removesuffix(".weight"))]
    if not all(".decoder." in f".{name}" for name in tables):
        raise InputRefused(
            f"{view.path} has LoRA on {module}, whose embedding is shared by encoder and decoder: "
            + (
                "neither uses it by this name, so the factors had no effect in training"
                if module.rpartition(".")[2] == "shared"
                else "a merge would need separate embeddings, which most programs do not load"
            ),
            hint="train it without the embeddings in target_modules; train new words with "
            "trainable_token_indices, which can be merged",
        )


def _factors(view: AdapterView, group: _ModuleKeys) -> FactorPair:
    """Return A and B; raise InputRefused if one is missing or has an unsupported dtype or shape."""
    embedding = "lora_embedding_A" in group.keys or "lora_embedding_B" in group.keys
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    if not all(name in group.keys for name in names):
        raise InputRefused(
            f"{view.path}: {group.module} has only one of lora_A and lora_B",
            hint="the adapter is incomplete; export it again with save_pretrained",
        )
    a, b = (view.keys[group.keys[name]] for name in names)
    view.require_float(a.name)
    view.require_float(b.name)
    if len(a.shape) != len(b.shape) or not 2 <= len(a.shape) <= 5 or 0 in (*a.shape, *b.shape):
        raise InputRefused(
            f"{view.path}: {group.module} has invalid LoRA shapes (lora_A {list(a.shape)},"
            f" lora_B {list(b.shape)})",
            hint="sharded training may save empty or flat tensors: gather them before saving",
        )
    return FactorPair(group.raw, a, b)


def _oriented(
    view: AdapterView, group: _ModuleKeys, shape: tuple[int, ...], pair: FactorPair
) -> tuple[MatrixView, MatrixView]:
    a, b, module = pair.a, pair.b, group.module
    a_blocks, b_blocks = _blocks(view, group)
    right = replace(view.matrix(a), blocks=a_blocks)
    left = replace(view.matrix(b), blocks=b_blocks)
    rank = view.config.rank(view.config.pattern_name(module))
    if not right.shape[0] == left.shape[1] == rank:
        raise InputRefused(
            f"{view.path}: {module} has rank {right.shape[0]} in lora_A and {left.shape[1]} in "
            f"lora_B, but {rank} in adapter_config.json",
            hint="configuration and weights are from different trainings; export both together",
        )
    if len(a.shape) > 2 and math.prod(b.shape[2:]) != 1:
        raise InputRefused(
            f"{view.path}: {b.name} is not a 1x1 convolution, as in PEFT",
            hint="export the adapter again with PEFT's save_pretrained",
        )
    embedding = "lora_embedding_A" in group.keys
    if embedding or (len(a.shape) == 2 and _is_transposed(view, module, shape, left, right)):
        return right.transpose, left.transpose
    return left, right


def _blocks(view: AdapterView, group: _ModuleKeys) -> tuple[int, int]:
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


def _variant(view: AdapterView, group: _ModuleKeys, claim: Claim) -> Claim:
    """Return the claim, changed to DoRA's or KaSA's if the module has their keys."""
    (term,) = claim.terms
    for part, setting in _SETTINGS.items():
        if part in group.keys and not view.config.raw.get(setting):
            raise InputRefused(
                f"{view.path}: {group.module} has {part}, but adapter_config.json does not set "
                f"{setting}, without which PEFT ignores it",
                hint=f"set {setting} if the adapter was trained with it; else export it again",
            )
    # These scale the base too, so the adapter's weight applies to the whole change.
    plain = replace(term, factor=term.scaling)
    if magnitude := group.keys.get("lora_magnitude_vector"):
        stored = view.stored(magnitude)
        dora = _Dora(term=plain, magnitude=stored, by_column=term.left.transposed)
        return replace(claim, keys=(*claim.keys, magnitude), terms=(), change=dora)
    if view.config.raw.get("use_dora"):
        raise _incomplete(view, "use_dora", claim.module, "lora_magnitude_vector")
    if diagonal := group.keys.get("lora_diag"):
        change = _Kasa(term=plain, diagonal=view.stored(diagonal))
        return replace(claim, keys=(*claim.keys, diagonal), terms=(), change=change)
    if view.config.raw.get("kasa_config") and not is_head(claim.module):
        raise _incomplete(view, "kasa_config", claim.module, "lora_diag")
    return claim


def _incomplete(view: AdapterView, setting: str, module: str, key: str) -> InputRefused:
    return InputRefused(
        f"{view.path}: adapter_config.json sets {setting}, but {module} has no {key}",
        hint="the adapter is incomplete; export it again with save_pretrained",
    )


def _bias(view: AdapterView, group: _ModuleKeys, scaling: float) -> Claim:
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
    term = view.term(view.matrix(view.keys[key]), None, scaling)
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


def _pieces(view: AdapterView, pairs: Mapping[str, FactorPair], roles: set[str]) -> Iterator[Claim]:
    """Yield the claims of layers that the base stores in one tensor, such as a fused query and key.

    Raises InputRefused for shapes that do not fit, and for more than plain factors.
    """
    if others := sorted(roles - {"lora_A", "lora_B"}):
        raise _no_piece(view, f"{others[0]} on layers that the base stores in one tensor")
    heights = {f"{module}.weight": pair.b.shape[0] for module, pair in pairs.items()}
    for module, pair in pairs.items():
        name, config, a, b = f"{module}.weight", view.config, pair.a, pair.b
        piece = view.names.piece(name)
        assert piece is not None  # noqa: S101 - checked by the caller
        rows, columns = view.shape(piece.tensor)
        first = _first_row(piece, name, heights, rows)
        rank = config.rank(config.pattern_name(module))
        if first is None:
            raise _no_piece(view, f"{module}: where its rows of {piece.tensor} begin is unknown")
        if first + b.shape[0] > rows or (a.shape, b.shape[1]) != ((rank, columns), rank):
            raise _no_piece(
                view,
                f"{module} (lora_A {list(a.shape)}, lora_B {list(b.shape)}, rank {rank}) does not "
                f"fit {piece.tensor} [{rows}, {columns}]",
            )
        scaling = config.scaling(config.pattern_name(module))
        term = view.term(view.matrix(b), view.matrix(a), scaling, first)
        yield Claim(
            keys=(a.name, b.name),
            module=module,
            target=piece.tensor,
            columns=columns,
            terms=(term,),
            piece=True,
        )


def _first_row(
    piece: SplitParameter, name: str, heights: Mapping[str, int], rows: int
) -> int | None:
    """Return the first row of a piece; None if it depends on layers that the adapter lacks."""
    place = piece.names.index(name)
    if piece.equal:
        each, rest = divmod(rows, len(piece.names))
        return place * each if not rest and heights[name] == each else rows
    before, after = piece.names[:place], piece.names[place:]
    if all(other in heights for other in before):
        return sum(heights[other] for other in before)
    if all(other in heights for other in after):
        return rows - sum(heights[other] for other in after)
    return None


def _no_piece(view: AdapterView, what: str) -> InputRefused:
    return InputRefused(
        f"{view.path}: {what}, which cannot be merged",
        hint="check that the adapter was trained on this base; else serve it unmerged with PEFT",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Dora:
    """m · (W + s·BA) / ‖W + s·BA‖, in float64 (Liu et al., "DoRA", 2024, equation 5)."""

    term: Term
    magnitude: StoredTensor
    by_column: bool
    """True if the base stores (in, out), so that norms are of columns."""
    whole: bool = False
    by_row: bool = True

    def held_elements(self, output: MergedTensor) -> int:
        return self.term.rank * sum(self.term.shape) + 2 * (output.rows + output.columns)

    def begin(self, output: MergedTensor, files: Files) -> Rows:
        """Return a function that computes rows; column norms need a pass over the tensor first."""
        width = output.columns if self.by_column else output.rows
        count = math.prod(self.magnitude.shape)
        magnitude = self.magnitude.rows(files, 0, 1, count)[0]
        if len(magnitude) != width:
            raise InputRefused(
                f"{self.magnitude.info.name} has {len(magnitude)} elements, but {output.name} "
                f"needs {width}",
                hint="the adapter was trained on another model",
            )
        target, add = magnitude.astype("float64"), adder(self.term, files)
        lengths = None
        if self.by_column:
            step = max(1, _PASS // output.columns)
            parts = (
                _sum(output, files, add, start, min(step, output.rows - start))
                for start in range(0, output.rows, step)
            )
            lengths = sum((part * part).sum(0) for part in parts) ** 0.5

        def rows(first: int, count: int) -> np.ndarray:
            total = _sum(output, files, add, first, count)
            if lengths is not None:
                total *= target / lengths
            else:
                norms = (total * total).sum(1) ** 0.5
                total *= (target[first : first + count] / norms)[:, None]
            return total

        return rows


def _sum(output: MergedTensor, files: Files, add: Adder, first: int, count: int) -> np.ndarray:
    total = output.source.rows(files, first, count, output.columns).astype("float64")
    add(total, first)
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kasa:
    """W - U_r S_r V_r + s · B diag(d) A in float64 (Wang et al., "KaSA", 2024, section 3).

    PEFT truncates W when it loads the adapter, so the truncation is part of the adapter.
    """

    term: Term
    diagonal: StoredTensor
    whole: bool = True
    by_row: bool = False

    def held_elements(self, output: MergedTensor) -> int:
        return 5 * output.rows * output.columns

    def begin(self, output: MergedTensor, files: Files) -> Rows:
        from numpy.linalg import svd

        rank, right = self.term.rank, self.term.right
        if right is None or rank >= min(output.rows, output.columns):
            raise InputRefused(
                f"KaSA's rank {rank} is not below that of {output.name}",
                hint="the adapter was trained on another model",
            )
        stored = self.diagonal.rows(files, 0, 1, rank)[0]
        gains = stored.astype("float64") * self.term.factor
        left = files.matrix(self.term.left).astype("float64") * gains
        other = files.matrix(right).astype("float64")

        def rows(first: int, count: int) -> np.ndarray:
            weight = output.source.rows(files, 0, output.rows, output.columns).astype("float64")
            u, s, v = svd(weight, full_matrices=False)
            weight -= (u[:, -rank:] * s[-rank:]) @ v[-rank:]
            weight += left @ other
            return weight[first : first + count]

        return rows
