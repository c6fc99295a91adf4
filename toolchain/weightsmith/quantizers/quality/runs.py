"""Runs a checkpoint and its quantized model side by side over the same texts.

Each layer's own error, on the correct input, is measured beside the divergence of the logits: a
memorised answer survives shuffled scales, the layer's output does not (0.35 instead of 0.06 on
`examples/tiny`). Padding is not counted: with it, one layer of the support bot's GPTQ had 0.48
instead of 0.20. `llama-perplexity --kl-divergence` knows one family of formats and no layers;
perplexity alone fell at four bits.

Weights are dequantized, and compared with the checkpoint's, as they are read. The measures of a
whole model hardly show one wrong tensor of hundreds. The error of rounding is known per type and
depends on the weights only by how much a block's largest exceeds the others, so each tile of 256
rows has a limit: twice the error of normal weights. Limits by a format's bits would not do, since
Q4_K_M also has tensors of six bits. AWQ moves scales between layers and clips, so its matrices are
compared after the best scale per input.
"""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from weightsmith.core.errors import CheckFailed, Unmeasurable
from weightsmith.core.values import PACKED
from weightsmith.forward.adapters import with_adapters
from weightsmith.forward.heads import BatchPositions, logits_of, only
from weightsmith.forward.libraries import ModelFails, running
from weightsmith.forward.lockstep import Lockstep
from weightsmith.forward.network import (
    decoder_of,
    fill,
    lacking,
    modules_without_text,
    skeleton,
    skeleton_with_weights,
)
from weightsmith.forward.views import stream
from weightsmith.forward.walk import Count, Opening, Progress, walk
from weightsmith.forward.weights import Weights
from weightsmith.models.tensors import View
from weightsmith.quantizers.quality.result import TensorFault, short

if TYPE_CHECKING:
    from weightsmith.forward.kinds import Model
    from weightsmith.forward.weights import LazyRows


