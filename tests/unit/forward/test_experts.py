"""Stacked experts in a walk: the model's own logits, and no more read than single experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from weightsmith.core.errors import InputRefused
from weightsmith.forward import experts
from weightsmith.forward.lockstep import Lockstep
from weightsmith.forward.views import view
from weightsmith.forward.weights import Weights
from weightsmith.quantizers.architectures import EXPERTS

from tests.fakes.decoders import make_sparse
from tests.unit.forward.answering import logits
from tests.unit.validating.conftest import edit_tensors, make_adapter, make_model

IDS = torch.arange(7, 47).reshape(2, 20)
ON_EXPERTS = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
ALL_AT_ONCE = frozenset({"Llama4ForCausalLM", "Llama4ForConditionalGeneration"})
"""They multiply the inputs with all experts."""


@pytest.fixture
def stacks_read(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The stacks that were read as a whole."""
    found: list[torch.Size] = []
    own = experts.ExpertStack.whole

    def whole(stack: experts.ExpertStack) -> torch.Tensor:
        found.append(stack.shape)
        return own(stack)

    monkeypatch.setattr(experts.ExpertStack, "whole", whole)
    return found


def network_of(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    except ValueError:
        return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


def streamed(folder: Path, *adapters: Path) -> torch.Tensor:
    lockstep = Lockstep(cpus=2)
    network = view(folder, [(adapter, 1.0) for adapter in adapters], lockstep, 0)
    return lockstep.run({"": lambda: logits(network, IDS)})[""]


@pytest.mark.parametrize("architecture", sorted(EXPERTS))
def test_logits_are_those_of_the_model_in_memory(
    tmp_path: Path, stacks_read: list[torch.Size], architecture: str
) -> None:
    folder = make_sparse(tmp_path, architecture)

    found = streamed(folder)

    torch.testing.assert_close(found, logits(network_of(folder), IDS), rtol=1e-4, atol=1e-5)
    assert bool(stacks_read) == (architecture in ALL_AT_ONCE)


def test_vectors_of_three_dimensions_are_no_experts(tmp_path: Path) -> None:
    """RWKV mixes tokens by parameters of shape [1, 1, columns], in sums."""
    from transformers import RwkvConfig, RwkvForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "rescale_every": 0}
    RwkvForCausalLM(RwkvConfig(**sizes)).save_pretrained(tmp_path)

    torch.testing.assert_close(streamed(tmp_path), logits(network_of(tmp_path), IDS))


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "mixtral"])
def test_an_adapter_on_stacked_parameters_adds_to_single_experts(
    tmp_path: Path, stacks_read: list[torch.Size], kind: str
) -> None:
    from peft import PeftModel

    base = make_model(tmp_path / "base", kind)
    adapter = make_adapter(tmp_path / "adapter", base, **ON_EXPERTS)

    found, alone = streamed(base, adapter), streamed(base)

    tuned = PeftModel.from_pretrained(network_of(base), adapter).eval()
    torch.testing.assert_close(found, logits(tuned, IDS), rtol=1e-4, atol=1e-5)
    assert (found - alone).abs().max() > 0.01
    assert not stacks_read


def test_base_and_adapter_share_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(tmp_path / "base", "qwen3_moe")
    adapter = make_adapter(tmp_path / "adapter", base, **ON_EXPERTS)
    lockstep, served = Lockstep(cpus=1), []
    own = lockstep._multiply

    def count(requests: Any) -> None:
        served.append(len(requests))
        own(requests)

    monkeypatch.setattr(lockstep, "_multiply", count)
    views = {n: view(base, a, lockstep, 0) for n, a in (("base", []), ("lora", [(adapter, 1)]))}

    lockstep.run({name: lambda one=one: logits(one, IDS) for name, one in views.items()})

    assert served.count(2) > 0.9 * len(served)


def test_each_matrix_of_an_expert_has_a_key_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view that worked apart may ask for the first one while another asks for the second."""
    base = make_model(tmp_path / "base", "mixtral", intermediate_size=64)
    own, keys = Lockstep.multiply, dict[Any, set[int]]()

    def multiply(lockstep: Lockstep, key: Any, inputs: torch.Tensor, matrix: Any) -> torch.Tensor:
        keys.setdefault(key, set()).add(matrix.data_ptr())
        return own(lockstep, key, inputs, matrix)

    monkeypatch.setattr(Lockstep, "multiply", multiply)

    streamed(base)

    assert {len(matrices) for matrices in keys.values()} == {1}


def test_a_checkpoint_without_an_experts_matrix_is_refused(tmp_path: Path) -> None:
    base = make_model(tmp_path / "base", "mixtral")
    edit_tensors(base, lambda tensors: tensors.pop(next(n for n in tensors if ".experts.3." in n)))

    with pytest.raises(InputRefused, match=r"has no tensor model\.layers\.\d\.mlp\.experts"):
        streamed(base)


def test_experts_without_tokens_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_model(tmp_path / "base", "qwen3_moe", num_experts=64, num_experts_per_tok=1)
    own, read = Weights.mapped, set()

    def mapped(weights: Weights, tensor: str) -> Any:
        read.add(tensor)
        return own(weights, tensor)

    monkeypatch.setattr(Weights, "mapped", mapped)

    streamed(base)

    assert 0 < len({name for name in read if ".experts." in name}) <= 3 * 3 * IDS.numel()
