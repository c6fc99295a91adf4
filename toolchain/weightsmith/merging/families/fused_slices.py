"""LoRA on layers that the base stores in one tensor, such as a fused query, key and value."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from weightsmith.core.errors import InputRefused
from weightsmith.merging.claim import AdapterView, Claim
from weightsmith.merging.loading import SplitParameter
from weightsmith.merging.outputs import MatrixView, Term
from weightsmith.models.safetensors import TensorInfo

_PLAIN = {"lora_A", "lora_B"}


def is_piece(view: AdapterView, module: str) -> bool:
    """Return whether a module's weight is rows of a tensor of the base."""
    return not view.find(module) and view.names.piece(f"{module}.weight") is not None


def claims(
    view: AdapterView, pairs: Mapping[str, tuple[TensorInfo, TensorInfo]], roles: Sequence[str]
) -> Iterator[Claim]:
    """Yield one claim per layer: `pairs` has their A and B.

    Raises InputRefused for shapes that do not fit, and for more than plain factors.
    """
    if others := sorted(set(roles) - _PLAIN):
        raise _refused(view, f"{others[0]} on layers that the base stores in one tensor")
    heights = {f"{module}.weight": b.shape[0] for module, (_, b) in pairs.items()}
    for module, (a, b) in pairs.items():
        name, config = f"{module}.weight", view.config
        piece = view.names.piece(name)
        assert piece is not None  # noqa: S101 - checked by `is_piece`
        rows, columns = view.shape(piece.tensor)
        first = _first(piece, name, heights, rows)
        rank = config.rank(config.pattern_name(module))
        if first is None:
            raise _refused(view, f"{module}: where its rows of {piece.tensor} begin is unknown")
        if first + b.shape[0] > rows or (a.shape, b.shape[1]) != ((rank, columns), rank):
            raise _refused(
                view,
                f"{module} (lora_A {list(a.shape)}, lora_B {list(b.shape)}, rank {rank}) does not "
                f"fit {piece.tensor} [{rows}, {columns}]",
            )
        scaling = config.scaling(config.pattern_name(module))
        term = Term(
            adapter=view.index,
            left=MatrixView(stored=view.stored(b.name), height=b.shape[0]),
            right=MatrixView(stored=view.stored(a.name), height=a.shape[0]),
            scaling=scaling,
            factor=view.factor(scaling),
            first=first,
        )
        yield Claim(
            keys=(a.name, b.name),
            module=module,
            target=piece.tensor,
            columns=columns,
            terms=(term,),
            piece=True,
        )


def _first(piece: SplitParameter, name: str, heights: Mapping[str, int], rows: int) -> int | None:
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


def _refused(view: AdapterView, what: str) -> InputRefused:
    return InputRefused(
        f"{view.path}: {what}, which cannot be merged",
        hint="check that the adapter was trained on this base; else serve it unmerged with PEFT",
    )