@dataclass(slots=True)
class States:
    """What a model's decoder returned, and the model for its head."""

    output: Any
    model: Any

    @property
    def vocabulary(self) -> int:
        """Number of tokens."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def log_probabilities(self, places: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Return [places, vocabulary] at (text, token), by the model's head and scaling."""
        rows, columns = (list(axis) for axis in zip(*places, strict=True))
        with torch.inference_mode():
            states = self.output[0][rows, columns]
            return logits_of(self.model, type(self.output), states).log_softmax(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Both:
    """What both models computed, and the errors of the quantized one."""

    checkpoint: States
    quantized: States
    layers: Mapping[int, float]
    """Decoder layer -> its own error."""
    errors: Mapping[str, float]
    """Tensor -> its relative error."""
    faults: Sequence[TensorFault]
    """Tensors that are damaged."""


def run_both(
    model: Path, view: View, ids: torch.Tensor, lengths: Sequence[int], progress: Progress
) -> Both:
    """Run token ids [texts, tokens] through both; text i has `lengths[i]` tokens, then padding.

    Padding is not multiplied: of the general texts, it would be 4 positions of 10. Raises
    Unmeasurable for an unsupported architecture, CheckFailed for weights that are not finite.
    """
    layers = len(decoder_layers(skeleton(model)))
    compared = LayerErrors(lengths[0], partial(Count(2 * layers, progress), 1))
    quantized = QuantizedNetwork(model, view)
    probed = torch.cat([ids, ids[:PROBE_ROWS]])
    columns = torch.arange(ids.shape[1])
    real = columns < torch.tensor([*lengths, *lengths[:PROBE_ROWS]])[:, None]

    def run(network: Model, lockstep: Lockstep) -> States:
        if network is quantized.network:
            compared.compare(network, lockstep)
            return _run(network, probed, real)
        compared.record(network)
        return _run(network, ids, real[: len(ids)])

    both: dict[str, Opening] = {"checkpoint": _Checkpoint(model), "quantized": quantized}
    found = walk(both, dict.fromkeys(both, run), alike=True)
    if weights := quantized.weights:
        weights.compare_rest()
    return Both(
        **found,
        layers=compared.found,
        errors=weights.errors if weights else {},
        faults=weights.faults if weights else (),
    )


def _run(model: Model, ids: torch.Tensor, real: torch.Tensor) -> States:
    tokens, (rows, columns) = real.flatten().nonzero()[:, 0], real.shape
    positions = BatchPositions(rows, columns, tokens, tokens)
    with torch.inference_mode(), running(), only(positions):
        return States(decoder_of(model)(input_ids=ids, use_cache=False), model)


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    checkpoint: Path

    @property
    def source(self) -> Path:
        return self.checkpoint

    def streamed(self, lockstep: Lockstep, number: int) -> Model:
        model, weights = self._built()
        stream(model, weights, lockstep, number)
        decoder_of(model).register_forward_hook(_require_finite)
        return model

    def whole(self) -> Model:
        model, weights = self._built()
        fill(model, weights)
        return model

    def _built(self) -> tuple[Model, Weights]:
        model, weights = skeleton_with_weights(self.checkpoint)
        if names := lacking(model, weights):
            raise Unmeasurable(
                f"the checkpoint has no tensor {names[0]}, which its architecture needs",
                hint="use the task score instead",
            )
        return model, weights


@dataclass(slots=True)
class QuantizedNetwork:
    """A quantized model with its checkpoint's network, to be opened by `walk`."""

    checkpoint: Path
    view: View
    network: Any = None
    weights: Dequantized | None = None

    @property
    def source(self) -> str:
        """Its own matrices."""
        return "quantized"

    def streamed(self, lockstep: Lockstep, number: int) -> Model:
        """Return it with its weights dequantized when they are used."""
        model, weights = self._built()
        stream(model, weights, lockstep, number, modules_without_text(model))
        return model

    def whole(self) -> Model:
        """Return it with its weights dequantized in memory."""
        model, weights = self._built()
        fill(model, weights, modules_without_text(model))
        return model

    def _built(self) -> tuple[Model, Weights]:
        self.network, _ = skeleton_with_weights(self.checkpoint)
        self.weights = Dequantized(self.checkpoint, self.network, self.view)
        return self.network, self.weights


@dataclass(slots=True)
class QuantizedSubject(QuantizedNetwork):
    """What `merging.reference.Subject` says of a checkpoint, of its quantized weights."""

    adapters: Sequence[tuple[Path, float]] = ()
    speakers: Sequence[Path] = ()
    draft: str = ""
    draft_texts: Sequence[str] = ()
    beside: Sequence[Path] = ()
    """Adapters that PEFT adds to its weights, as an engine does that serves them unmerged."""

    @property
    def model(self) -> Path:
        """The checkpoint, whose tokenizer and chat template word the questions."""
        return self.checkpoint

    def streamed(self, lockstep: Lockstep, number: int) -> Model:
        """Return it with its weights dequantized when they are used, and with its adapters."""
        model, weights = self._built()
        without_text = modules_without_text(model)
        stream(self._adapted(model), weights, lockstep, number, without_text)
        return self.network

    def whole(self) -> Model:
        """Return it with its weights dequantized in memory, and with its adapters."""
        return self._adapted(QuantizedNetwork.whole(self))

    def _adapted(self, model: Model) -> Model:
        if self.beside:
            self.network = with_adapters(model, [(folder, 1.0) for folder in self.beside])
        return self.network


def _require_finite(_: torch.nn.Module, __: object, output: Sequence[torch.Tensor]) -> None:
    """Raise ModelFails if the states are not finite: a weight was used without its module."""
    if not bool(torch.isfinite(output[0]).all()):
        raise ModelFails("the hidden states are not finite")


PROBE_ROWS = 1
"""First sequences on which each layer's own error is measured."""


def decoder_layers(model: Model) -> list[torch.nn.Module]:
    """Return the decoder's layers; raise Unmeasurable if there is not exactly one list of them."""
    lists = [m for m in decoder_of(model).children() if isinstance(m, torch.nn.ModuleList)]
    if len(lists) != 1:
        raise Unmeasurable(
            f"{type(model).__name__} has no single list of decoder layers to measure",
            hint="use the task score instead",
        )
    return list(lists[0])


@dataclass(slots=True)
class LayerErrors:
    """Compares the layers of two models that run at the same time.

    The quantized model's batch ends with copies of its first sequences. In front of each layer,
    their states are replaced by the checkpoint's.
    """

    length: int
    """Tokens of the probe without padding, where errors do not matter but can be three times as
    large."""
    advance: Callable[[], None]
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    found: dict[int, float] = field(default_factory=dict)
    """Layer -> its error, relative to what it adds to its input."""

    def record(self, model: Model) -> None:
        """Record inputs and outputs of the checkpoint's layers."""
        for number, layer in enumerate(decoder_layers(model)):
            _hook(layer, partial(self._note_input, number), partial(self._note_output, number))

    def compare(self, model: Model, lockstep: Lockstep) -> None:
        """Judge the quantized model's layers, each when the checkpoint has run it."""
        for number, layer in enumerate(decoder_layers(model)):
            judge = partial(self._judge, number, lockstep)
            _hook(layer, partial(self._replace, number, lockstep), judge)

    def _note_input(self, number: int, states: torch.Tensor) -> torch.Tensor:
        self.inputs[number] = states[:PROBE_ROWS].clone()
        return states

    def _note_output(self, number: int, states: torch.Tensor) -> None:
        self.outputs[number] = states[:PROBE_ROWS].clone()
        self.advance()

    def _replace(self, number: int, lockstep: Lockstep, states: torch.Tensor) -> torch.Tensor:
        lockstep.wait_until(lambda: number in self.inputs)
        return torch.cat([states[:-PROBE_ROWS], self.inputs[number]])

    def _judge(self, number: int, lockstep: Lockstep, states: torch.Tensor) -> None:
        lockstep.wait_until(lambda: number in self.outputs)
        before, right = self.inputs.pop(number), self.outputs.pop(number)
        before, right = before[:, : self.length], right[:, : self.length]
        change = float((right - before).norm()) or 1.0
        found = states[-PROBE_ROWS:, : self.length]
        self.found[number] = float((found - right).norm()) / change
        self.advance()


def _hook(
    layer: torch.nn.Module,
    started: Callable[[torch.Tensor], torch.Tensor],
    ended: Callable[[torch.Tensor], None],
) -> None:
    def before(
        _: torch.nn.Module, args: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]
    ) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        if args:
            return (started(args[0]), *args[1:]), named
        return args, {**named, "hidden_states": started(named["hidden_states"])}

    def after(
        _: torch.nn.Module, __: object, output: torch.Tensor | tuple[torch.Tensor, ...]
    ) -> None:
        ended(output[0] if isinstance(output, tuple) else output)

    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(after)


