"""Each adapted layer while the reference runs: its merged tensor, and what PEFT computes there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from weightsmith.validating.elements import ARITHMETIC, Tally, compare_rows
from weightsmith.validating.findings import ERROR, Finding, finding
from weightsmith.validating.mixtures import TRUNCATION, Kept, Mixture, compare_kept, truncated
from weightsmith.validating.network import is_missing, missing_below
from weightsmith.validating.sites import Site, is_approximate, tuner_layers
from weightsmith.validating.weights import Weights, blocks_of

_SAMPLES = 8
"""Tokens of each layer at which PEFT's output is held against the formula."""
_UNIT = 2.0**-24
_ROUGHLY = 2.0**-12
"""What a singular value decomposition in float32 may be off, as a part of the values."""


@dataclass(slots=True, kw_only=True)
class Examiner:
    """Examines sites as the reference runs through them.

    The last tokens of a batch are twins of the first ones: at every site their outputs are
    computed anew with the exact sum rounded to the merged tensor's type, so that at the end they
    tell what rounding alone does to the logits.
    """

    base: Weights
    merged: Weights
    twins: Mapping[int, int]
    """Tokens of a layer's input -> how many of them, at the end, are twins."""
    tallies: dict[str, Tally] = field(default_factory=dict)
    """By the model's own parameter name."""
    findings: list[Finding] = field(default_factory=list)
    signal: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Parameter -> size of what the adapter adds to its outputs, and of what rounding takes."""
    mixture: Mixture | None = None
    """How parts of the deltas were kept, where the merge is not their sum."""
    mixed: set[str] = field(default_factory=set)
    """Parameters of which a mixture can be judged."""
    kept: dict[str, Kept] = field(default_factory=dict)
    """Parameter -> which adapters are in it, where parts were kept."""
    unjudged: list[str] = field(default_factory=list)
    """Parameters whose rounding the twins do not show."""
    bypassed: list[str] = field(default_factory=list)
    """Parameters that the model's code does not use by calling their layer, as PEFT needs it."""

    def watch(self, site: Site) -> None:
        """Examine a site when it runs."""
        if site.kind == "other":
            site.layer.register_forward_pre_hook(lambda *_: self._fill(site))
            site.layer.register_forward_hook(self._other(site))
        else:
            site.layer.register_forward_hook(self._plain(site))

    def watch_brought(self, module: Any, parameters: Mapping[str, str]) -> None:
        """Run the twins through what an adapter brings whole as the merged file has it: rounded.

        `parameters` is attribute -> the model's own name.
        """
        kinds = {part: _kind(self.merged, name) for part, name in parameters.items()}
        busy = False

        def again(_: Any, args: tuple[Any, ...], out: Any) -> torch.Tensor | None:
            nonlocal busy
            if busy:
                return None
            single = len(args) == 1 and isinstance(out, torch.Tensor)
            x = args[0].flatten(0, -1 if isinstance(module, nn.Embedding) else -2)
            twins = self.twins.get(len(x), 0) if single else 0
            if not twins:
                self.unjudged += list(parameters.values())
                return None
            busy = True
            twin, busy = _anew(module, kinds, x[-twins:]), False
            flat = out.reshape(-1, out.shape[-1])
            return torch.cat([flat[:-twins], twin]).view(out.shape)

        module.register_forward_hook(again)

    def finish(self, site: Site) -> None:
        """Examine a site that the probes did not run through."""
        if site.seen:
            return
        if ".experts." not in site.path:  # an expert that no token went to is called by others
            self.bypassed += [n for part, n in site.parameters.items() if part != "bias"]
        if site.kind == "other":
            self._fill(site)
            self._merge(site)
            self._empty(site)
        else:
            self._blocks(site, lambda *_: None)

    def _plain(self, site: Site) -> Callable[..., torch.Tensor | None]:
        def examine(_: Any, args: tuple[Any, ...], out: torch.Tensor) -> torch.Tensor | None:
            if site.seen:
                return None
            site.seen = True
            x = args[0].flatten() if site.kind == "embedding" else args[0].flatten(0, -2)
            twins = self.twins.get(len(x), 0)
            if not twins:
                self.unjudged.append(site.parameters["weight"])
            outputs = _Outputs(site, x, out, twins)
            self._blocks(site, outputs.take)
            bias = self._bias(site)
            self.findings += outputs.judge(bias)
            self.signal[site.parameters["weight"]] = outputs.loss()
            if bias is not None:  # an adapter may have brought it in more digits
                bias = bias.to(_kind(self.merged, site.parameters["bias"])).float()
            return outputs.with_twins(bias)

        return examine

    def _blocks(
        self, site: Site, take: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
    ) -> None:
        """Compare the site's tensor rows by rows; `take` gets base, exact sum and what is there."""
        name = site.parameters["weight"]
        factors = site.factors()
        tally = self.tallies.setdefault(name, Tally(tensor=self.merged.tensor_of(name)))
        mixed, parts = self.mixture, site.parts() if self.mixture else []
        low = truncated(parts, factors, mixed.rank) if mixed and mixed.truncates else None
        if mixed and mixed.judges(parts):
            self.mixed.add(name)
        both = zip(self._base_rows(site, name), self.merged.rows(name), strict=True)
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
                kept = self.kept.setdefault(name, Kept())
                compare_kept(tally, kept, mixed, first, weights, deltas, found)
            take(first, weights, weights + delta, found)

    def _base_rows(self, site: Site, name: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the base's rows; an adapter may have brought its own, of another vocabulary."""
        own = site.layer.get_base_layer().weight
        return self.base.rows(name) if is_missing(own) else blocks_of(own.detach())

    def _bias(self, site: Site) -> torch.Tensor | None:
        layer = site.layer.get_base_layer()
        bias = getattr(layer, "bias", None)
        if bias is None:
            return None
        # An adapter that trained biases has brought its own.
        return self.base.whole(site.parameters["bias"]) if is_missing(bias) else bias

    def _fill(self, site: Site) -> None:
        for (module, name), parameter in missing_below(site.layer, site.path).items():
            getattr(module, name).data = self.base.whole(parameter)

    def _empty(self, site: Site) -> None:
        for part in site.parameters:
            parameter = _attribute(site.layer.get_base_layer(), part)
            parameter.data = torch.full((), torch.nan).expand(parameter.shape)

    def _other(self, site: Site) -> Callable[..., torch.Tensor | None]:
        def examine(_: Any, args: tuple[Any, ...], out: Any) -> Any:
            seen, site.seen = site.seen, True
            if not seen:
                if site.weights and isinstance(out, torch.Tensor):
                    out = _weighted(site, args)
                self._merge(site)
                out = self._twins_of_other(site, args, out)
            self._empty(site)
            return out

        return examine

    def _merge(self, site: Site) -> None:
        """Let PEFT merge this one layer in float32, and compare what its parameters became.

        Each adapter by itself, and their changes summed, as they act side by side: merged one onto
        the other, those that scale the base would scale the others' changes too.
        """
        inner = site.layer.get_base_layer()
        before = {part: _attribute(inner, part).detach().clone() for part in site.parameters}
        total = {part: torch.zeros_like(values) for part, values in before.items()}
        for adapter in site.layer.active_adapters:
            for wrapper in tuner_layers(site.layer):
                wrapper.merge(adapter_names=[adapter])
                wrapper.merged_adapters.clear()
            for part, values in before.items():
                changed = _attribute(inner, part).detach() - values
                total[part] += site.weights.get(adapter, 1.0) * changed
                _attribute(inner, part).data = values.clone()
        slack = _ROUGHLY if is_approximate(site.layer) else ARITHMETIC
        for part, name in site.parameters.items():
            tensor = self.merged.tensor_of(name) or name
            tally = self.tallies.setdefault(name, Tally(tensor=tensor))
            found = _stored(self.merged, name)
            compare_rows(
                tally, 0, _rows(before[part]), _rows(total[part]), _rows(found), slack=slack
            )
            exact = before[part] + total[part]
            _attribute(inner, part).data = exact.to(found.dtype).float()

    def _twins_of_other(self, site: Site, args: tuple[Any, ...], out: Any) -> Any:
        """Compute the twins again with the rounded parameters that `_merge` left behind."""
        if not isinstance(out, torch.Tensor):
            self.unjudged += list(site.parameters.values())
            return out
        tensors = all(isinstance(a, torch.Tensor) and len(a) == len(out) for a in args)
        tokens = out.numel() // out.shape[-1]
        twins = self.twins.get(tokens, 0) * len(out) // tokens
        if not tensors or not twins:
            self.unjudged += list(site.parameters.values())
            return out
        again = site.layer.get_base_layer()(*(a[-twins:] for a in args))
        return torch.cat([out[:-twins], again])


class _Outputs:
    """A site's outputs by the formula, gathered while its rows go by."""

    def __init__(self, site: Site, x: torch.Tensor, out: torch.Tensor, twins: int) -> None:
        self.site, self.out, self.twins = site, out, twins
        step = max(1, (len(x) - twins) // _SAMPLES)
        self.places = torch.arange(0, len(x) - twins, step)[:_SAMPLES]
        self.x = x[self.places]
        self.peft = out.reshape(-1, out.shape[-1])[self.places]
        self.twin_x = x[len(x) - twins :]
        shape = (len(self.places), out.shape[-1])
        self.wanted, self.base, self.found = (torch.zeros(shape) for _ in range(3))
        self.room = torch.zeros(shape)
        self.twin = torch.zeros((twins, out.shape[-1])) if twins else None
        self.reach = self.x.norm(dim=1, keepdim=True) if site.kind == "linear" else torch.zeros(())
        # W·x and B·A·x apart are each as large as the sum and the other together.
        self.unit = 16 * float(self.x.shape[-1]) ** 0.5 * _UNIT
        self.added = self._added()

    def take(
        self, first: int, base: torch.Tensor, exact: torch.Tensor, found: torch.Tensor
    ) -> None:
        """Use rows of the base, of the exact sum, and of the merged tensor."""
        rounded = exact.to(found.dtype).float()
        base, exact, merged = base.float(), exact.float(), found.float()
        where = slice(first, first + len(exact))
        for into, rows in ((self.wanted, exact), (self.base, base), (self.found, merged)):
            _apply(self.site.kind, self.x, rows, where, into)
        if self.twin is not None:
            _apply(self.site.kind, self.twin_x, rounded, where, self.twin)
        if self.site.kind == "linear":
            # Higham and Mary, "A new approach to probabilistic rounding error analysis", 2019:
            # a sum of n products is off by about √n units, not n; `unit` has a wide factor.
            reach = self.reach * exact.norm(dim=1)
            self.room[:, where] = self.unit * (reach + self.added[:, where])

    def judge(self, bias: torch.Tensor | None) -> list[Finding]:
        """Return a finding where PEFT's output is not the formula's."""
        if self.site.kind != "linear":
            return []
        wanted = self.wanted if bias is None else self.wanted + bias
        room = self.room + 8 * _UNIT * wanted.abs()
        off = (self.peft - wanted).abs()
        if bool((off <= room).all()):
            return []
        name = self.site.parameters["weight"]
        return [
            finding(
                ERROR,
                "outputs",
                f"{name}: PEFT's output differs from W + Σ s·B·A by {float(off.max()):.3g}, more "
                f"than arithmetic explains ({float(room.max()):.3g}): this adapter is not what "
                "the merge takes it for",
                name,
            )
        ]

    def loss(self) -> tuple[float, float]:
        """Return the sizes of what the adapter adds, and of what the merged tensor lacks of it."""
        return (
            float((self.wanted - self.base).square().mean().sqrt()),
            float((self.wanted - self.found).square().mean().sqrt()),
        )

    def with_twins(self, bias: torch.Tensor | None) -> torch.Tensor | None:
        """Return PEFT's output with the twins' replaced, or None where there are none."""
        if self.twin is None:
            return None
        twin = self.twin if bias is None else self.twin + bias
        flat = self.out.reshape(-1, self.out.shape[-1])
        return torch.cat([flat[: -self.twins], twin]).view(self.out.shape)

    def _added(self) -> torch.Tensor:
        """Bound what the adapter's own products may add to the rounding error."""
        if self.site.kind != "linear":
            return torch.zeros(())
        factors = self.site.factors()
        inner = self.reach * factors.right.norm() * float(factors.scalings.abs().max())
        added: torch.Tensor = inner * factors.left.norm(dim=1)
        return added


def _apply(
    kind: str, x: torch.Tensor, rows: torch.Tensor, where: slice, into: torch.Tensor
) -> None:
    """Add what some rows of a stored matrix contribute to the outputs for x."""
    if kind == "linear":
        into[..., where] = x @ rows.T
    elif kind == "conv1d":
        into += x[..., where] @ rows
    else:
        inside = (x >= where.start) & (x < where.stop)
        into[inside] = rows[x[inside] - where.start]


def _weighted(site: Site, args: tuple[Any, ...]) -> torch.Tensor:
    """Return a layer's outputs with a part of each adapter's change: W + Σ weight·(changed - W)."""
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


def _anew(module: Any, kinds: Mapping[str, torch.dtype], x: torch.Tensor) -> torch.Tensor:
    """Return a module's outputs with some parameters rounded; of matrices a few rows at a time."""
    exact = {part: getattr(module, part).data for part in kinds}
    if type(module) is nn.Linear and kinds.keys() == dict(module.named_parameters()).keys():
        blocks = (rows.to(kinds["weight"]).float() for _, rows in blocks_of(exact["weight"]))
        out = torch.cat([x @ rows.T for rows in blocks], -1)
        return out + exact["bias"].to(kinds["bias"]).float() if "bias" in kinds else out
    if isinstance(module, nn.Embedding):
        wanted, x = torch.unique(x, return_inverse=True)
        rounded = {"weight": exact["weight"][wanted].to(kinds["weight"]).float()}
    else:
        rounded = {part: values.to(kinds[part]).float() for part, values in exact.items()}
    for part, values in rounded.items():
        getattr(module, part).data = values
    again: torch.Tensor = module(x)
    for part, values in exact.items():
        getattr(module, part).data = values
    return again


def _kind(weights: Weights, parameter: str) -> torch.dtype:
    """Return the type that the file has a parameter in."""
    return next(weights.blocks(weights.tensors_of(parameter)[0]))[1].dtype


def _stored(weights: Weights, parameter: str) -> torch.Tensor:
    """Return a parameter in the type that the file has it in."""
    tensor = weights.tensor_of(parameter)
    if tensor:
        return weights.read(tensor)
    kind = weights.read(weights.tensors_of(parameter)[0]).dtype
    return weights.whole(parameter).to(kind)


def _rows(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(len(values), -1) if values.dim() else values.reshape(1, 1)


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module
