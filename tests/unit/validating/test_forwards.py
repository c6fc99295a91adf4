"""Streamed forwards against transformers and PEFT with everything in memory."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from weightsmith.forward.lockstep import Lockstep
from weightsmith.forward.network import skeleton
from weightsmith.forward.weights import Weights
from weightsmith.models.safetensors import build_header
from weightsmith.validating.forwards import (
    BaseAndAdapters,
    MergedModel,
    ProbeBatch,
    merged_forward,
    reference_forward,
)

from tests.unit.validating.conftest import held, make_adapter, make_model, merged, tell

PROBES = [[1, 7, 9, 200, 31], [1, 50, 60], [1, 300, 301, 302, 303, 304, 305, 306]]


def whole_logits(root: Path, adapters: tuple[tuple[Path, float], ...] = ()) -> torch.Tensor:
    """Return the logits of each probe run alone, one below the other."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(root, dtype=torch.float32)
    for adapter, _ in adapters:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits[0] for ids in PROBES])


@pytest.mark.grid(6)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "gemma3", "qwen3_moe"])
def test_streamed_is_whole(tmp_path: Path, kind: str) -> None:
    base = make_model(tmp_path / "base", kind)
    targets = ["c_attn", "c_proj"] if kind == "gpt2" else ["q_proj", "o_proj"]
    lora = make_adapter(tmp_path / "lora", base, target_modules=targets)
    batch = ProbeBatch.of(PROBES)

    lockstep = Lockstep(2)
    model = MergedModel(checkpoint=base).streamed(lockstep, 0)
    run = merged_forward(model, batch, 1, lambda: None)
    opening = BaseAndAdapters(checkpoint=base, adapters=((lora, 1.0),))
    reference = reference_forward(
        opening.streamed(lockstep, 1),
        lockstep,
        Weights(base, skeleton(base)),
        batch,
        2,
        advance=lambda: None,
    )

    assert torch.allclose(run.logits, whole_logits(base), atol=1e-4, rtol=1e-4)
    wanted = whole_logits(base, ((lora, 1.0),))
    assert torch.allclose(reference.run.logits, wanted, atol=1e-4, rtol=1e-4)
    assert len(run.hidden) == len(reference.run.hidden) == len(reference.twins.hidden) == 3
    matrices = [p for p in model.parameters() if p.dim() > 1]
    assert all(p.untyped_storage().nbytes() == 4 for p in matrices), "one stayed in memory"


def test_what_no_result_depends_on_is_not_multiplied(
    plain: tuple[Path, Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the merged model's padding, nor twins where they get other outputs anyway."""
    base, lora, out = plain
    rows, multiply = defaultdict[int, set[int]](set), Lockstep.multiply

    def counted(self: Lockstep, key: Any, inputs: torch.Tensor, matrix: Any) -> torch.Tensor:
        rows[key[1]].add(inputs.shape[:-1].numel())
        return multiply(self, key, inputs, matrix)

    monkeypatch.setattr(Lockstep, "multiply", counted)
    lockstep, batch = Lockstep(2), ProbeBatch.of(PROBES, 2)
    merged_forward(MergedModel(checkpoint=out).streamed(lockstep, 0), batch, 1, lambda: None)
    opening = BaseAndAdapters(checkpoint=base, adapters=((lora, 1.0),)).streamed(lockstep, 1)
    weights = Weights(out, skeleton(out))
    reference_forward(opening, lockstep, weights, batch, 2, advance=lambda: None)

    tokens, logits = sum(map(len, PROBES)), 2 * len(PROBES)
    assert rows[0] == {tokens, logits}
    assert rows[1] == {3 * 8, 2 * 5}


@pytest.mark.slow
def test_an_architecture_that_cannot_be_streamed_is_loaded_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    def reaching(self: Any, x: torch.Tensor) -> torch.Tensor:
        up = self.act_fn(self.gate_proj(x)) * torch.nn.functional.linear(x, self.up_proj.weight)
        return self.down_proj(up)

    base = make_model(tmp_path / "base")
    lora = make_adapter(tmp_path / "lora", base, target_modules=["q_proj"])
    out = merged(tmp_path / "out", base, lora)
    monkeypatch.setattr(LlamaMLP, "forward", reaching)

    result = held(base, out, lora)

    assert result.passed, tell(result)
    assert not result.comparison.streamed
    assert "loaded whole" in tell(result)


HELD = """
import resource, sys
from pathlib import Path
from types import SimpleNamespace
from weightsmith.models.safetensors import open_checkpoint
from weightsmith.forward.weights import Weights

root = Path(sys.argv[1])
index = open_checkpoint(root)
weights = Weights.__new__(Weights)
weights.infos = index.tensors
weights._files = {i.name: shard.path for shard in index.shards for i in shard.tensors}
weights._computed = {}
weights.read("small")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rows = sum(len(block) for _, block in weights.blocks("large"))
assert rows == 65536, rows
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.slow
def test_a_large_tensor_is_never_held(tmp_path: Path) -> None:
    """Pages of a mapped file count as memory of the process that reads them."""
    header = build_header([("large", "BF16", (65536, 4096)), ("small", "BF16", (8, 8))], {})
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * 65536 * 4096 + 2 * 64)

    told = subprocess.run(
        [sys.executable, "-c", HELD, tmp_path], capture_output=True, text=True, check=True
    )

    assert int(told.stdout) < 128  # of 512 MiB
