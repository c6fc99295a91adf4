"""The error of each decoder layer by itself: a layer gets the checkpoint's own input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from weightsmith.core.errors import Unmeasurable
from weightsmith.forward.lockstep import Meeting
from weightsmith.forward.network import decoder_of

PROBE_ROWS = 1
"""First sequences on which each layer's own error is measured."""


def decoder_layers(model: Any) -> list[Any]:
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

    def record(self, model: Any) -> None:
        """Record inputs and outputs of the checkpoint's layers."""
        for number, layer in enumerate(decoder_layers(model)):
            _hook(layer, self._record_input(number), self._record_output(number))

    def compare(self, model: Any, meeting: Meeting) -> None:
        """Judge the quantized model's layers, each when the checkpoint has run it."""
        for number, layer in enumerate(decoder_layers(model)):
            _hook(layer, self._replace(number, meeting), self._judge(number, meeting))

    def _record_input(self, number: int) -> Callable[[torch.Tensor], torch.Tensor]:
        def record(states: torch.Tensor) -> torch.Tensor:
            self.inputs[number] = states[:PROBE_ROWS].clone()
            return states

        return record

    def _record_output(self, number: int) -> Callable[[torch.Tensor], None]:
        def record(states: torch.Tensor) -> None:
            self.outputs[number] = states[:PROBE_ROWS].clone()
            self.advance()

        return record

    def _replace(self, number: int, meeting: Meeting) -> Callable[[torch.Tensor], torch.Tensor]:
        def replace(states: torch.Tensor) -> torch.Tensor:
            meeting.wait_until(lambda: number in self.inputs)
            return torch.cat([states[:-PROBE_ROWS], self.inputs[number]])

        return replace

    def _judge(self, number: int, meeting: Meeting) -> Callable[[torch.Tensor], None]:
        def judge(states: torch.Tensor) -> None:
            meeting.wait_until(lambda: number in self.outputs)
            before, right = self.inputs.pop(number), self.outputs.pop(number)
            before, right = before[:, : self.length], right[:, : self.length]
            change = float((right - before).norm()) or 1.0
            found = states[-PROBE_ROWS:, : self.length]
            self.found[number] = float((found - right).norm()) / change
            self.advance()

        return judge


def _hook(
    layer: Any,
    started: Callable[[torch.Tensor], torch.Tensor],
    ended: Callable[[torch.Tensor], None],
) -> None:
    def before(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if args:
            return (started(args[0]), *args[1:]), named
        return args, {**named, "hidden_states": started(named["hidden_states"])}

    def after(_: Any, __: Any, output: Any) -> None:
        ended(output[0] if isinstance(output, tuple) else output)

    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(after)
