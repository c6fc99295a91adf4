"""Asks several models in one walk over their weights; loads those that cannot be streamed."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.time_limits import doing
from weightsmith.forward.libraries import ModelFails
from weightsmith.forward.lockstep import Lockstep
from weightsmith.forward.products import on_gpu
from weightsmith.models.safetensors import open_checkpoint

if TYPE_CHECKING:
    from weightsmith.forward.kinds import Model

T = TypeVar("T")
Progress = Callable[[int, int], None]
Tell = Callable[[ModelFails], None]


class DoesNotRun(InputRefused):
    """A model cannot run, also with its weights in memory: its files do not belong together."""


class Count:
    """Counts what is done, from several threads."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress, self._done = total, progress, 0
        self._lock = threading.Lock()

    def __call__(self, more: int) -> None:
        """Count so many more, and report them."""
        with self._lock:
            self._done += more
            if self._progress is not None:
                self._progress(min(self._done, self._total), self._total)


class Opening(Protocol):
    """A model that has not been built yet."""

    @property
    def checkpoint(self) -> Path:
        """The folder with its weights."""

    @property
    def source(self) -> Hashable:
        """What its matrices are read from; models with equal sources share each read."""

    def streamed(self, lockstep: Lockstep, number: int) -> Model:
        """Return it with its weights in files; `number` is that of its source."""

    def whole(self) -> Model:
        """Return it with its weights in memory."""


def walk(
    openings: Mapping[str, Opening],
    ask: Mapping[str, Callable[[Model, Lockstep], T]],
    tell: Tell = lambda _: None,
    *,
    alike: bool = False,
) -> dict[str, T]:
    """Return what each model's function returns, all in one walk over the weights.

    A model that cannot be streamed is loaded afterwards and asked by itself; `tell` gets the
    reason. If the models are `alike`, of one architecture, all of them are loaded then. Raises
    EnvironmentFailure if one does not fit into memory, DoesNotRun if it cannot run there either or
    fails for another reason than missing weights.
    """
    lockstep, unfit = Lockstep(products=on_gpu(), tiles=True), dict[str, ModelFails]()
    views, numbers = dict[str, Any](), dict[Hashable, int]()

    def note(name: str, error: ModelFails) -> None:
        if not error.without_weights:  # loading it would not help
            raise _does_not_run(openings[name], error) from error
        unfit[name] = error

    with doing("building the models without their weights"):
        for name, opening in openings.items():
            number = numbers.setdefault(opening.source, len(numbers))
            try:
                views[name] = opening.streamed(lockstep, number)
            except ModelFails as error:
                note(name, error)

    def attempt(name: str) -> T | None:
        try:
            return ask[name](views[name], lockstep)
        except ModelFails as error:
            note(name, error)
            return None

    found: dict[str, Any] = {}
    if not (alike and unfit):
        found = lockstep.run({name: partial(attempt, name) for name in views})
    views.clear()
    if unfit:
        first = next(unfit[name] for name in openings if name in unfit)
        tell(first)
        for name in openings if alike else unfit:
            _require_memory(openings[name].checkpoint, first)
            try:
                found[name] = ask[name](openings[name].whole(), Lockstep())
            except ModelFails as error:
                raise _does_not_run(openings[name], error) from error
    return found


def _does_not_run(opening: Opening, error: ModelFails) -> DoesNotRun:
    # Others in the walk have other adapters.
    adapters = [str(root) for root, _ in getattr(opening, "adapters", ())]
    named = f"{opening.checkpoint}" + (f" with {' and '.join(adapters)}" if adapters else "")
    return DoesNotRun(
        f"the model in {named} does not run in transformers: {error}",
        hint="compare config.json with the published one, and check that the adapters were "
        "trained on this model",
    )


def _require_memory(checkpoint: Path, error: ModelFails) -> None:
    infos = open_checkpoint(checkpoint).tensors.values()
    needed = 4 * sum(math.prod(info.shape) for info in infos)
    try:
        meminfo = Path("/proc/meminfo").read_text("utf-8")
    except OSError:
        return
    available = next(
        int(row.split()[1]) for row in meminfo.splitlines() if row.startswith("MemAvail")
    )
    if needed > available << 10:
        raise EnvironmentFailure(
            f"{checkpoint} cannot be streamed ({error}), and to load it whole needs "
            f"{needed >> 30} GiB of memory, of which {available >> 20} GiB are available",
            hint="use a machine with more memory, or leave the check out (`validate: {enabled: "
            "false}`, `quality: {gate: false}`, no `evaluate`)",
        )
