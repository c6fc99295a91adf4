"""Models with experts and trained adapters become FP8, NVFP4 and AWQ images, and still answer.

Every job is the real one: merge, validation, rounding, calibration, the gate and the questions. The
images are for a GPU, or for a CPU with AMX, and neither is here, whatever this machine has: their
weights answer in transformers, and the record says so. test_experts_on_amx.py starts one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from weightsmith.building.wiring import cache_folder
from weightsmith.core.errors import InputRefused
from weightsmith.core.trees import remove
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers.packed import view_of
from weightsmith.worker.jobs import STAGES

from tests.fakes.baking import push_base
from tests.fakes.decoders import make_sparse
from tests.fakes.experts import KINDS, trained
from tests.fakes.memory import Memory, in_memory

TARGETS = {
    "vllm-awq": "awq", "vllm-fp8": "float-quantized", "vllm-nvfp4a16": "nvfp4-pack-quantized",
}  # fmt: skip
QUESTIONS = 60

pytestmark = [
    pytest.mark.slow,
    # PEFT (0.21) looks for the ranks of stacked experts among modules alone, and warns in vain.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning"),
]


@pytest.fixture(params=["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def drawn(request: pytest.FixtureRequest, tmp_path: Path, quick: None) -> Iterator[Memory]:
    """Random weights, where headers alone decide."""
    with in_memory(tmp_path) as made:
        remove(made.home / "base")
        make_sparse(made.home / "base", request.param, hidden=256)
        settings = made.home / "a" / "adapter_config.json"  # of an adapter of one layer
        known = json.loads(settings.read_text())
        settings.write_text(json.dumps({**known, "layers_to_transform": [0]}))
        made.use_vllm()
        yield made


@pytest.fixture(params=sorted(KINDS))
def memory(request: pytest.FixtureRequest, tmp_path: Path, quick: None) -> Iterator[Memory]:
    model = trained(request.param, cache_folder() / "trained")
    with in_memory(tmp_path) as made:
        for name in ("base", "a"):
            remove(made.home / name)
        shutil.copytree(model / "base", made.home / "base")
        shutil.copytree(model / "adapter", made.home / "a")
        for name in ("eval.jsonl", "calibration.jsonl"):
            shutil.copy(model / name, made.home)
        base, labels = f"{made.registry.host}/engines/vllm:1", {"dev.weightsmith.engine": "vllm"}
        push_base(made.client, base, labels, {"usr/bin/vllm": b"#!/usr/bin/python3"}, "linux/amd64")
        made.write_recipe(
            targets=list(TARGETS),
            image={"repository": made.repository, "base": base},
            calibration={"data": "calibration.jsonl"},
            evaluate={"data": "eval.jsonl", "metric": "contains", "max_drop": 0.05,
                      "max_tokens": 32},
            serve={"max_model_len": 256, "max_num_seqs": 2, "gpu": "nvidia-h100-80gb"},
        )  # fmt: skip
        made.runner.stages = STAGES
        yield made


@pytest.mark.full  # tests/unit/quantizers has each format with experts
def test_what_the_adapter_taught_survives_every_format(memory: Memory) -> None:
    built = memory.build()

    assert sorted(built) == list(TARGETS)
    for target in TARGETS:
        record = memory.record(target)
        right = {who: score["score"] * score["n"] for who, score in record["scores"].items()}
        assert right.pop("base") <= 1, target
        assert right == dict.fromkeys(("adapter", "merged", "dequantized"), QUESTIONS), target
        assert record["quality"]["exceeded"] == []
        assert record["quality"]["kl_mean"] > 0
        assert record["image"]["started"] == ""
        said = (
            "the image was not asked, since it is for a GPU and none is here;"
            " its dequantized weights were, in transformers"
        )
        assert said in record["unproven"]
        report = (memory.results(target) / "report.md").read_text()
        assert f"dequantized weights, in transformers | {QUESTIONS} of {QUESTIONS}" in report
    _check_experts(memory)


@pytest.mark.full  # test_dequantized_in_memory.py says so of a fake
@pytest.mark.parametrize("memory", ["qwen3_moe"], indirect=True)
def test_an_image_for_a_cpu_with_amx_is_not_started_without_it(memory: Memory) -> None:
    built = memory.build("serve.gpu=cpu-amx", targets=["vllm-w8a8", "vllm-fp8-block"])

    for target in built:
        record = memory.record(target)
        assert record["plan"]["device"] == "cpu-amx"
        assert record["scores"]["dequantized"]["score"] == 1
        said = (
            "the image was not asked, since it is for a CPU with AMX and this machine has none;"
            " its dequantized weights were, in transformers"
        )
        assert said in record["unproven"]
        assert said[1:] in (memory.results(target) / "report.md").read_text()


def test_experts_that_vllm_has_no_kernel_for_on_a_cpu_are_refused(drawn: Memory) -> None:
    for device, target in (("cpu", "vllm-w8a8"), ("cpu-amx", "vllm-fp8")):
        with pytest.raises(InputRefused, match=r"experts: vllm .* has no kernel for them on a CPU"):
            drawn.build(f"serve.gpu={device}", targets=[target])
    assert drawn.jobs() == []


def test_what_a_gpu_cannot_load_is_refused_before_the_merge(drawn: Memory) -> None:
    with pytest.raises(InputRefused, match=r"mxfp4a16 weights: vllm .* needs compute capability 8"):
        drawn.build("serve.gpu=nvidia-t4", targets=["vllm-mxfp4a16"])
    assert drawn.jobs() == []


def _check_experts(memory: Memory) -> None:
    """What the adapter changed in each expert is still there, where only values were rounded."""
    base = CheckpointTensors(memory.home / "base")
    folders = {_kind(entry.tree.root): entry.tree.root for entry in memory.store.entries.values()}
    merged = folders[""]
    own = CheckpointTensors(merged)
    experts = [name for name in sorted(own.names) if ".experts." in name]
    assert experts
    for kind in set(TARGETS.values()) - {"awq"}:  # AWQ moves factors from one matrix to another
        view = view_of(folders[kind], merged)
        for name in experts:
            change = own.f32(name) - base.f32(name)
            assert np.linalg.norm(change) > 0, name
            kept = np.vdot(view.tensor(name) - base.f32(name), change) / np.vdot(change, change)
            assert kept == pytest.approx(1, abs=0.1), name


def _kind(folder: Path) -> str | None:
    """Return the layout of a checkpoint; "" for 16 bits, None for another folder."""
    file = folder / "config.json"
    if not file.is_file() or not any(folder.glob("*.safetensors")):
        return None
    config = json.loads(file.read_text()).get("quantization_config") or {}
    return str(config.get("format") or config.get("quant_method", ""))
