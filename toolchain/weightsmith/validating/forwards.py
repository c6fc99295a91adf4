"""The two forward passes: base with adapters (the reference), and the merged checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from weightsmith.core.cpus import all_but_one
from weightsmith.core.jobs import CombinationRule
from weightsmith.forward.adapters import NeedsWeights, replication, with_adapters
from weightsmith.forward.experts import ExpertStack
from weightsmith.forward.heads import BatchPositions, only
from weightsmith.forward.libraries import ModelFails, running
from weightsmith.forward.lockstep import Lockstep
from weightsmith.forward.network import (
    PEFT_PREFIX,
    base_name,
    decoder_layers,
    fill,
    is_missing,
    skeleton_with_weights,
)
from weightsmith.forward.products import Rows
from weightsmith.forward.views import look_up, looks_up, reads_one_by_one, require_complete, stream
from weightsmith.forward.walk import DoesNotRun
from weightsmith.forward.weights import Weights, blocks_of
from weightsmith.validating.examine import Examiner, reading_weights
from weightsmith.validating.sites import RoundedStack, Site, dtype_of, rounded_experts, sites

if TYPE_CHECKING:
    from weightsmith.forward.kinds import Model

Advance = Callable[[], None]
_KEPT_TOKENS = 16
"""Tokens per probe whose hidden states are kept for each layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeBatch:
    """A batch of probes, padded on the right, which a causal model ignores."""

    ids: torch.Tensor
    lengths: tuple[int, ...]
    counted: tuple[int, ...]
    """Per probe, the number of tokens at its end that get logits."""

    @classmethod
    def of(cls, probes: Sequence[Sequence[int]], most: int = sys.maxsize) -> ProbeBatch:
        """Return a batch of probes with at most `most` logits each."""
        width = max(len(probe) for probe in probes)
        rows = [[*probe, *[probe[-1]] * (width - len(probe))] for probe in probes]
        lengths = tuple(len(probe) for probe in probes)
        counted = tuple(min(length, most) for length in lengths)
        return cls(ids=torch.tensor(rows), lengths=lengths, counted=counted)

    @property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Row and column of every token that gets logits."""
        both = list(enumerate(zip(self.lengths, self.counted, strict=True)))
        rows = [row for row, (_, count) in both for _ in range(count)]
        columns = [column for _, (n, count) in both for column in range(n - count, n)]
        return torch.tensor(rows), torch.tensor(columns)

    def doubled(self, twins: int) -> ProbeBatch:
        """Return the batch with copies of its first probes appended."""
        return ProbeBatch(
            ids=torch.cat([self.ids, self.ids[:twins]]),
            lengths=(*self.lengths, *self.lengths[:twins]),
            counted=(*self.counted, *self.counted[:twins]),
        )

    def twin_tokens(self, twins: int) -> dict[int, int]:
        """Return a layer's number of input tokens -> how many belong to the last `twins` sequences.

        Layers get all tokens; the head only those that get logits.
        """
        width = self.ids.shape[1]
        twin_logits = sum(self.counted[len(self.counted) - twins :])
        return {sum(self.counted): twin_logits, len(self.ids) * width: twins * width}


@dataclass(slots=True, kw_only=True)
class ForwardResult:
    """Results of one forward pass."""

    logits: torch.Tensor
    """(tokens with logits, vocabulary), probe by probe."""
    hidden: list[torch.Tensor]
    """Per decoder layer, hidden states of some tokens of the first probes: (tokens, width)."""


@dataclass(slots=True, kw_only=True)
class ReferenceModel:
    """The forward pass of base and adapters, with the results of its checks."""

    run: ForwardResult
    twins: ForwardResult
    """The first probes again, with every tensor rounded as in an exact merge."""
    examiner: Examiner
    sites: tuple[Site, ...]
    replaced: dict[str, torch.Tensor]
    """Parameters that an adapter replaces."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unmerged:
    """Base and adapters, ready to run."""

    model: Any
    base: Weights
    sites: tuple[Site, ...]
    replaced: tuple[tuple[Any, dict[str, str]], ...]
    """Modules with parameters of an adapter: attribute -> the base's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseAndAdapters:
    """The reference, not built yet."""

    checkpoint: Path
    adapters: Sequence[tuple[Path, float]]

    @property
    def source(self) -> Path:
        """The folder of the base."""
        return self.checkpoint

    def streamed(self, lockstep: Lockstep, number: int) -> Model:
        """Return it with its weights in files; raise InputRefused if one is missing."""
        built = self._built()
        skip = [
            site.layer
            for site in built.sites
            if site.kind == "other" and not reads_one_by_one(built.model, site.layer, built.base)
        ]
        stream(built.model, built.base, lockstep, number, skip)
        return built

    def whole(self) -> Model:
        """Return it with its weights in memory."""
        try:
            built = self._built()
        except NeedsWeights:
            return self._built(filled=True)
        fill(built.model, built.base)
        return built

    def _built(self, *, filled: bool = False) -> Unmerged:
        """Return base and adapters; if `filled`, the base had its weights before they came."""
        bare, weights = skeleton_with_weights(self.checkpoint)
        require_complete(self.checkpoint, bare, weights)
        names = set(bare.state_dict())
        if filled:
            fill(bare, weights)
        model = with_adapters(bare, self.adapters)
        if (layers := replication(model)) is not None:
            weights.replicate(layers)
        adapted = tuple(sites(model, weights))
        replaced = tuple(replaced_parameters(model, names, weights if filled else None))
        _apply_weights(model, self.adapters, adapted, replaced, weights)
        return Unmerged(model=model, base=weights, sites=adapted, replaced=replaced)


@dataclass(frozen=True, slots=True, kw_only=True)
class MergedModel:
    """The merged checkpoint, not built yet."""

    checkpoint: Path

    @property
    def source(self) -> Path:
        """The folder."""
        return self.checkpoint

    def streamed(self, lockstep: Lockstep, number: int) -> Model:
        """Return it with its weights in files."""
        model, weights = skeleton_with_weights(self.checkpoint)
        stream(model, weights, lockstep, number)
        return model

    def whole(self) -> Model:
        """Return it with its weights in memory."""
        model, weights = skeleton_with_weights(self.checkpoint)
        fill(model, weights)
        return model


@torch.no_grad()
def reference_forward(
    unmerged: Unmerged,
    lockstep: Lockstep,
    merged: Weights,
    batch: ProbeBatch,
    twins: int,
    *,
    advance: Advance,
    mixture: CombinationRule | None = None,
) -> ReferenceModel:
    """Run base and unmerged adapters, checking every adapted layer on the way.

    `mixture` says how the merge combines the deltas, if not by their sum. Raises ModelFails if
    the logits are not finite, DoesNotRun if the merged checkpoint lacks what an adapter changes.
    """
    changed = (name for site in unmerged.sites for name in site.parameters.values())
    if lost := next((name for name in changed if not merged.has(name)), ""):
        raise DoesNotRun(
            f"the merged checkpoint has no {lost}, which an adapter changes",
            hint="it is a merge into another model: give the base and the adapters that it is of",
        )
    # The examiner's own products; leave one CPU to the other model.
    torch.set_num_threads(all_but_one())
    whole = batch.doubled(twins)
    examiner = Examiner(
        base=unmerged.base,
        merged=merged,
        twins=whole.twin_tokens(twins),
        mixture=mixture,
        apart=lockstep.away,
    )
    for site in unmerged.sites:
        examiner.watch(site)
    inside = {id(module) for site in unmerged.sites for module in site.layer.modules()}
    watch_rounding(examiner, unmerged.model, inside, unmerged.replaced)
    rows = [*range(twins), *range(len(batch.ids), len(whole.ids))]
    with reading_weights(examiner.read):
        run = _forward(unmerged.model.get_base_model(), unmerged.model, whole, rows, advance)
    tokens = sum(batch.counted)
    if not bool(torch.isfinite(run.logits[:tokens]).all()):
        raise ModelFails("the reference's logits are not finite")
    with lockstep.away():
        for site in unmerged.sites:
            examiner.finish(site)
    half = [state.chunk(2) for state in run.hidden]
    return ReferenceModel(
        run=ForwardResult(logits=run.logits[:tokens], hidden=[first for first, _ in half]),
        twins=ForwardResult(logits=run.logits[tokens:], hidden=[second for _, second in half]),
        examiner=examiner,
        sites=unmerged.sites,
        replaced={
            name: getattr(module, part).detach()
            for module, parameters in unmerged.replaced
            for part, name in parameters.items()
        },
    )


@torch.no_grad()
def merged_forward(model: Model, batch: ProbeBatch, twins: int, advance: Advance) -> ForwardResult:
    """Run the merged checkpoint, keeping hidden states of its first `twins` probes."""
    rows, columns = batch.ids.shape
    real = torch.arange(columns) < torch.tensor(batch.lengths)[:, None]
    tokens = real.flatten().nonzero()[:, 0]
    with only(BatchPositions(rows, columns, tokens, tokens)):  # nothing depends on padding
        return _forward(model, model, batch, list(range(twins)), advance)


def _apply_weights(
    model: Model,
    adapters: Sequence[tuple[Path, float]],
    adapted: Sequence[Site],
    replaced: Sequence[tuple[torch.nn.Module, dict[str, str]]],
    base: Weights,
) -> None:
    """Apply the adapters' weights to their deltas and to replaced parameters."""
    parts = {f"adapter_{number}": weight for number, (_, weight) in enumerate(adapters)}
    if all(weight == 1.0 for weight in parts.values()):
        return
    for site in adapted:
        site.apply_weights(parts)
    # PEFT allows biases from one adapter only, and one adapter per replaced module.
    biased = [n for n in parts if getattr(model.peft_config[n], "bias", "none") != "none"]
    paths = {id(module): path for path, module in model.named_modules()}
    for module, parameters in replaced:
        owner = next((n for n in parts if f".modules_to_save.{n}" in paths[id(module)]), "")
        weight = parts.get(owner or next(iter(biased), ""), 1.0)
        for part, name in parameters.items():
            if base.has(name):
                own, before = getattr(module, part), base.whole(name)
                own.data = before + weight * (own.data - before)


