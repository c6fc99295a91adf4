"""AutoAWQ's two searches, mended: on a CPU the one ruins weights and the other takes half an hour.

Scales: it keeps a layer's weights with `tensor.cpu()`, which copies from a GPU only, and then
multiplies them in place. On a CPU every matrix stays multiplied by the first scales tried.

Clipping: it multiplies every sampled input with every weight, once for each of eleven limits. The
squared error of a group's output over all tokens is `d G d`, with d what its weights moved by and
G the inputs' Gram matrix, which is formed once.
"""

from __future__ import annotations

from typing import Any, Protocol

_SAMPLED_TOKENS = 512
_GRID, _STEPS = 20, 10
"""Limits tried: the largest weight of a group times 1 - step / grid. All three are AutoAWQ's."""


class Rounds(Protocol):
    """The part of AutoAWQ's quantizer that is needed here."""

    group_size: int

    def pseudo_quantize_tensor(self, w: Any) -> tuple[Any, Any, Any]:
        """Return (w rounded to the grid of its groups, scales, zero points)."""


def mend(search: Any) -> None:
    """Give AutoAWQ 0.2.9's class AwqQuantizer (quantize/quantizer.py) both searches."""
    upstream = search._compute_best_scale  # noqa: SLF001 - the one place that it can be put

    def best_scale(quantizer: Any, x: Any, w: Any, seen: Any, module: Any, *more: Any) -> Any:
        own = module.state_dict
        module.state_dict = lambda: {name: value.clone() for name, value in own().items()}
        try:
            return upstream(quantizer, x, w, seen, module, *more)
        finally:
            del module.state_dict

    search._compute_best_scale = best_scale  # noqa: SLF001
    search._compute_best_clip = best_clip  # noqa: SLF001


def best_clip(quantizer: Rounds, weight: Any, inputs: Any) -> Any:
    """Return the limit of each group's weights with the least squared error of its output.

    weight [out, in] and inputs [..., in] are torch tensors; the result is [out, groups, 1]. The
    choice is that of AutoAWQ 0.2.9 (quantize/quantizer.py, _compute_best_clip) but for the
    rounding of its sums.
    """
    size = quantizer.group_size
    rows = inputs.detach().reshape(-1, inputs.shape[-1])
    rows = rows[:: max(1, rows.shape[0] // _SAMPLED_TOKENS)].to(weight.device, weight.dtype)
    seen = rows.reshape(rows.shape[0], -1, size).transpose(0, 1)
    gram = seen.transpose(1, 2) @ seen  # [groups, size, size]
    own = weight.detach().reshape(weight.shape[0], -1, size).transpose(0, 1).contiguous()
    largest = own.abs().amax(-1, keepdim=True)  # [groups, out, 1]
    best, least = largest.clone(), None
    for step in range(_STEPS):
        limit = largest * (1 - step / _GRID)
        moved = quantizer.pseudo_quantize_tensor(own.clamp(-limit, limit))[0] - own
        error = (moved @ gram).mul_(moved).sum(-1, keepdim=True)
        if least is None:
            least = error
            continue
        better = error < least
        best[better], least[better] = limit[better], error[better]
    return best.transpose(0, 1)
