"""AWQ's two searches, mended: on a CPU the one ruins weights and the other takes half an hour.

Scales: AutoAWQ keeps a layer's weights with `tensor.cpu()`, which copies from a GPU only, and then
multiplies them in place. On a CPU every matrix stays multiplied by the first scales tried.

Clipping: AutoAWQ, and GPTQModel after it, multiply every sampled input with every weight, once for
each of eleven limits. The squared error of a group's output over all tokens is `d G d`, with d what
its weights moved by and G the inputs' Gram matrix, which is formed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_SAMPLED_TOKENS = 512
_GRID, _STEPS = 20, 10
"""Limits tried: the largest weight of a group times 1 - step / grid. All three are AutoAWQ's."""


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
    search._compute_best_clip = lambda own, weight, inputs: best_clip(  # noqa: SLF001
        own.group_size, own.pseudo_quantize_tensor, weight, inputs
    )


def best_clip(
    size: int, rounded: Callable[[Any], tuple[Any, ...]], weight: Any, inputs: Any
) -> Any:
    """Return the limit of each group's weights with the least squared error of its output.

    weight [out, in] and inputs [..., in] are torch tensors, a group has `size` inputs, and
    `rounded` gives weights on the grid of their groups first. The result is [out, groups, 1]. The
    choice is that of AutoAWQ 0.2.9 (quantize/quantizer.py, _compute_best_clip) but for the
    rounding of its sums.
    """
    rows = inputs.detach().reshape(-1, inputs.shape[-1])
    rows = rows[:: max(1, rows.shape[0] // _SAMPLED_TOKENS)].to(weight.device, weight.dtype)
    seen = rows.reshape(rows.shape[0], -1, size).transpose(0, 1)
    gram = seen.transpose(1, 2) @ seen  # [groups, size, size]
    own = weight.detach().reshape(weight.shape[0], -1, size).transpose(0, 1).contiguous()
    largest = own.abs().amax(-1, keepdim=True)  # [groups, out, 1]
    best, least = largest.clone(), None
    for step in range(_STEPS):
        limit = largest * (1 - step / _GRID)
        moved = rounded(own.clamp(-limit, limit))[0] - own
        error = (moved @ gram).mul_(moved).sum(-1, keepdim=True)
        if least is None:
            least = error
            continue
        better = error < least
        best[better], least[better] = limit[better], error[better]
    return best.transpose(0, 1)
