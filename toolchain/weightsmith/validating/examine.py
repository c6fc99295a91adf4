"""Check each adapted layer while the reference runs: its merged tensor and PEFT's output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING

import torch

from weightsmith.core.jobs import CombinationRule
from weightsmith.forward.experts import stacks_of
from weightsmith.forward.heads import BatchPositions, only
from weightsmith.forward.network import is_missing, missing_below
from weightsmith.forward.weights import Weights, blocks_of
from weightsmith.validating.elements import (
    ARITHMETIC,
    TRUNCATION,
    MaskCounts,
    TensorComparison,
    can_judge,
    compare_kept,
    compare_rows,
    truncated,
)
from weightsmith.validating.result import ERROR, Finding, finding
from weightsmith.validating.sites import (
    Site,
    compare_experts,
    dtype_of,
    is_approximate,
    rounded_experts,
    rows_of,
    stored,
    tuner_layers,
)

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer

_SAMPLES = 8
"""Tokens per layer at which PEFT's output is compared with the formula."""
_UNIT = 2.0**-24
_SVD_ERROR = 2.0**-12
"""Relative error allowed for a float32 singular value decomposition."""


@dataclass(slots=True, kw_only=True)
class Examiner:
    """Examines sites as the reference runs through them.

    The last tokens of a batch are copies ("twins") of the first ones. At every site their outputs
    are recomputed with the exact sum rounded to the merged tensor's type, so their logits show
    the effect of rounding alone.
    """

    base: Weights
    merged: Weights
    twins: Mapping[int, int]
    """Number of a layer's input tokens -> how many of them, at the end, are twins."""
    tallies: dict[str, TensorComparison] = field(default_factory=dict)
    """By the model's parameter name."""
    findings: list[Finding] = field(default_factory=list)
    signal: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Parameter -> RMS of the adapter's effect on its outputs, and of the rounding error."""
    apart: Callable[[], AbstractContextManager[None]] = nullcontext
    """Entered for work that needs no other model, which may go on meanwhile."""
    mixture: CombinationRule | None = None
    """How the method combines deltas, if the merge is not their sum."""
    mixed: set[str] = field(default_factory=set)
    """Parameters checked against the mixture."""
    kept: dict[str, MaskCounts] = field(default_factory=dict)
    """Parameter -> which adapters it contains, if the method keeps parts of the deltas."""
    unjudged: list[str] = field(default_factory=list)
    """Parameters whose rounding the twins do not cover."""
    read: set[int] = field(default_factory=set)
    """Ids of PEFT's layers whose weight the model's code took (`reading_weights`)."""
    bypassed: list[str] = field(default_factory=list)
    """Parameters that the model's code reads without calling their layer, bypassing PEFT."""
    _running: ExitStack = field(default_factory=ExitStack)
    """Of the layer that runs."""

    def watch(self, site: Site) -> None:
        """Examine a site when it runs."""
        if stacks_of(site.layer):
            site.layer.register_forward_hook(partial(self._examine_stacked, site))
        elif site.kind == "other":
            site.layer.register_forward_pre_hook(lambda *_: self._fill(site))
            site.layer.register_forward_hook(partial(self._examine_other, site))
        else:
            site.layer.register_forward_pre_hook(partial(self._leave_out_twins, site))
            site.layer.register_forward_hook(partial(self._examine_plain, site))

    def finish(self, site: Site) -> None:
        """Examine a site that the probes did not run through."""
        if site.seen:
            return
        if id(site.layer) in self.read:
            self.bypassed += [n for part, n in site.parameters.items() if part != "bias"]
            self._compare_unchanged(site)
        elif stacks_of(site.layer):
            compare_experts(site, self.base, self.merged, self.tallies)
        elif site.kind == "other":
            self._fill(site)
            self._merge(site)
            self._empty(site)
        else:
            self._blocks(site, lambda *_: None)

    def _compare_unchanged(self, site: Site) -> None:
        """Compare a layer that adapters do not change, because it is not called."""
        inner = site.layer.get_base_layer()
        for part, name in site.parameters.items():
            tensor = self.merged.tensor_of(name) or name
            tally = self.tallies.setdefault(name, TensorComparison(tensor=tensor))
            own, found = _attribute(inner, part), rows_of(stored(self.merged, name))
            before = rows_of(self.base.whole(name) if is_missing(own) else own.detach())
            compare_rows(tally, 0, before, torch.zeros_like(before), found)

    def _leave_out_twins(
        self, site: Site, _: torch.nn.Module, args: tuple[torch.Tensor, ...]
    ) -> None:
        """Let the base multiply no twins, a third of the texts: they get other outputs."""
        if site.kind == "linear" and not site.seen and args[0].dim() == 3:
            rows, columns = args[0].shape[:2]
            others = torch.arange(rows * columns - self.twins.get(rows * columns, 0))
            self._running.enter_context(only(BatchPositions(rows, columns, others, others)))

    def _examine_plain(
        self, site: Site, _: torch.nn.Module, args: tuple[torch.Tensor, ...], out: torch.Tensor
    ) -> torch.Tensor | None:
        self._running.close()
        if site.seen:
            return None
        site.seen = True
        x = args[0].flatten() if site.kind == "embedding" else args[0].flatten(0, -2)
        twins = self.twins.get(len(x), 0)
        if not twins:
            self.unjudged.append(site.parameters["weight"])
        with self.apart():
            outputs = _Outputs(site, x, out, twins)
            self._blocks(site, outputs.take)
        bias = getattr(site.layer.get_base_layer(), "bias", None)
        if bias is not None and is_missing(bias):  # an adapter that trained biases has its own
            bias = self.base.whole(site.parameters["bias"])
        self.findings += outputs.judge(bias)
        self.signal[site.parameters["weight"]] = outputs.loss()
        if bias is not None:  # an adapter's own bias may have a higher precision
            bias = bias.to(dtype_of(self.merged, site.parameters["bias"])).float()
        return outputs.with_twins(bias)

    def _blocks(
        self, site: Site, take: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
    ) -> None:
        """Compare the site's tensor in row blocks; `take` gets base, exact sum and merged rows."""
        name = site.parameters["weight"]
        factors = site.factors()
        tally = self.tallies.setdefault(name, TensorComparison(tensor=self.merged.tensor_of(name)))
        mixed, parts = self.mixture, site.parts() if self.mixture else []
        low = truncated(parts, factors, mixed.rank) if mixed and mixed.truncates else None
        if mixed and can_judge(mixed, parts):
            self.mixed.add(name)
        own = site.layer.get_base_layer().weight  # an adapter's, if it changes the vocabulary
        rows_before = self.base.rows(name) if is_missing(own) else blocks_of(own.detach())
        both = zip(rows_before, self.merged.rows(name), strict=True)
        for (first, rows), (_, found) in both:
            wide = torch.float64 if found.dtype == torch.float32 else torch.float32
            weights, delta = rows.to(wide), factors.rows(first, len(rows), wide)
            if low is not None:
                some = low.rows(first, len(rows), wide)
                compare_rows(tally, first, weights, some, found, low, TRUNCATION)
            elif mixed is None or name not in self.mixed:
                compare_rows(tally, first, weights, delta, found, factors)
            else:
                deltas = [part.rows(first, len(rows), wide) for part in parts]
                kept = self.kept.setdefault(name, MaskCounts())
                compare_kept(tally, kept, mixed, first, weights, deltas, found)
            take(first, weights, weights + delta, found)

    def _fill(self, site: Site) -> None:
        for (module, name), parameter in missing_below(site.layer, site.path).items():
            getattr(module, name).data = self.base.whole(parameter)

    def _empty(self, site: Site) -> None:
        for part in site.parameters:
            parameter = _attribute(site.layer.get_base_layer(), part)
            parameter.data = torch.full((), torch.nan).expand(parameter.shape)

    def _examine_other(
        self, site: Site, _: torch.nn.Module, args: tuple[object, ...], out: object
    ) -> object:
        seen, site.seen = site.seen, True
        if not seen:
            if site.weights and isinstance(out, torch.Tensor):
                out = _weighted(site, args)
            with self.apart():
                self._merge(site)
                out = self._twins_of_other(site, args, out)
        self._empty(site)
        return out

    def _examine_stacked(
        self, site: Site, _: torch.nn.Module, args: tuple[object, ...], out: object
    ) -> object:
        if site.seen:
            return None
        site.seen = True
        with self.apart():
            compare_experts(site, self.base, self.merged, self.tallies)
            kinds = {part: dtype_of(self.merged, name) for part, name in site.parameters.items()}
            with rounded_experts(site.layer.get_base_layer(), kinds):
                return self._twins_of_other(site, args, out)

    def _merge(self, site: Site) -> None:
        """Let PEFT merge this layer in float32, and compare the resulting parameters.

        Adapters are merged one by one and their changes summed, because unmerged adapters act
        independently: merged onto each other, adapters that scale the base would scale the
        others' changes too.
        """
        inner = site.layer.get_base_layer()
        before = {part: _attribute(inner, part).detach().clone() for part in site.parameters}
        total = {part: torch.zeros_like(values) for part, values in before.items()}
        for adapter in site.layer.active_adapters:
            wrappers = tuner_layers(site.layer)
            for wrapper in wrappers:
                wrapper.merge(adapter_names=[adapter])
            merged = site.layer.get_base_layer()
            for wrapper in wrappers:
                if merged is not inner:  # LayerNorm tuning puts its own layer in the base's place
                    wrapper.unmerge()
                wrapper.merged_adapters.clear()
            for part, values in before.items():
                changed = _attribute(merged, part).detach() - values
                total[part] += site.weights.get(adapter, 1.0) * changed
                _attribute(inner, part).data = values.clone()
        slack = _SVD_ERROR if is_approximate(site.layer) else ARITHMETIC
        for part, name in site.parameters.items():
            tensor = self.merged.tensor_of(name) or name
            tally = self.tallies.setdefault(name, TensorComparison(tensor=tensor))
            found = stored(self.merged, name)
            compare_rows(
                tally, 0, rows_of(before[part]), rows_of(total[part]), rows_of(found), slack=slack
            )
            exact = before[part] + total[part]
            _attribute(inner, part).data = exact.to(found.dtype).float()

    def _twins_of_other(self, site: Site, args: tuple[object, ...], out: object) -> object:
        """Recompute the twins with the rounded parameters that were set."""
        if isinstance(out, torch.Tensor):
            tensors = [a for a in args if isinstance(a, torch.Tensor) and len(a) == len(out)]
            tokens = out.numel() // out.shape[-1]
            twins = self.twins.get(tokens, 0) * len(out) // tokens
            if twins and len(tensors) == len(args):
                again = site.layer.get_base_layer()(*(a[-twins:] for a in tensors))
                return torch.cat([out[:-twins], again])
        self.unjudged += list(site.parameters.values())
        return out


