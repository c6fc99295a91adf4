"""Patches for AWQ's two searches: on a CPU one corrupts weights and the other takes half an hour.

Scales: AutoAWQ saves a layer's weights by `tensor.cpu()`, which only copies from a GPU, and then
multiplies them in place. On a CPU every matrix stays multiplied by the first candidate scales.

Clipping: AutoAWQ and GPTQModel multiply every sampled input by every weight for each of eleven
limits. Here the squared error of a group's output over all tokens is computed as `d G d`, with d
the change of its weights and G the inputs' Gram matrix, which is computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_SAMPLED_TOKENS = 512
_GRID, _STEPS = 20, 10
"""Candidate limits: a group's largest weight times 1 - step / grid. All are AutoAWQ's values."""


def patch_searches(search: Any) -> None:
    """Patch both searches of AutoAWQ 0.2.9's class AwqQuantizer (quantize/quantizer.py)."""
    upstream = search._compute_best_scale  # noqa: SLF001 - there is no public hook

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
    """Return each group's clipping limit with the smallest squared error of its output.

    weight [out, in] and inputs [..., in] are torch tensors, a group has `size` inputs, and
    `rounded` returns the quantized weights as its first value. The result is [out, groups, 1], as
    in AutoAWQ 0.2.9 (quantize/quantizer.py, _compute_best_clip) except for the rounding of sums.
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
