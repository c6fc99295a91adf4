"""Tensors that no adapter changes but that the merge casts: what rounding them does to the twins.

The twins show the effect of rounding alone, so they need every tensor that the merge rounds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from weightsmith.forward.experts import ExpertStack
from weightsmith.forward.network import base_name, is_missing
from weightsmith.forward.views import look_up, looks_up
from weightsmith.forward.weights import Weights, blocks_of
from weightsmith.validating.examine import Examiner
from weightsmith.validating.stacked import RoundedStack, dtype_of

Kinds = Mapping[str, torch.dtype]
"""Attribute of a module -> the type that the merge rounds it to."""


def watch_casts(examiner: Examiner, model: Any, done: set[int]) -> None:
    """Run the twins with the parameters that the merge casts rounded, of modules not `done`.

    Where that is not possible, the parameters are added to the examiner's `unjudged`.
    """
    for path, module in model.named_modules():
        if id(module) in done:
            continue
        names = {part: base_name(f"{path}.{part}") for part in _parts(module)}
        if narrowed := dict(_narrowed(names, examiner.base, examiner.merged)):
            cast = _Cast(examiner, module, names, narrowed)
            module.register_forward_pre_hook(cast.before)
            module.register_forward_hook(cast.after)


def _parts(module: Any) -> list[str]:
    """Return the names of a module's own parameters, stacked ones that are read singly too."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    return own + [name for name, value in vars(module).items() if isinstance(value, ExpertStack)]


def _narrowed(
    names: Mapping[str, str], base: Weights, merged: Weights
) -> Iterator[tuple[str, torch.dtype]]:
    """Yield parameters whose type in the merge does not hold all values of the base's."""
    for part, name in names.items():
        if not (base.has(name) and merged.has(name)):
            continue
        mine, theirs = base.tensors_of(name)[0], merged.tensors_of(name)[0]
        if base.infos[mine].dtype == merged.infos[theirs].dtype:
            continue
        before, after = dtype_of(base, name), dtype_of(merged, name)
        if torch.promote_types(before, after) != after:
            yield part, after


class _Cast:
    """The hooks of one module."""

    def __init__(
        self, examiner: Examiner, module: Any, names: Mapping[str, str], kinds: Kinds
    ) -> None:
        self.examiner, self.module, self.names, self.kinds = examiner, module, names, kinds
        self.busy = False
        # Inner modules read their weights together with the other model, which is elsewhere.
        self.alone = not any(_parts(inner) for inner in module.modules() if inner is not module)

    def before(self, *_: Any) -> None:
        """Round the parameters for the twins; those in files were just loaded."""
        for part, kind in self.kinds.items() if self.busy else ():
            values = getattr(self.module, part)
            if not isinstance(values, RoundedStack):
                values.data = values.data.to(kind).float()

    def after(self, _: Any, args: tuple[Any, ...], out: Any) -> Any:
        """Replace the twins' outputs."""
        if self.busy:
            return None
        with self.examiner.apart():
            flat = self._flat(args, out)
            if flat is not None:
                return flat
            if (rows := self._rows(args, out)) and self.alone:
                return _joined(out, self._again(tuple(arg[-rows:] for arg in args)), rows)
        self.examiner.unjudged += [self.names[part] for part in self.kinds]
        return None

    def _flat(self, args: tuple[Any, ...], out: Any) -> torch.Tensor | None:
        """Return the outputs of a matrix or a table, token by token; None for other modules."""
        table = looks_up(self.module)
        if not (table or type(self.module) is nn.Linear) or len(args) != 1:
            return None
        x = args[0].flatten() if table else args[0].flatten(0, -2)
        if not (twins := self.examiner.twins.get(len(x), 0)):
            return None
        twin = self._looked_up(x[-twins:]) if table else self._multiplied(x[-twins:])
        flat = out.reshape(-1, out.shape[-1])
        return torch.cat([flat[:-twins], twin]).view(out.shape)

    def _looked_up(self, ids: torch.Tensor) -> torch.Tensor:
        table = self.examiner.base.mapped(self.examiner.base.tensor_of(self.names["weight"]))
        kind = self.kinds["weight"]
        return look_up(
            self.module, type(self.module).forward, lambda: _RoundedRows(table, kind), ids
        )

    def _multiplied(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.cat([x @ rows.T for rows in self._rounded("weight")], -1)
        if self.module.bias is None:
            return out
        return out + torch.cat(list(self._rounded("bias")))

    def _rounded(self, part: str) -> Iterator[torch.Tensor]:
        """Yield a parameter's rows, rounded if the merge casts it."""
        own = getattr(self.module, part)
        missing = is_missing(own)
        blocks = self.examiner.base.rows(self.names[part]) if missing else blocks_of(own.detach())
        kind = self.kinds.get(part, torch.float32)
        for _, rows in blocks:
            yield rows.to(kind).float()

    def _rows(self, args: tuple[Any, ...], out: Any) -> int:
        """Return how many rows of the first dimension are the twins'; 0 if that is not known."""
        outs = out if isinstance(out, tuple) else (out,)
        tensors = (*args, *outs)
        if not args or not all(isinstance(one, torch.Tensor) and one.dim() for one in tensors):
            return 0
        length = len(outs[0])
        tokens = args[0].numel() // args[0].shape[-1]
        if any(len(one) != length for one in tensors):
            return 0
        # A norm of heads has several rows per token.
        fits = [
            length * twins // whole
            for whole, twins in self.examiner.twins.items()
            if tokens % whole == 0 and length * twins % whole == 0
        ]
        return max(fits, default=0)

    def _again(self, args: tuple[Any, ...]) -> Any:
        exact = {part: getattr(self.module, part) for part in self.kinds}
        stacks = {part: one for part, one in exact.items() if isinstance(one, ExpertStack)}
        data = {part: one.data for part, one in exact.items() if part not in stacks}
        for part, stack in stacks.items():
            object.__setattr__(self.module, part, RoundedStack(stack, self.kinds[part]))
        self.busy = True
        try:
            return self.module(*args)
        finally:
            self.busy = False
            for part, stack in stacks.items():
                object.__setattr__(self.module, part, stack)
            for part, values in data.items():
                getattr(self.module, part).data = values


class _RoundedRows:
    """A table whose rows are rounded when they are taken."""

    def __init__(self, table: Any, kind: torch.dtype) -> None:
        self._table, self._kind = table, kind

    def __getitem__(self, index: Any) -> torch.Tensor:
        rows: torch.Tensor = self._table[index]
        return rows.to(self._kind).float()


def _joined(out: Any, again: Any, rows: int) -> Any:
    """Return the outputs with the twins' replaced."""
    if isinstance(out, tuple):
        return tuple(_joined(one, other, rows) for one, other in zip(out, again, strict=True))
    return torch.cat([out[:-rows], again])