def replaced_parameters(
    model: Model, names: set[str], base: Weights | None = None
) -> Iterator[tuple[torch.nn.Module, dict[str, str]]]:
    """Yield modules whose parameters an adapter replaces: attribute -> the base's name.

    In a model that had its weights before, these are the ones that differ from the `base`.
    """

    def is_own(name: str, parameter: torch.Tensor) -> bool:
        if base is None or not base.has(name):
            return not is_missing(parameter)
        return not torch.equal(parameter, base.whole(name))

    for path, module in model.named_modules():
        found = {}
        for part, parameter in module.named_parameters(recurse=False):
            parts = f"{path}.{part}".removeprefix(PEFT_PREFIX).split(".")
            if "modules_to_save" in parts:
                cut = parts.index("modules_to_save")
                found[part] = ".".join(parts[:cut] + parts[cut + 2 :])
            elif (name := base_name(f"{path}.{part}")) in names and is_own(name, parameter):
                found[part] = name
        if found:
            yield module, found


def _forward(
    model: Model, outer: torch.nn.Module, batch: ProbeBatch, rows: Sequence[int], advance: Advance
) -> ForwardResult:
    """Run once; the head gets only the tokens that need logits."""
    hidden: list[torch.Tensor] = []
    length = min(batch.lengths[row] for row in rows)
    columns = torch.arange(0, length, max(1, length // _KEPT_TOKENS))

    def keep(_: torch.nn.Module, __: tuple[torch.Tensor, ...], out: Outputs) -> None:
        state = out if isinstance(out, torch.Tensor) else out[0]
        hidden.append(state[rows][:, columns].flatten(0, 1).clone())
        advance()

    def select(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        if args[0].dim() == 2:  # the twins, of which the examiner asks the head again
            return args
        return (args[0][batch.places].unsqueeze(0), *args[1:])

    hooks = [layer.register_forward_hook(keep) for layer in decoder_layers(model)]
    hooks.append(model.get_output_embeddings().register_forward_pre_hook(select))
    try:
        with running():
            logits = outer(input_ids=batch.ids, use_cache=False).logits[0].float()
    finally:
        for hook in hooks:
            hook.remove()
    return ForwardResult(logits=logits, hidden=hidden)


Outputs: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]
Kinds = Mapping[str, torch.dtype]
"""Attribute of a module -> the type that the merge rounds it to."""


def watch_rounding(
    examiner: Examiner,
    model: Model,
    done: set[int],
    replaced: Sequence[tuple[torch.nn.Module, dict[str, str]]],
) -> None:
    """Run the twins with the parameters that the merge casts rounded, of modules not `done`.

    So are those that an adapter replaces. Where that is not possible, the parameters are added to
    the examiner's `unjudged`.
    """
    adapters = {id(module): parameters for module, parameters in replaced}
    for path, module in model.named_modules():
        if id(module) in done:
            continue
        own = adapters.get(id(module), {})
        names = {part: base_name(f"{path}.{part}") for part in _parts(module)} | own
        kinds = {part: _narrower(name, examiner) for part, name in names.items() if part not in own}
        for part, name in own.items():
            kinds[part] = dtype_of(examiner.merged, name) if examiner.merged.has(name) else None
        if rounded := {part: kind for part, kind in kinds.items() if kind is not None}:
            rounding = _Rounding(examiner, module, names, rounded)
            module.register_forward_pre_hook(rounding.before)
            module.register_forward_hook(rounding.after)


def _parts(module: torch.nn.Module) -> list[str]:
    """Return the names of a module's own parameters, stacked ones that are read singly too."""
    own = [name for name, _ in module.named_parameters(recurse=False)]
    return own + [name for name, value in vars(module).items() if isinstance(value, ExpertStack)]


def _narrower(name: str, examiner: Examiner) -> torch.dtype | None:
    """Return a parameter's type in the merge if it does not hold all values of the base's."""
    both = examiner.base, examiner.merged
    if not all(weights.has(name) for weights in both):
        return None
    if len({weights.infos[weights.tensors_of(name)[0]].dtype for weights in both}) == 1:
        return None
    before, after = (dtype_of(weights, name) for weights in both)
    return after if torch.promote_types(before, after) != after else None


class _Rounding:
    """The hooks of one module."""

    def __init__(
        self, examiner: Examiner, module: Any, names: Mapping[str, str], kinds: Kinds
    ) -> None:
        self.examiner, self.module, self.names, self.kinds = examiner, module, names, kinds
        self.busy = False
        # Inner modules read their weights together with the other model, which is elsewhere.
        self.alone = not any(_parts(inner) for inner in module.modules() if inner is not module)

    def before(self, *_: object) -> None:
        """Round the parameters for the twins; those in files were just loaded."""
        for part, kind in self.kinds.items() if self.busy else ():
            values = getattr(self.module, part)
            if not isinstance(values, RoundedStack):
                values.data = values.data.to(kind).float()

    def after(
        self, _: torch.nn.Module, args: tuple[torch.Tensor, ...], out: Outputs
    ) -> Outputs | None:
        """Replace the twins' outputs."""
        if self.busy:
            return None
        with self.examiner.apart():
            flat = self._flat(args, out)
            if flat is not None:
                return flat
            if (rows := self._rows(args, out)) and self.alone:
                again = self._run_rounded(tuple(arg[-rows:] for arg in args))
                if isinstance(out, torch.Tensor):
                    return torch.cat([out[:-rows], again])
                pairs = zip(out, again, strict=True)
                return tuple(torch.cat([one[:-rows], other]) for one, other in pairs)
        self.examiner.unjudged += [self.names[part] for part in self.kinds]
        return None

    def _flat(self, args: tuple[torch.Tensor, ...], out: Outputs) -> torch.Tensor | None:
        """Return the outputs of a matrix or a table, token by token; None for other modules."""
        table = looks_up(self.module)
        if not (table or type(self.module) is nn.Linear) or len(args) != 1:
            return None
        x = args[0].flatten() if table else args[0].flatten(0, -2)
        twins = self.examiner.twins.get(len(x), 0)
        if not twins or isinstance(out, tuple):
            return None
        if table:
            rows: Rows = self.module.weight
            if is_missing(self.module.weight):
                rows = self.examiner.base.mapped(self.examiner.base.tensor_of(self.names["weight"]))
            rounded = _RoundedRows(rows, self.kinds["weight"])
            twin = look_up(self.module, type(self.module).forward, lambda: rounded, x[-twins:])
        else:
            twin = torch.cat([x[-twins:] @ rows.T for rows in self._rounded("weight")], -1)
            if self.module.bias is not None:
                twin = twin + torch.cat(list(self._rounded("bias")))
        flat = out.reshape(-1, out.shape[-1])
        return torch.cat([flat[:-twins], twin]).view(out.shape)

    def _rounded(self, part: str) -> Iterator[torch.Tensor]:
        own = getattr(self.module, part)
        missing = is_missing(own)
        blocks = self.examiner.base.rows(self.names[part]) if missing else blocks_of(own.detach())
        kind = self.kinds.get(part, torch.float32)
        for _, rows in blocks:
            yield rows.to(kind).float()

    def _rows(self, args: tuple[object, ...], out: object) -> int:
        """Return how many rows of the first dimension are the twins'; 0 if that is not known."""
        both = (*args, *(out if isinstance(out, tuple) else (out,)))
        tensors = [one for one in both if isinstance(one, torch.Tensor) and one.dim()]
        if not args or len(tensors) < len(both) or len({*map(len, tensors)}) > 1:
            return 0
        length, tokens = len(tensors[0]), tensors[0].numel() // tensors[0].shape[-1]
        # A norm of heads has several rows per token.
        fits = [
            length * twins // whole
            for whole, twins in self.examiner.twins.items()
            if tokens % whole == 0 and length * twins % whole == 0
        ]
        return max(fits, default=0)

    def _run_rounded(self, args: tuple[torch.Tensor, ...]) -> Any:
        exact = {part: getattr(self.module, part) for part in self.kinds}
        data = {p: one.data for p, one in exact.items() if not isinstance(one, ExpertStack)}
        self.busy = True
        try:
            with rounded_experts(self.module, self.kinds):
                return self.module(*args)
        finally:
            self.busy = False
            for part, values in data.items():
                getattr(self.module, part).data = values


class _RoundedRows:
    """A table whose rows are rounded when they are taken."""

    def __init__(self, table: Rows, kind: torch.dtype) -> None:
        self._table, self._kind = table, kind

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        return self._table[rows].to(self._kind).float()