@contextmanager
def reading_weights(found: set[int]) -> Iterator[None]:
    """Add to `found` the ids of PEFT's layers whose weight is taken from outside, in the block."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain = vars(BaseTunerLayer)["weight"]

    def weight(layer: BaseTunerLayer) -> torch.Tensor:
        found.add(id(layer))
        taken: torch.Tensor = plain.fget(layer)
        return taken

    setattr(BaseTunerLayer, "weight", property(weight))  # noqa: B010 - as mypy wants it
    try:
        yield
    finally:
        setattr(BaseTunerLayer, "weight", plain)  # noqa: B010


class _Outputs:
    """A site's outputs by the formula, accumulated over blocks of rows."""

    def __init__(self, site: Site, x: torch.Tensor, out: torch.Tensor, twins: int) -> None:
        self.site, self.out, self.twins = site, out, twins
        step = max(1, (len(x) - twins) // _SAMPLES)
        self.places = torch.arange(0, len(x) - twins, step)[:_SAMPLES]
        self.x = x[self.places]
        self.peft = out.reshape(-1, out.shape[-1])[self.places]
        self.twin_x = x[len(x) - twins :]
        shape = (len(self.places), out.shape[-1])
        self.expected, self.base, self.found = (torch.zeros(shape) for _ in range(3))
        self.room = torch.zeros(shape)
        self.twin = torch.zeros((twins, out.shape[-1])) if twins else None
        self.reach = self.x.norm(dim=1, keepdim=True) if site.kind == "linear" else torch.zeros(())
        # |W·x| and |B·A·x| can each be as large as the sum and the other term together.
        self.unit = 16 * float(self.x.shape[-1]) ** 0.5 * _UNIT
        self.added = torch.zeros(())
        """Bound of the rounding error of the adapter's own products."""
        if site.kind == "linear":
            factors = site.factors()
            inner = self.reach * factors.right.norm() * float(factors.scalings.abs().max())
            self.added = inner * factors.left.norm(dim=1)

    def take(
        self, first: int, base: torch.Tensor, exact: torch.Tensor, found: torch.Tensor
    ) -> None:
        """Use rows of the base, of the exact sum, and of the merged tensor."""
        rounded = exact.to(found.dtype).float()
        base, exact, merged = base.float(), exact.float(), found.float()
        where = slice(first, first + len(exact))
        for into, rows in ((self.expected, exact), (self.base, base), (self.found, merged)):
            _apply(self.site.kind, self.x, rows, where, into)
        if self.twin is not None:
            _apply(self.site.kind, self.twin_x, rounded, where, self.twin)
        if self.site.kind == "linear":
            # Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019:
            # a sum of n products has an error of about √n units, not n; `unit` has a safety factor.
            reach = self.reach * exact.norm(dim=1)
            self.room[:, where] = self.unit * (reach + self.added[:, where])

    def judge(self, bias: torch.Tensor | None) -> list[Finding]:
        """Return a finding if PEFT's output differs from the formula."""
        if self.site.kind != "linear":
            return []
        expected = self.expected if bias is None else self.expected + bias
        room = self.room + 8 * _UNIT * expected.abs()
        off = (self.peft - expected).abs()
        if bool((off <= room).all()):
            return []
        name = self.site.parameters["weight"]
        return [
            finding(
                ERROR,
                "outputs",
                f"{name}: PEFT's output differs from W + Σ s·B·A by {float(off.max()):.3g}, more "
                f"than the arithmetic error ({float(room.max()):.3g}): PEFT computes something "
                "else for this adapter than the merge does",
                name,
            )
        ]

    def loss(self) -> tuple[float, float]:
        """Return the RMS of the adapter's effect, and of the merged tensor's error."""
        return (
            float((self.expected - self.base).square().mean().sqrt()),
            float((self.expected - self.found).square().mean().sqrt()),
        )

    def with_twins(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """Return PEFT's output with the twins' outputs replaced, or None without twins."""
        if self.twin is None:
            return None
        twin = self.twin if bias is None else self.twin + bias
        flat = self.out.reshape(-1, self.out.shape[-1])
        return torch.cat([flat[: -self.twins], twin]).view(self.out.shape)


def _apply(
    kind: str, x: torch.Tensor, rows: torch.Tensor, where: slice, into: torch.Tensor
) -> None:
    """Add the contribution of some rows of a stored matrix to the outputs for x."""
    if kind == "linear":
        into[..., where] = x @ rows.T
    elif kind == "conv1d":
        into += x[..., where] @ rows
    else:
        inside = (x >= where.start) & (x < where.stop)
        into[inside] = rows[x[inside] - where.start]


def _weighted(site: Site, args: tuple[object, ...]) -> torch.Tensor:
    """Return a layer's outputs with weighted adapters: W + Σ weight·(changed - W)."""
    layers, active = tuner_layers(site.layer), list(site.layer.active_adapters)
    base: torch.Tensor = site.layer.get_base_layer()(*args)
    out = base.clone()
    for name in active:
        for layer in layers:
            layer.set_adapter([name])
        out += site.weights[name] * (site.layer.forward(*args) - base)
    for layer in layers:
        layer.set_adapter(active)
    return out


def _attribute(module: torch.nn.Module, path: str) -> torch.Tensor:
    found: torch.Tensor = attrgetter(path)(module)
    return found
