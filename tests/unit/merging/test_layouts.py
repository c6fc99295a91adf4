"""Where factors go when checkpoints and adapters name or stack things differently."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from weightsmith.core.errors import InputRefused

from tests.unit.merging.tensors import close, delta, lora, random, run


@pytest.mark.parametrize("module", ["conv", "attention.conv"])
@pytest.mark.parametrize("kernel", [(3,), (1, 1), (3, 2), (2, 2, 3)])
def test_convolutions(kernel: tuple[int, ...], module: str, tmp_path: Path) -> None:
    """The delta is what PEFT's layer of that kind computes."""
    from peft import LoraConfig, get_peft_model

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            kind = getattr(torch.nn, f"Conv{len(kernel)}d")
            self.conv = kind(4, 6, kernel)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=2, lora_alpha=3, target_modules=["conv"])
        layer = get_peft_model(Net(), config).base_model.model.conv
    a, b = random(2, 4, *kernel), random(6, 2, *(1 for _ in kernel))
    layer.lora_A.default.weight.data, layer.lora_B.default.weight.data = a, b
    weight = random(6, 4, *kernel)

    found = run(
        tmp_path, {f"{module}.weight": weight}, lora(module, a, b), {"target_modules": ["conv"]}
    )

    wanted = layer.get_delta_weight("default").detach().double()
    torch.testing.assert_close(
        found[f"{module}.weight"].double(), weight.double() + wanted, rtol=1e-5, atol=1e-6
    )


def test_multihead_attention(tmp_path: Path) -> None:
    base = {
        "attn.in_proj_weight": random(24, 8),
        "attn.in_proj_bias": random(24),
        "attn.out_proj.weight": random(8, 8),
    }
    a, b, c, d = random(2, 8), random(24, 2), random(2, 8) * 2, random(8, 2)

    adapter = lora("attn", a, b) | lora("attn.base_layer.out_proj", c, d)
    found = run(tmp_path, base, adapter, {"target_modules": ["attn"]})

    close(found["attn.in_proj_weight"], base["attn.in_proj_weight"].double() + delta(a, b))
    close(found["attn.out_proj.weight"], base["attn.out_proj.weight"].double() + delta(c, d))
    assert torch.equal(found["attn.in_proj_bias"], base["attn.in_proj_bias"])


EXPERTS = "model.layers.0.mlp.experts"


def stacked_factors() -> dict[str, torch.Tensor]:
    """Factors of three experts of width 4, intermediate 5, rank 2, as PEFT stacks them."""
    up = lora(f"{EXPERTS}.base_layer", random(6, 4), random(10, 6))
    return up | lora(EXPERTS, random(6, 5), random(4, 6))


STACKED = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def expert_deltas(up: bool) -> list[torch.Tensor]:
    """Each expert's delta, (out, in), by the words of PEFT's get_delta_weight."""
    inner = "base_layer." if up else ""
    factors = stacked_factors()
    a = factors[f"{EXPERTS}.{inner}lora_A.weight"].double().reshape(3, 2, -1)
    b = factors[f"{EXPERTS}.{inner}lora_B.weight"].double()
    b = b.reshape(len(b), 2, 3)
    return list(torch.einsum("ore,eri->eoi", b, a) * 1.5)


def test_stacked_experts(tmp_path: Path) -> None:
    base = {f"{EXPERTS}.gate_up_proj": random(3, 10, 4), f"{EXPERTS}.down_proj": random(3, 4, 5)}

    found = run(tmp_path, base, stacked_factors(), STACKED)

    for name, up in (("gate_up_proj", True), ("down_proj", False)):
        key = f"{EXPERTS}.{name}"
        close(found[key], base[key].double() + torch.stack(expert_deltas(up)))


def test_transposed_experts(tmp_path: Path) -> None:
    """gpt-oss stores (experts, in, out), square ones included."""
    a, b = random(6, 4), random(4, 6)
    base = {f"{EXPERTS}.down_proj": random(3, 4, 4)}

    told = {"target_parameters": ["experts.down_proj"]}
    found = run(tmp_path, base, lora(EXPERTS, a, b), told, model_type="gpt_oss")

    wanted = torch.einsum("ore,eri->eio", b.double().reshape(4, 2, 3), a.double().reshape(3, 2, 4))
    key = f"{EXPERTS}.down_proj"
    close(found[key], base[key].double() + 1.5 * wanted)


