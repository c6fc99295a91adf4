"""Read a checkpoint's tensors by the model's parameter names, a few rows at a time.

Each linear layer and embedding reads its rows while it runs, so neither a layer nor the vocabulary
of a large model must fit into memory, and no architecture needs a list of layer names. `accelerate`
holds whole layers, for both models, and needs a copy of the checkpoint.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from weightsmith.forward.libraries import ModelFails, running
from weightsmith.models.safetensors import TensorInfo, open_checkpoint
from weightsmith.models.tensors import Data, data_of

if TYPE_CHECKING:
    from transformers.core_model_loading import WeightConverter

    from weightsmith.forward.kinds import Model

BLOCK = 1 << 19
"""Elements in memory at a time: few enough for the CPU cache."""
_BLOCKS = 32
"""Blocks read before the file is reopened: until then its pages count as our memory."""

_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_LAYER = re.compile(r"(.*\.layers\.)(\d+)(\..+)")
"""The names of layers that PEFT replicates, in every architecture that it supports."""


class LazyRows:
    """Stands for a stored tensor whose rows are computed when they are indexed."""

    def __init__(self, data: Data, info: TensorInfo) -> None:
        """Raise KeyError for a dtype that no merged weight has."""
        self._data, self._info = data, info
        self.shape, self.dtype = torch.Size(info.shape), _TYPES[info.dtype]
        self._row = info.size // info.shape[0] if math.prod(info.shape) else 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return self.shape[0]

    def __getitem__(self, rows: slice | torch.Tensor) -> torch.Tensor:
        """Return rows in the file's dtype: a slice without step, or the rows of an index."""
        if isinstance(rows, torch.Tensor):
            found = [self._read(row, row + 1) for row in rows.tolist()]
            return torch.cat(found) if found else torch.empty((0, *self.shape[1:])).to(self.dtype)
        first, last, _ = rows.indices(len(self))
        return self._read(first, max(first, last))

    def part(self, number: int) -> LazyRows:
        """Return one matrix of a stack."""
        start = self._info.start + number * self._row
        shape, end = self._info.shape[1:], start + self._row
        return LazyRows(self._data, replace(self._info, shape=shape, start=start, end=end))

    def whole(self) -> torch.Tensor:
        """Return the whole tensor."""
        return self[:] if self.shape else self._as_tensor(0, self._info.size).reshape(())

    def split(self, size: int, dim: int = 0) -> Iterator[torch.Tensor]:
        """Yield the rows, so many at a time; called by torch.split."""
        if dim:
            raise ValueError("only rows can be split")
        for first in range(0, len(self), size):
            yield self[first : first + size]

    def _read(self, first: int, last: int) -> torch.Tensor:
        flat = self._as_tensor(first * self._row, (last - first) * self._row)
        return flat.reshape(last - first, *self.shape[1:])

    def _as_tensor(self, start: int, size: int) -> torch.Tensor:
        if not size:
            return torch.empty(0, dtype=self.dtype)
        return torch.from_numpy(self._data.read(self._info.start + start, size)).view(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fused:
    """A parameter that transformers builds from several tensors, such as stacked experts."""

    converter: Any
    parts: list[tuple[str, str]] = field(default_factory=list)
    """Tensor name and the converter's pattern that it matches."""


class Weights:
    """A folder's tensors by parameter name of `model`, renamed as transformers does on loading.

    Files are read with the safetensors library and closed at once, so that their pages do not
    count as this process's memory. Tensors of a file without data are computed.
    """

    def __init__(self, root: Path, model: Model) -> None:
        index = open_checkpoint(root)
        self._model = model
        self.infos: dict[str, TensorInfo] = index.tensors
        self._files = {i.name: shard.path for shard in index.shards for i in shard.tensors}
        self._open: dict[Path, Any] = {}
        self._mapped: dict[str, torch.Tensor] = {}
        self._computed = {
            info.name: LazyRows(data, info)
            for shard in index.shards
            if (data := data_of(shard))
            for info in shard.tensors
        }
        self._direct: dict[str, str] = {}
        self._fused: dict[str, tuple[str, _Fused]] = {}
        self._map(model)
        for target, source in dict(getattr(model, "all_tied_weights_keys", {})).items():
            if target not in self._direct and source in self._direct:
                self._direct[target] = self._direct[source]

        # By tensor: a view with replicated layers has other parameters than its base. A tied head's
        # tensor has the place of the head, the last one.
        self.order = {
            tensor: place
            for place, name in enumerate(self.parameters)
            if self.has(name)
            for tensor in self.tensors_of(name)
        }

    def replicate(self, sources: Sequence[int]) -> None:
        """Rename for a model with replicated layers: layer i is the file's layer `sources[i]`."""
        if self._fused:
            raise ModelFails("replicated layers of an architecture with stacked weights")
        old, self._direct = self._direct, {}
        for name, tensor in old.items():
            match = _LAYER.fullmatch(name)
            if match is None:
                self._direct[name] = tensor
                continue
            for place, source in enumerate(sources):
                if int(match[2]) == source:
                    self._direct[f"{match[1]}{place}{match[3]}"] = tensor
        self.parameters = tuple(self._direct)

    def has(self, parameter: str) -> bool:
        """Return whether the checkpoint has the tensors of the parameter."""
        return parameter in self._direct or parameter in self._fused

    def tensor_of(self, parameter: str) -> str:
        """Return the parameter's tensor, or "" if it is built from several."""
        return self._direct.get(parameter, "")

    def tensors_of(self, parameter: str) -> tuple[str, ...]:
        """Return all tensors of the parameter."""
        if parameter in self._direct:
            return (self._direct[parameter],)
        return tuple(name for name, _ in self._fused[parameter][1].parts)

    def rows(self, parameter: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield first row and rows of a parameter that is one tensor, in the file's dtype."""
        return self.blocks(self._direct[parameter])

    def blocks(self, tensor: str) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield first row and rows of a tensor in the file's dtype, at most BLOCK elements."""
        shape = self.infos[tensor].shape
        if not shape:
            yield 0, self.read(tensor)
            return
        step = _rows_of(shape)
        if (values := self._computed.get(tensor)) is not None:
            yield from ((first, values[first : first + step]) for first in range(0, shape[0], step))
            return
        for start in range(0, shape[0], step * _BLOCKS):
            with safe_open(self._files[tensor], framework="pt") as file:
                part = file.get_slice(tensor)
                for first in range(start, min(start + step * _BLOCKS, shape[0]), step):
                    yield first, part[first : first + step].clone()

    def mapped(self, tensor: str) -> torch.Tensor | LazyRows:
        """Return a whole tensor in the file's dtype; a row is read from the disk when it is used.

        The file stays open, and the kernel may drop its pages.
        """
        if (values := self._computed.get(tensor)) is not None:
            return values
        if tensor not in self._mapped:  # safetensors takes as long for it as for a small product
            path = self._files[tensor]
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt")
            self._mapped[tensor] = self._open[path].get_tensor(tensor)
        return self._mapped[tensor]

    @property
    def of_experts(self) -> frozenset[str]:
        """The tensors of single experts."""
        stacks = [one for _, one in self._fused.values() if _only_stacks(one.converter)]
        return frozenset(name for stack in stacks for name, _ in stack.parts)

    def experts(self, parameter: str) -> Sequence[Sequence[Callable[[], torch.Tensor | LazyRows]]]:
        """Return what reads the matrices [rows, columns] of each expert of a stacked parameter.

        An expert's matrices follow each other. () if the parameter is stored in another form.
        """
        if parameter in self._direct:
            tensor = self._direct[parameter]
            return [[partial(self._expert, tensor, n)] for n in range(self.infos[tensor].shape[0])]
        return [[partial(self.mapped, name) for name in one] for one in self._stacked(parameter)]

    def _stacked(self, parameter: str) -> Sequence[tuple[str, ...]]:
        """Return each expert's tensors, whose rows follow each other; () for other forms."""
        fused = self._fused[parameter][1]
        if not _only_stacks(fused.converter):
            return ()
        patterns = fused.converter.source_patterns
        lists = [[name for name, of in fused.parts if of == pattern] for pattern in patterns]
        return list(zip(*lists, strict=True))

    def _expert(self, tensor: str, number: int) -> torch.Tensor | LazyRows:
        stack = self.mapped(tensor)
        return stack.part(number) if isinstance(stack, LazyRows) else stack[number]

    def slice(self, tensor: str, first: int, last: int) -> torch.Tensor:
        """Return a copy of rows of a tensor, in the file's dtype."""
        if (values := self._computed.get(tensor)) is not None:
            return values[first:last]
        with safe_open(self._files[tensor], framework="pt") as file:
            rows: torch.Tensor = file.get_slice(tensor)[first:last]
            return rows.clone()

    def read(self, tensor: str) -> torch.Tensor:
        """Return a copy of a whole tensor, in the file's dtype."""
        if (values := self._computed.get(tensor)) is not None:
            return values.whole()
        with safe_open(self._files[tensor], framework="pt") as file:
            stored: torch.Tensor = file.get_tensor(tensor)
            return stored.clone()

    def whole(self, parameter: str) -> torch.Tensor:
        """Return a whole parameter as float32, which holds every 16-bit type exactly.

        Raises ModelFails if the checkpoint does not have it.
        """
        if parameter in self._direct:
            return self.read(self._direct[parameter]).float()
        if parameter not in self._fused:  # an adapter's, which its file lacks
            raise ModelFails(f"{parameter} is stored nowhere")
        if experts := self._stacked(parameter):  # the converter would hold all of them twice more
            read = (torch.cat([self.read(n).float() for n in names]) for names in experts)
            one = next(read)
            stack = one.expand(len(experts), *one.shape).contiguous()
            for number, matrix in enumerate(read, 1):
                stack[number] = matrix
            return stack
        first, fused = self._fused[parameter]
        converter = deepcopy(fused.converter)
        for name, pattern in fused.parts:
            converter.add_tensor(first, name, pattern, lambda n=name: self.read(n).float())
        with running():
            made = converter.convert(first, model=self._model, config=self._model.config)
        value = made[parameter]
        whole: torch.Tensor = value[0] if isinstance(value, list) else value
        return whole

    @running()
    def _map(self, model: Model) -> None:
        """Map tensors to parameters as `convert_and_load_state_dict_in_model` does."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        mapping = get_model_conversion_mapping(model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        known = model.state_dict()
        prefix = model.base_model_prefix
        groups: dict[str, _Fused] = {}
        unused: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self.infos, key=dot_natural_key):
            new, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if new not in known and name in known:
                new, pattern = rename_source_key(name, [], [], prefix, known)
            if new not in known:
                unused[new].append(name)
            elif pattern is None:
                self._direct[new] = name
            else:
                group = groups.setdefault(new, _Fused(converter=by_pattern[pattern]))
                group.parts.append((name, pattern))
        for first, group in groups.items():
            counts = Counter(pattern for _, pattern in group.parts)
            stacked = group.converter.source_patterns if _only_stacks(group.converter) else ()
            if any(counts[pattern] != len(known[first]) for pattern in stacked):
                continue  # one of the experts lacks a tensor
            targets = group.converter.target_patterns
            for target in targets:
                self._fused[first.replace(targets[0], target)] = (first, group)
        self.unused = tuple(name for names in unused.values() for name in names)
        self.parameters = tuple(known)


def _only_stacks(converter: WeightConverter) -> bool:
    """Return whether matrices become rows of an expert, and experts a stack, and nothing else."""
    done = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    stacked, joined = ("MergeModulelist", 0), ("Concatenate", 1)
    return done == [stacked, joined] or (done == [stacked] and len(converter.source_patterns) == 1)


def blocks_of(values: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield first row and rows of a tensor in memory, in blocks like those of a file's tensor."""
    step = _rows_of(values.shape)
    for first in range(0, len(values), step):
        yield first, values[first : first + step]


def _rows_of(shape: Sequence[int]) -> int:
    return max(1, BLOCK // max(1, math.prod(shape[1:])))