class Dequantized(Weights):
    """A view's tensors by the parameter names of the checkpoint's model.

    Matrices are read a few rows at a time, and what fits of the last one stays in memory.
    """

    def __init__(self, root: Path, model: Model, view: View) -> None:
        """Map names as for the checkpoint in `root`."""
        super().__init__(root, model)
        self._view = view
        self._last: tuple[str, LazyMatrix] | None = None
        self._squares: dict[str, dict[int, Squares]] = defaultdict(dict)
        self._faults: dict[str, list[TensorFault]] = defaultdict(list)

    @property
    def errors(self) -> Mapping[str, float]:
        """Tensor -> norm of its error, relative to the checkpoint's tensor, as far as it was read.

        Sums are in the order of the rows, whichever thread compared them first.
        """
        found = {}
        for name, tiles in self._squares.items():
            inorder = [tiles[at] for at in sorted(tiles)]
            error, size = sum(one.error for one in inorder), sum(one.size for one in inorder)
            found[name] = Squares(error, size).relative
        return found

    @property
    def faults(self) -> Sequence[TensorFault]:
        """Tensors with rows that are further from the checkpoint's than their type explains.

        Of several, the worst rows are named, and the first of these, whichever thread found them.
        """
        return [
            min(self._faults[name], key=lambda one: (-one.error, one.row))
            for name in sorted(self._faults)
        ]

    def mapped(self, tensor: str) -> Any:
        """Return a tensor whose rows are dequantized when they are used; see `read`."""
        if self._last is None or self._last[0] != tensor:
            self._last = None
            self._last = tensor, self._tiles(tensor)
        return self._last[1]

    def experts(self, parameter: str) -> Sequence[Sequence[Callable[[], torch.Tensor | LazyRows]]]:
        """Return what reads single experts, as for a checkpoint; () if one tensor has all."""
        return super().experts(parameter) if not self.tensor_of(parameter) else ()

    def compare_rest(self) -> None:
        """Compare the experts that got no token.

        Raises Unmeasurable and CheckFailed as `read` does.
        """
        for name in sorted(self.of_experts):
            if not self._squares.get(name):
                self.read(name)

    def read(self, tensor: str) -> torch.Tensor:
        """Return a whole tensor as float32.

        Raises Unmeasurable if the view lacks it, CheckFailed if it has another shape than the
        checkpoint's or is not finite.
        """
        self._require(tensor)
        values = torch.from_numpy(np.require(self._view.tensor(tensor), requirements="W"))
        self._check_shape(tensor, values, 0, None)
        if not self._squares.get(tensor):
            found = [
                self._compared(tensor, first, values[first : first + len(rows)], rows)
                if rows.dim()
                else self._compared(tensor, first, values, rows)
                for first, rows in self.blocks(tensor)
            ]
            self._squares[tensor] = dict(enumerate(found))
        return values

    def _tiles(self, name: str) -> LazyMatrix:
        self._require(name)
        shape, right = torch.Size(self.infos[name].shape), super().mapped(name)

        def read(first: int, last: int) -> torch.Tensor:
            # The last tile asks for one row more, which only a tensor of another height has.
            end = last + (last == shape[0])
            rows = np.require(self._view.rows(name, first, end), requirements="W")
            tile = torch.from_numpy(rows)
            self._check_shape(name, tile, first, last)
            return tile

        def compare(first: int, tile: torch.Tensor) -> Squares:
            return self._compared(name, first, tile, right[first : first + len(tile)])

        return LazyMatrix(shape, read, self._squares[name], compare)

    def _require(self, name: str) -> None:
        if name not in self._view.names:
            # Do not fall back to the checkpoint's weights.
            raise Unmeasurable(
                f"the quantized model has no tensor {name}, which its architecture needs",
                hint="use the task score instead",
            )

    def _check_shape(self, name: str, rows: torch.Tensor, first: int, last: int | None) -> None:
        right = self.infos[name].shape
        height = [len(range(count)[first:last]) for count in right[:1]]
        if [*rows.shape] != [*height, *right[1:]]:
            shape = [first + len(rows), *rows.shape[1:]] if rows.dim() else []
            more = last is not None and [*rows.shape[1:]] == [*right[1:]] and shape > [*right]
            what = f"more than {right[0]} rows" if more else f"shape {shape}"
            raise CheckFailed(
                f"{name} has {what}, but {list(right)} in the checkpoint",
                hint="the quantizer wrote another model; quantize again",
            )

    def _compared(
        self, name: str, first: int, dequantized: torch.Tensor, rows: torch.Tensor
    ) -> Squares:
        original = rows.float()
        error = float((dequantized - original).norm()) ** 2
        if not math.isfinite(error):
            raise CheckFailed(
                f"{name} has NaN or infinite values",
                hint="check the merged weights for outliers, or choose a larger format",
            )
        found = Squares(error, float(original.norm()) ** 2)
        kind = self._view.kind(name)
        rounding = ROUNDING.get(kind) if rows.dim() > 1 else None
        if rounding is not None and found.relative > rounding.usual:
            most, tiny = rounding.limit(original), rows.numel() * rounding.tiny**2
            if found.relative > most and found.error > tiny:
                error, limit = short(found.relative), short(most)
                fault = TensorFault(tensor=name, row=first, kind=kind, error=error, limit=limit)
                self._faults[name].append(fault)
        return found