@pytest.mark.parametrize(
    ("stack", "names"),
    [
        (EXPERTS, ("gate_proj", "up_proj", "down_proj")),
        ("model.layers.0.block_sparse_moe.experts", ("w1", "w3", "w2")),
    ],
)
def test_stacked_factors_on_single_experts(
    stack: str, names: tuple[str, str, str], tmp_path: Path
) -> None:
    gate, up, down = names
    base = {}
    for number in range(3):
        base |= {
            f"{stack}.{number}.{gate}.weight": random(5, 4) + number,
            f"{stack}.{number}.{up}.weight": random(5, 4) - number,
            f"{stack}.{number}.{down}.weight": random(4, 5) + number,
        }

    found = run(tmp_path, base, stacked_factors(), STACKED)

    for number, (fused, last) in enumerate(
        zip(expert_deltas(True), expert_deltas(False), strict=True)
    ):
        for name, wanted in ((gate, fused[:5]), (up, fused[5:]), (down, last)):
            key = f"{stack}.{number}.{name}.weight"
            close(found[key], base[key].double() + wanted)


def test_single_experts_factors_on_a_stack(tmp_path: Path) -> None:
    """Adapters of transformers 4 speak of each expert's layers."""
    base = {f"{EXPERTS}.gate_up_proj": random(3, 10, 4), f"{EXPERTS}.down_proj": random(3, 4, 5)}
    shapes = {"gate_proj": (5, 4), "up_proj": (5, 4), "down_proj": (4, 5)}
    adapter = {}
    for number in range(3):
        for name, (rows, columns) in shapes.items():
            a, b = random(2, columns) + number, random(rows, 2) - number
            adapter |= lora(f"{EXPERTS}.{number}.{name}", a, b)

    found = run(tmp_path, base, adapter, {"target_modules": list(shapes)})

    def of(number: int, name: str) -> torch.Tensor:
        key = f"{EXPERTS}.{number}.{name}"
        return delta(adapter[f"{key}.lora_A.weight"], adapter[f"{key}.lora_B.weight"])

    for number in range(3):
        fused = torch.cat([of(number, "gate_proj"), of(number, "up_proj")])
        key = f"{EXPERTS}.gate_up_proj"
        close(found[key][number], base[key][number].double() + fused)
        key = f"{EXPERTS}.down_proj"
        close(found[key][number], base[key][number].double() + of(number, "down_proj"))


@pytest.mark.parametrize(
    ("width", "config", "said"),
    [(7, {}, "the 2 pairs of factors"), (5, {"r": 6}, "has rank 2 per expert, but 6")],
)
def test_experts_of_another_size_or_rank_are_refused(
    width: int, config: dict[str, int], said: str, tmp_path: Path
) -> None:
    base = {f"{EXPERTS}.gate_up_proj": random(3, 10, 4)}
    base[f"{EXPERTS}.down_proj"] = random(3, 4, width)

    with pytest.raises(InputRefused, match=said):
        run(tmp_path, base, stacked_factors(), STACKED | config)


def test_grouped_convolutions_are_refused(tmp_path: Path) -> None:
    """PEFT cannot merge them; here the shapes give them away."""
    base = {"conv.weight": random(6, 2, 3, 3)}
    adapter = lora("conv", random(2, 4, 3, 3), random(6, 1, 1, 1))

    with pytest.raises(InputRefused, match="rank 2 in lora_A and 1 in lora_B"):
        run(tmp_path, base, adapter, {"target_modules": ["conv"]})


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("vit.encoder.layer.1.attention.attention.query", "vit.layers.1.attention.q_proj"),
        (
            "vision_tower.vision_model.encoder.layers.1.self_attn.q_proj",
            "model.vision_tower.encoder.layers.1.self_attn.q_proj",
        ),
        (
            "model.vision_tower.encoder.layers.1.self_attn.q_proj",
            "model.vision_tower.vision_model.encoder.layers.1.self_attn.q_proj",
        ),
    ],
)
def test_older_names_of_vision_models(tmp_path: Path, old: str, new: str) -> None:
    """A checkpoint keeps the names of transformers 4, adapters have those of their version."""
    a, b, weight = random(2, 8), random(8, 2), random(8, 8)
    for number, name in enumerate((old, new)):
        folder = tmp_path / str(number)
        folder.mkdir()

        told = {"target_modules": [name.rpartition(".")[2]]}
        found = run(folder, {f"{old}.weight": weight}, lora(name, a, b), told)

        close(found[f"{old}.weight"], weight.double() + delta(a, b))
