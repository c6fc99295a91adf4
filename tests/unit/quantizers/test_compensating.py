"""Four-bit integers: grids, layouts, rounding that makes up for its errors, AWQ searches."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from weightsmith.quantizers.autoawq import best_clip, patch_searches
from weightsmith.quantizers.layerwise.quantizing import (
    best_grid,
    compensated,
    packed_awq,
    packed_gptq,
)
from weightsmith.quantizers.packed import PackedView

GROUP = 32


def drawn(seed, outputs=48, inputs=96):
    """A weight, and inputs that depend on each other and differ in power."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=draw) * 0.05
    mixed = torch.randn(200, 24, generator=draw) @ torch.randn(24, inputs, generator=draw)
    power = torch.rand(inputs, generator=draw) ** 3 * 4 + 0.1
    return weight, (mixed + torch.randn(200, inputs, generator=draw)) * power


def one_by_one(weight, gram, grid):
    """GPTQ as section 3 of arXiv 2210.17323 derives it: after each input, the inverse anew."""
    inputs = weight.shape[1]
    size = inputs // grid.scale.shape[1]
    scale, zero = grid.scale.double().numpy(), grid.zero.double().numpy()
    hessian = gram + 0.05 * gram.diagonal().mean() * np.eye(inputs)
    left, made = weight.copy(), np.empty_like(weight)
    order = np.argsort(-gram.diagonal(), kind="stable").tolist()
    while order:
        at, group = order[0], order[0] // size
        inverse = np.linalg.inv(hessian[np.ix_(order, order)])
        codes = np.rint(left[:, at] / scale[:, group]) + zero[:, group]
        made[:, at] = (np.clip(codes, 0, 15) - zero[:, group]) * scale[:, group]
        error = (left[:, at] - made[:, at]) / inverse[0, 0]
        left[:, order] -= error[:, None] * inverse[0]
        order.pop(0)
    return made


@pytest.mark.parametrize("symmetric", [False, True])
def test_errors_are_spread_as_the_paper_says(symmetric):
    weight, inputs = drawn(1)
    gram = inputs.T @ inputs
    grid = best_grid(weight, gram, GROUP, symmetric=symmetric)

    made = compensated(weight, gram, grid)

    right = one_by_one(weight.double().numpy(), gram.double().numpy(), grid)
    # A value that lies between two codes may go either way.
    assert (np.abs(made.numpy() - right) > 1e-4).mean() < 0.01
    by_itself = float((inputs @ (grid.rounded(weight) - weight).T).norm())
    assert float((inputs @ (made - weight).T).norm()) < 0.7 * by_itself


@pytest.mark.parametrize(("method", "pack"), [("awq", packed_awq), ("gptq", packed_gptq)])
def test_what_is_packed_is_read_back(tmp_path, method, pack):
    weight, inputs = drawn(2)
    grid = best_grid(weight, inputs.T @ inputs, GROUP, symmetric=method == "gptq")
    values = grid.rounded(weight)
    tensors = {f"model.layers.0.mlp.up_proj.{n}": t for n, t in pack(grid, values).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"quant_method": method, "bits": 4, "group_size": GROUP, "sym": method == "gptq"}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))

    view = PackedView(tmp_path)

    assert np.array_equal(view.matrix("model.layers.0.mlp.up_proj"), values.numpy())


def test_scales_are_numbers_of_both_16_bit_floats():
    weight, _ = drawn(3)
    weight[0] = 0
    weight[1] = 1e-9
    for symmetric in (False, True):
        scale = best_grid(weight, None, GROUP, symmetric=symmetric).scale
        assert torch.equal(scale, scale.half().float())
        assert torch.equal(scale, scale.bfloat16().float())
        assert bool((scale > 0).all())


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_chosen_range_is_the_best_of_those_tried(symmetric):
    weight, inputs = drawn(4)
    weight = weight**3 * 100  # a few large ones, that clipping helps
    whole = best_grid(weight, None, GROUP, symmetric=symmetric)
    best = best_grid(weight, inputs.T @ inputs, GROUP, symmetric=symmetric)

    def errors(grid):
        moved = (grid.rounded(weight) - weight).double().numpy().reshape(len(weight), -1, GROUP)
        x = inputs.double().numpy().reshape(len(inputs), -1, GROUP)
        return (np.einsum("tgi,ogi->tog", x, moved) ** 2).sum(0)

    assert (errors(best) <= errors(whole) * (1 + 1e-4)).all()
    assert (errors(best) < errors(whole)).mean() > 0.2


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
