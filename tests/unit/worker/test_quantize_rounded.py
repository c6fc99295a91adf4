"""Formats without calibration of base and adapters: the files of the written merge."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from weightsmith.core.errors import EnvironmentFailure, InputRefused
from weightsmith.core.jobs import (
    CacheScalesJob,
    DequantizedJob,
    DequantizedTask,
    Input,
    QualityJob,
    QuantizeJob,
    Question,
    Virtual,
)
from weightsmith.core.merge_options import Merge
from weightsmith.merging.engine import MergeRequest, merge
from weightsmith.quantizers import formats
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.stages.quantize import QuantizeOptions, job_of
from weightsmith.worker.jobs import STAGES
from weightsmith.worker.virtual import computed

from tests.fakes.decoders import make_dense, make_sparse
from tests.fakes.seeing import make_seeing

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]

MAKE = {
    "LlamaForCausalLM": make_dense,
    "Gemma2ForCausalLM": make_dense,
    "Qwen3MoeForCausalLM": make_sparse,
    "MixtralForCausalLM": make_sparse,
    "Llama4ForConditionalGeneration": make_seeing,
    "Qwen2_5_VLForConditionalGeneration": make_seeing,
}
CASES = [
    ("LlamaForCausalLM", "fp8-block"),
    ("LlamaForCausalLM", "nvfp4a16"),
    ("Gemma2ForCausalLM", "mxfp4a16"),
    ("Qwen3MoeForCausalLM", "nvfp4a16"),
    ("MixtralForCausalLM", "w8a8"),
    ("Llama4ForConditionalGeneration", "nvfp4a16"),
    ("Qwen2_5_VLForConditionalGeneration", "fp8"),
]
"""Plain matrices, changed norms, experts, experts in one tensor of columns, pictures."""
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


@pytest.mark.grid(3)
@pytest.mark.grid(3)
@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_the_files_are_those_of_the_written_merge(
    tmp_path: Path, architecture: str, name: str
) -> None:
    base = make(architecture, tmp_path / "base")
    adapters = ((make_adapter(base, architecture, tmp_path / "adapter"), 1.0),)
    model = tmp_path / "written"
    merge(MergeRequest(base=base, adapters=adapters, out=model))
    written = quantized(model, name, None, tmp_path / "from-files")

    model = tmp_path / "unwritten"
    made = merge(MergeRequest(base=base, adapters=adapters, out=model, headers_only=True))
    again = quantized(model, name, computing(base, adapters, made), tmp_path / "from-base")

    of_base = quantized(base, name, None, tmp_path / "of-base")
    assert again == written
    assert written["model.safetensors"] != of_base["model.safetensors"]


def test_weights_that_are_not_those_of_the_merge_are_refused(tmp_path: Path) -> None:
    """Nor is a largest weight that was recorded wrongly a scale."""
    architecture = "LlamaForCausalLM"
    base, model = make(architecture, tmp_path / "base"), tmp_path / "model"
    adapters = ((make_adapter(base, architecture, tmp_path / "adapter"), 1.0),)
    made = merge(MergeRequest(base=base, adapters=adapters, out=model, headers_only=True))
    others = ((make_adapter(base, architecture, tmp_path / "other", seed=2), 1.0),)

    with pytest.raises(InputRefused, match="not those that were merged"):
        quantized(model, "fp8", computing(base, others, made), tmp_path / "out")
    made["largest"]["model.layers.0.mlp.up_proj.weight"] /= 2
    with pytest.raises(EnvironmentFailure, match=r"largest weight of .*up_proj"):
        quantized(model, "nvfp4a16", computing(base, adapters, made), tmp_path / "scaled")


@pytest.mark.grid(2)
@pytest.mark.parametrize(
    "architecture", ["Qwen3MoeForCausalLM", "Qwen2_5_VLForConditionalGeneration"]
)
def test_gate_answers_and_cache_scales_are_those_of_the_written_merge(
    tmp_path: Path, architecture: str
) -> None:
    base = make(architecture, tmp_path / "base")
    adapters = ((make_adapter(base, architecture, tmp_path / "adapter"), 1.0),)
    texts = tuple(json.loads(line) for line in GENERAL.read_text("utf-8").splitlines()[:2])
    asked = (Question(messages=({"role": "user", "content": "Hi"},)),)
    task = DequantizedTask(questions=asked, max_tokens=4, choose=False)
    found = []
    for headers_only in (False, True):
        model, packed = tmp_path / f"model-{headers_only}", tmp_path / f"packed-{headers_only}"
        made = merge(
            MergeRequest(base=base, adapters=adapters, out=model, headers_only=headers_only)
        )
        virtual = computing(base, adapters, made) if headers_only else None
        quantized(model, "fp8", virtual, packed)
        read: dict[str, Any] = {
            "builder": "merge", "model": Input(path=model), "virtual": virtual,
            "output": tmp_path, "seconds": 0,
        }  # fmt: skip
        weights = {"artifact": Input(path=packed), "quantizer": "rounded"}
        jobs = (
            QualityJob(**read, **weights, texts=texts, tokens=100),
            DequantizedJob(**read, **weights, tasks=(task,)),
            CacheScalesJob(**read, texts=texts),
        )
        for job in jobs:
            with computed(job):
                found.append(STAGES[job.kind](job, lambda *_: None))

    assert found[:3] == found[3:]
    assert found[0]["kl_mean"] > 0


def make(architecture: str, folder: Path) -> Path:
    if MAKE[architecture] is make_dense:
        return make_dense(folder, architecture, hidden=256)
    return MAKE[architecture](folder, architecture)


def make_adapter(base: Path, architecture: str, folder: Path, seed: int = 1) -> Path:
    torch.manual_seed(seed)
    network = getattr(transformers, architecture).from_pretrained(base, dtype=torch.float32)
    stacked = [n for n in EXPERTS if any(k.endswith(n) for k, _ in network.named_parameters())]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(
            network,
            LoraConfig(
                r=4,
                target_modules=r".*language_model.*_proj|model\.layers.*_proj",
                target_parameters=stacked or None,
            ),
        )
        with torch.no_grad():
            for key, parameter in tuned.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.2)
        tuned.save_pretrained(folder, save_embedding_layers=False)
    return folder


def computing(base: Path, adapters: tuple[tuple[Path, float], ...], made: dict) -> Virtual:
    return Virtual(
        base=Input(path=base),
        adapters=tuple(Input(path=path) for path, _ in adapters),
        weights=tuple(weight for _, weight in adapters),
        options=Merge(),
        digests={shard["file"]: shard["sha256"] for shard in made["shards"]},
        largest=made["largest"],
    )


def quantized(model: Path, name: str, virtual: Virtual | None, out: Path) -> dict[str, bytes]:
    """Run the job as a worker does; return the files that it made."""
    out.mkdir()
    wanted = QuantizeOptions(name="m", format=formats()[name])
    job: QuantizeJob = replace(job_of(Input(path=model), 10**7, wanted, out), virtual=virtual)
    with computed(job):
        STAGES["quantize"](job, lambda *_: None)
    return {path.name: path.read_bytes() for path in out.iterdir()}
