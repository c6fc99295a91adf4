"""A model with experts and its adapter become FP8 and NVFP4 images: merged, rounded and judged.

Merging, validation, rounding and the quality gate are the real jobs; no GPU is at hand to start
these images, so the loss is what the dequantized weights lose in transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from weightsmith.checkpoints.tensors import CheckpointTensors
from weightsmith.errors import InputRefused
from weightsmith.oci.registry import Registry
from weightsmith.quantizers.packed import view_of
from weightsmith.trees import remove
from weightsmith.worker.jobs import STAGES

from tests.fakes.baking import push_base
from tests.fakes.memory import Memory, in_memory
from tests.fakes.sparse import make_sparse

TARGETS = ["vllm-fp8", "vllm-nvfp4a16"]

pytestmark = pytest.mark.slow


def train(base: Path, folder: Path) -> None:
    """Write an adapter of attention, stacked experts and no router, with weights at random."""
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    tuned = get_peft_model(network, config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    tuned.save_pretrained(folder)


@pytest.fixture
def memory(tmp_path: Path, client: Registry, quick: None) -> Iterator[Memory]:
    with in_memory(tmp_path, client) as made:
        for name in ("base", "a"):
            remove(made.home / name)
        make_sparse(made.home / "base", "Qwen3MoeForCausalLM")
        train(made.home / "base", made.home / "a")
        base, labels = f"{made.registry.host}/engines/vllm:1", {"dev.weightsmith.engine": "vllm"}
        push_base(made.client, base, labels, {"usr/bin/vllm": b"#!/usr/bin/python3"}, "linux/amd64")
        made.write_recipe(
            targets=TARGETS,
            image={"repository": made.repository, "base": base},
            serve={"max_model_len": 256, "max_num_seqs": 2, "gpu": "nvidia-h100-80gb"},
        )
        fakes = made.bench.stages

        def proof(job: Any, report: Any) -> dict[str, Any]:
            validation = STAGES["validate"](job.validation, report)
            return {**fakes["proof"](job, report), "validation": validation}

        real = {name: STAGES[name] for name in ("merge", "validate", "quantize", "quality")}
        made.runner.stages = {**fakes, **real, "proof": proof}
        yield made


def test_both_formats_are_made_and_pass(memory: Memory) -> None:
    built = memory.build()

    assert sorted(built) == TARGETS
    base = CheckpointTensors(memory.home / "base")
    merged = next(e.tree.root for e in memory.store.entries.values() if _kind(e.tree.root) == "")
    own = CheckpointTensors(merged)
    for target, kind in zip(TARGETS, ("float-quantized", "nvfp4-pack-quantized"), strict=True):
        folder = next(
            e.tree.root for e in memory.store.entries.values() if _kind(e.tree.root) == kind
        )
        view = view_of(folder, merged)
        record = memory.record(target)
        assert record["quality"]["exceeded"] == []
        assert record["quality"]["kl_mean"] > 0
        for name in sorted(own.names):
            if ".experts.0." in name:  # what the adapter changed is still there
                change = own.f32(name) - base.f32(name)
                assert np.linalg.norm(change) > 0
                kept = np.vdot(view.tensor(name) - base.f32(name), change) / np.vdot(change, change)
                assert kept == pytest.approx(1, abs=0.1), name
            if ".gate.weight" in name:
                assert np.array_equal(view.tensors.raw(name), own.raw(name))


def _kind(folder: Path) -> str | None:
    """Return the layout of a checkpoint; "" for 16 bits, None for another folder."""
    file = folder / "config.json"
    if not file.is_file() or not any(folder.glob("*.safetensors")):
        return None
    return str((json.loads(file.read_text()).get("quantization_config") or {}).get("format", ""))


def test_what_a_gpu_cannot_load_is_refused_before_the_merge(memory: Memory) -> None:
    with pytest.raises(InputRefused, match=r"mxfp4a16 weights: vllm .* needs compute capability 8"):
        memory.build("serve.gpu=nvidia-t4", targets=["vllm-mxfp4a16"])
    assert memory.jobs() == []
