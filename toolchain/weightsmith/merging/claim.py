"""Claims: which adapter keys a family handles, and how they change the base."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weightsmith.core.errors import InputRefused
from weightsmith.merging.adapter_config import AdapterConfig
from weightsmith.merging.names import BaseNames
from weightsmith.merging.outputs import Change, MatrixView, Patch, StoredTensor, TensorSource, Term
from weightsmith.merging.tying import HEADS, Tie, is_embedding, is_head
from weightsmith.models.safetensors import TensorInfo, read_header

SHOWN = 5
TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
"""PEFT's `task_type` -> suffix of the architecture's name in transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Adapter keys handled by a family, the base tensor that they change, and how.

    One of `terms` (added), `patch` (new rows), `replacement` (new tensor), `change` (computed).
    """

    keys: tuple[str, ...]
    """Each key of the adapter is in exactly one claim; further claims of a key omit it."""
    module: str
    """The module's name in the model."""
    target: str = ""
    """The base tensor's name; empty for keys used only in training."""
    both: bool = False
    """True if a weight shared by embedding and head changes for both."""
    columns: int = 0
    """Width of the target viewed as a matrix; 0: from its shape."""
    terms: tuple[Term, ...] = ()
    piece: bool = False
    """True if the rows that the terms change are a layer of their own in the model."""
    patch: Patch | None = None
    replacement: StoredTensor | None = None
    change: Change | None = None
    new: bool = False
    """True if the base has no such tensor: the head of another task."""

    @property
    def kind(self) -> str:
        """Which one of the four is set."""
        ways = ("terms", "patch", "replacement", "change")
        return next(way for way in ways if getattr(self, way))


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterView:
    """A family's input: one adapter's keys and configuration, and the base's tensors."""

    path: Path
    """The adapter's folder."""
    file: Path
    """The file that holds `keys`."""
    files: tuple[str, ...]
    """Names of all files that count."""
    weight: float
    keys: Mapping[str, TensorInfo]
    config: AdapterConfig
    index: int = 0
    """The adapter's index in the request."""
    names: BaseNames = field(default_factory=lambda: BaseNames({}))
    sources: Mapping[str, TensorSource] = field(default_factory=dict)
    """The base's tensors; quantized ones are dequantized."""
    base_config: Mapping[str, object] = field(default_factory=dict)
    tie: Tie | None = None
    """The weight shared by the base's embedding and head."""
    apart: Tie | None = None
    """Embedding and head that config.json ties although the base has different weights for them."""

    def stored(self, key: str) -> StoredTensor:
        """Return one of the adapter's tensors."""
        return StoredTensor(path=self.file, info=self.keys[key])

    def matrix(self, info: TensorInfo) -> MatrixView:
        """Return one of the adapter's tensors as a matrix whose rows are its first axis."""
        return MatrixView(stored=StoredTensor(path=self.file, info=info), height=info.shape[0])

    def source(self, target: str) -> TensorSource:
        """Return a target's values before the merge; for a tied head, its embedding's."""
        tied = self.tie and target == self.tie.head
        return self.sources[self.tie.embedding if self.tie and tied else target]

    def shape(self, target: str) -> tuple[int, ...]:
        """Return a target's shape."""
        return self.source(target).shape

    def term(
        self, left: MatrixView, right: MatrixView | None, scaling: float, first: int = 0
    ) -> Term:
        """Return a term at the adapter's weight; raise InputRefused if the factor overflows."""
        factor = self.weight * scaling
        if not math.isfinite(factor):
            raise InputRefused(
                f"{self.path}: weight {self.weight} times scaling {scaling} overflows",
                hint="give a smaller weight",
            )
        return Term(
            adapter=self.index,
            left=left,
            right=right,
            scaling=scaling,
            factor=factor,
            first=first,
        )

    def require_float(self, key: str) -> None:
        """Refuse a tensor of the adapter that has no floats that a merge can use."""
        if (dtype := self.keys[key].dtype) not in ("F32", "F16", "BF16"):
            raise InputRefused(
                f"{self.path}: {key} has the unsupported dtype {dtype}",
                hint="save the adapter in float32, float16 or bfloat16",
            )

    def is_head(self, module: str) -> bool:
        """Return whether a module is the model's head.

        In a model with another head, a layer may have the name that a head has elsewhere.
        """
        tie = self.tie or self.apart
        last = module.rpartition(".")[2]
        own = last in HEADS or not tie or tie.head.endswith(f"{last}.weight")
        return own and is_head(module)

    def alias_target(self, name: str) -> str:
        """Return the base tensor that a tied bias is an alias of, or ""."""
        biases = self.tie.also if self.tie and name.endswith(".bias") else ()
        return dict(biases).get(name, "")

    def find(self, module: str, parameter: str = "weight") -> str:
        """Return the base tensor of a module's parameter, or "".

        Raises InputRefused if it is ambiguous.
        """
        if self.tie and parameter == "weight" and self.is_head(module):
            return self.tie.head
        name = f"{module}.{parameter}"
        found = self.names.find(name) or self.names.find(self.alias_target(name) or name)
        if len(found) > 1:
            raise InputRefused(
                f"{self.path}: {module} matches several base tensors: {', '.join(found[:SHOWN])}",
                hint="rename the adapter's keys to the full module path",
            )
        return found[0] if found else ""

    def require_plain(self, module: str) -> None:
        """Refuse an embedding or head with parameters of its own beside weight and bias.

        PEFT adds to what the layer makes of its weight, such as its norm; a merge cannot.
        """
        if not (is_embedding(module) or self.is_head(module)):
            return
        names = (self.names.loaded(name) for name in self.sources)
        parts = {name.removeprefix(f"{module}.") for name in names if name.startswith(f"{module}.")}
        if more := sorted(parts - {"weight", "bias"}):
            raise InputRefused(
                f"{self.path} changes {module}, whose class also computes with {more[0]}: PEFT "
                "applies the adapter after that, which no merged weight does",
                hint="serve it unmerged with PEFT, or train the module with modules_to_save",
            )

    def need(self, module: str, parameter: str = "weight") -> str:
        """Return the base tensor of a module's parameter; raise InputRefused if there is none."""
        found = self.find(module, parameter)
        if not found:
            raise InputRefused(
                f"{self.path} changes {module}, which the base does not have",
                hint="the adapter was trained on another model: "
                f"{self.config.base_model or '(not named)'!r}; or transformers computes this layer "
                "from other tensors as it loads the model: then train without it, or serve the "
                "adapter unmerged",
            )
        return found


def read_adapter(
    root: Path, config: AdapterConfig, weight: float = 1.0, files: tuple[str, ...] = ()
) -> AdapterView:
    """Return an adapter without its base, from its file's header."""
    header = read_header(root / "adapter_model.safetensors")
    keys = {info.name: info for info in header.tensors}
    return AdapterView(
        path=root, file=header.path, files=files, weight=weight, keys=keys, config=config
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One kind of adapter weights; defined as `FAMILY` in a file of `families/`."""

    name: str
    kinds: frozenset[str]
    """The `peft_type`s that it handles."""
    claim: Callable[[AdapterView], Iterable[Claim]]
    """Yields claims for its keys; raises InputRefused for invalid ones."""
    variants: Mapping[str, str]
    """Rows of the reference page's table of mergeable adapters: name -> how it is merged."""
    every: bool = False
    """True if adapters of all other kinds may also have such keys."""