TILE = 256
"""Rows that are dequantized at a time."""
KEPT = 128 << 20
"""Bytes of the last matrix that stay in memory, since a head is read once per part of the text."""


@dataclass(frozen=True, slots=True)
class Squares:
    """Sums of squares over a tile: of its error, and of the checkpoint's weights."""

    error: float
    size: float

    @property
    def relative(self) -> float:
        """The norm of the error, divided by that of the weights unless they are all zero."""
        return math.sqrt(self.error / self.size) if self.size else math.sqrt(self.error)


@dataclass(slots=True)
class LazyMatrix:
    """Stands for a matrix where only rows of it are read; several threads may read it."""

    shape: torch.Size
    read: Callable[[int, int], torch.Tensor]
    """(first row, end) -> float32 [rows, columns]."""
    compared: dict[int, Squares]
    """First row of a tile -> its squares; each tile is compared when it is first read."""
    compare: Callable[[int, torch.Tensor], Squares]
    dtype: torch.dtype = torch.float32
    _kept: dict[int, torch.Tensor] = field(default_factory=dict)
    _room: int = KEPT
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Return rows as float32: a slice without step, or the rows of an index.

        An index is an embedding's, which compares all tiles and not only those that a text uses.
        """
        if isinstance(rows, torch.Tensor):
            found = torch.empty((len(rows), *self.shape[1:]))
            for at in range(0, len(self), TILE):
                wanted = (rows >= at) & (rows < at + TILE)
                if at not in self.compared or bool(wanted.any()):
                    found[wanted] = self._tile(at)[rows[wanted] - at]
            return found
        first, last, _ = rows.indices(len(self))
        starts = range(first - first % TILE, last, TILE)
        parts = [self._tile(at)[max(0, first - at) : last - at] for at in starts]
        return parts[0] if len(parts) == 1 else torch.cat([self._tile(0)[:0], *parts])

    def _tile(self, at: int) -> torch.Tensor:
        tile = self._kept.get(at)
        if tile is None:
            tile = self.read(at, min(at + TILE, len(self)))
            if at not in self.compared:
                self.compared[at] = self.compare(at, tile)
            size = tile.numel() * tile.element_size()
            with self._lock:
                if size <= self._room:
                    self._room -= size
                    self._kept[at] = tile
        return tile


_MARGIN = 2.0
_HIGHEST = 0.95
"""A tensor of zeros has an error of 1."""
_COPIED = 0.01
"""For weights in 16 or 32 bits."""
_TINY = 2.0**-14
"""Root mean square of an error that is no damage. Scales in float16 have steps of 2**-24, which are
multiplied by up to 1000. So weights below 0.0001, such as those of tokens that no text has, may
become zero; errors of up to 0.000035 were measured."""
_TINY_COPIED = 2.0**-24
"""The same for float16 itself."""


@dataclass(frozen=True, slots=True)
class Rounding:
    """A type's relative error on normally distributed weights."""

    error: float
    block: int = 32
    """Weights that share a scale, whose largest decides the error; 0: none does; -1: a row."""
    tiny: float = _TINY
    """Root mean square of an error that is no damage, however small the weights are."""

    @property
    def usual(self) -> float:
        """The largest error of normally distributed weights that is no damage."""
        return min(_HIGHEST, _MARGIN * self.error)

    def limit(self, rows: torch.Tensor) -> float:
        """Return the largest error of these rows, [n, columns], that is no damage.

        It grows with how much larger the blocks' largest weights are than those of normal ones. The
        largest of n normal numbers is about 1.28 + 0.31 log n, as the root of its mean square.
        Measured: 2.14 for 16, 2.40 for 32, 2.87 for 128, 3.65 for 2048.
        """
        excess = 1.0
        if self.block:
            width = rows.shape[-1] if self.block < 0 else self.block
            flat = rows.reshape(-1, rows.shape[-1])
            if flat.shape[-1] % width:
                flat = torch.nn.functional.pad(flat, (0, width - flat.shape[-1] % width))
            largest = flat.reshape(len(flat), -1, width).abs().amax(-1)
            mean = float(rows.square().mean()) or math.inf
            normal = 1.28 + 0.31 * math.log(width)
            excess = max(1.0, math.sqrt(float(largest.square().mean()) / mean) / normal)
        return min(_HIGHEST, _MARGIN * self.error * excess)


