"""Four-bit integers: their grids, their two layouts, and rounding that makes up for its errors."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
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
