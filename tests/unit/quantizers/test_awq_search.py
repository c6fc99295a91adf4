"""AWQ's searches: clipping held against outputs computed one by one, weights left as they were."""

import numpy as np
import pytest
import torch
from weightsmith.quantizers.autoawq import best_clip, patch_searches


class Four:
    """Rounds to 16 levels between a group's least and largest weight."""

    def __init__(self, group_size):
        self.group_size = group_size

    def pseudo_quantize_tensor(self, w):
        rows = w.reshape(-1, self.group_size)
        low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
        scale = (high - low).clamp(min=1e-5) / 15
        zero = (-torch.round(low / scale)).clamp(0, 15)
        rounded = (torch.clamp(torch.round(rows / scale) + zero, 0, 15) - zero) * scale
        return rounded.reshape(w.shape), scale, zero


def errors(weight, inputs, group_size, limit):
    """Mean squared error of each group's part of each output, in float64: [out, groups]."""
    out, width = weight.shape
    w = weight.reshape(out, -1, group_size)
    clipped = w.clamp(-limit, limit).reshape(out, width)
    q = Four(group_size).pseudo_quantize_tensor(clipped)[0].reshape(w.shape)
    x = inputs.reshape(-1, width // group_size, group_size)
    moved = np.einsum("tgi,ogi->tog", x.double().numpy(), (q - w).double().numpy())
    return (moved**2).mean(0)


@pytest.mark.parametrize("group_size", [32, 64])
def test_the_chosen_limit_is_the_best_of_those_tried(group_size):
    draw = torch.Generator().manual_seed(5)
    weight = torch.randn(48, 128, generator=draw) ** 3  # a few large ones, that clipping helps
    inputs = torch.randn(3, 40, 128, generator=draw)
    found = best_clip(group_size, Four(group_size).pseudo_quantize_tensor, weight, inputs)

    largest = weight.reshape(48, -1, group_size).abs().amax(-1, keepdim=True)
    tried = [errors(weight, inputs, group_size, largest * (1 - step / 20)) for step in range(10)]
    chosen = errors(weight, inputs, group_size, found)
    assert found.shape == (48, 128 // group_size, 1)
    assert (chosen <= np.min(tried, 0) * (1 + 1e-4)).all()
    assert 0.2 < (found < largest).float().mean() < 1


def test_inputs_are_sampled_evenly_where_there_are_many():
    draw = torch.Generator().manual_seed(6)
    weight, inputs = torch.randn(8, 64, generator=draw), torch.randn(2048, 64, generator=draw)

    rounded = Four(32).pseudo_quantize_tensor
    assert torch.equal(
        best_clip(32, rounded, weight, inputs), best_clip(32, rounded, weight, inputs[::4].clone())
    )


def test_searching_scales_leaves_the_weights_as_they_were():
    class Search:
        """Tries scales as AutoAWQ does: it keeps what `cpu()` gives, and multiplies in place."""

        @torch.no_grad()
        def _compute_best_scale(self, x, w_mean, x_mean, module, linears):
            kept = {name: value.cpu() for name, value in module.state_dict().items()}
            for ratio in (3, 5):
                linears[0].weight.mul_(ratio)
                linears[0].weight.data = linears[0].weight.data / ratio + 1
                module.load_state_dict(kept)
            return x

    layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    before = layer[0].weight.detach().clone()
    patch_searches(Search)

    assert Search()._compute_best_scale(7, None, None, layer, [layer[0]]) == 7
    assert torch.equal(layer[0].weight, before)
    assert "state_dict" not in vars(layer)