ROUNDING: Mapping[str, Rounding] = {
    "q8_0": Rounding(0.0054),
    "q6_k": Rounding(0.0189),
    "q5_k": Rounding(0.0374),
    "q5_1": Rounding(0.0379),
    "q5_0": Rounding(0.0427),
    "q4_k": Rounding(0.0765),
    "q4_1": Rounding(0.0782),
    "iq4_nl": Rounding(0.0795),
    "iq4_xs": Rounding(0.0799),
    "q4_0": Rounding(0.0861),
    "nvfp4": Rounding(0.1032),
    "mxfp4": Rounding(0.1145),
    "q3_k": Rounding(0.1565),
    "iq3_s": Rounding(0.1663),
    "iq3_xxs": Rounding(0.2165),
    "iq2_s": Rounding(0.2749),
    "q2_k": Rounding(0.2970),
    "iq2_xs": Rounding(0.3403),
    "iq2_xxs": Rounding(0.3820),
    "int-quantized": Rounding(0.0083, block=-1),
    "float-quantized": Rounding(0.0263, block=0),
    "modelopt-fp8": Rounding(0.0263, block=0),
    "modelopt-nvfp4": Rounding(0.1032, block=16),
    "nvfp4-pack-quantized": Rounding(0.1032, block=16),
    "mxfp4-pack-quantized": Rounding(0.1145),
    "mxfp8-quantized": Rounding(0.0266, block=0),
    # With groups of 128; rounding errors are moved to other weights on purpose.
    "gptq": Rounding(0.2, block=128),
    PACKED: Rounding(0.2, block=128),
    "f32": Rounding(_COPIED / _MARGIN, block=0, tiny=_TINY_COPIED),
    "f16": Rounding(_COPIED / _MARGIN, block=0, tiny=_TINY_COPIED),
    "bf16": Rounding(_COPIED / _MARGIN, block=0, tiny=_TINY_COPIED),
}
"""Below two bits, and where scales are moved between tensors (AWQ), no limit would say anything."""
