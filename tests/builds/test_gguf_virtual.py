"""GGUF files of base and adapters, without a merged checkpoint: the bytes of the usual way."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig
from weightsmith.building.wiring import cache_folder
from weightsmith.core.errors import InputRefused
from weightsmith.core.jobs import Input, Virtual
from weightsmith.core.merge_options import Merge
from weightsmith.merging.engine import MergeRequest, merge
from weightsmith.outside.local import LocalRunner
from weightsmith.quantizers import formats
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.gguf_header import read_header
from weightsmith.quantizers.gguf_importance import DIGEST_KEY
from weightsmith.quantizers.layerwise.importance import importance, write_importance
from weightsmith.stages.quantize import QuantizeOptions, job_of

from tests.fakes.ggufs import (
    CONFIGS,
    SHAPE,
    TINY,
    converted,
    made,
    make_random,
    model_type,
    program,
    same,
    theirs,
    walked,
)
from tests.fakes.journal import RecordingProgress

pytestmark = [pytest.mark.builders, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


FORMATS = {
    "llama": "q4_k_m",
    "mixtral": "q4_k_m",
    "gemma2": "q5_k_m",
    "phi3": "bf16",
    "qwen2": "f16",
}
"""Rows permuted, experts stacked, norms changed, projections fused, none of these."""


@pytest.mark.full  # the last test shows it for llama, with importance
@pytest.mark.parametrize("config", [c for c in CONFIGS if c.model_type in FORMATS], ids=model_type)
def test_each_kind_of_architecture(tmp_path, config):
    name = FORMATS[config.model_type]
    config.vocab_size = 512
    base = make_random(tmp_path / "base", config, TINY / "base")
    adapters = ((make_adapter(base, tmp_path / "adapter"), 1.0),)
    files = {}
    for headers_only in (False, True):
        model = tmp_path / ("unwritten" if headers_only else "written") / "model"
        made = merge(
            MergeRequest(base=base, adapters=adapters, out=model, headers_only=headers_only)
        )
        virtual = computing(base, adapters, made) if headers_only else None
        files[headers_only] = quantized(model, name, virtual)

    assert same(files[True], files[False])


def make_adapter(base, folder):
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(network, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for key, parameter in tuned.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.2)
    tuned.save_pretrained(folder, save_embedding_layers=False)
    return folder


def computing(base, adapters, made):
    """What computes the weights again, and what the merge says of them."""
    return Virtual(
        base=Input(path=base),
        adapters=tuple(Input(path=path) for path, _ in adapters),
        weights=tuple(weight for _, weight in adapters),
        options=Merge(),
        digests={shard["file"]: shard["sha256"] for shard in made["shards"]},
    )


def quantized(model, name, virtual):
    out = model.parent / "gguf"
    out.mkdir()
    wanted = QuantizeOptions(name="demo", format=formats()[name], options={"imatrix": "off"})
    job = replace(job_of(Input(path=model), 1 << 20, wanted, out), virtual=virtual)
    LocalRunner(cache_folder()).run(job, RecordingProgress())
    left = sorted(out.iterdir())
    assert [path.name for path in left] == ["demo.gguf"]
    return left


ROWS = tuple(json.loads(line) for line in GENERAL.read_text("utf-8").splitlines()[:8])
CLOSE = {"llama": 0.005, "mixtral": 0.005, "gemma3_text": 0.005, "phi3": 0.2}
"""Rows reordered, experts stacked, norms changed, projections joined: the largest difference,
relative. For Phi-3, the converter takes this tokenizer to put a space before the text."""


def sums(file: Path) -> dict[str, np.ndarray]:
    """Means per matrix and column, as the gguf package reads the file."""
    found = {tensor.name: tensor.data for tensor in gguf.GGUFReader(file).tensors}
    names = [name.removesuffix(".in_sum2") for name in found if name.endswith(".in_sum2")]
    return {
        n: found[f"{n}.in_sum2"].reshape(count.size, -1) / np.maximum(count.reshape(-1, 1), 1)
        for n in names
        for count in [found[f"{n}.counts"]]
    }


@pytest.mark.grid(8)
@pytest.mark.parametrize("config", [c for c in CONFIGS if c.model_type in CLOSE], ids=model_type)
def test_it_is_nearly_that_of_llama_imatrix_and_read_as_such(tmp_path, config):
    config.vocab_size = 512
    config.query_pre_attn_scalar = 16  # llama.cpp takes it to be the head dimension
    model = make_random(tmp_path / "model", config, TINY / "base")
    ((middle,),) = converted(model, tmp_path, "bf16")
    texts = [row["text"] for row in ROWS]
    write_importance(tmp_path / "ours.gguf", importance(model, texts, 4096))
    (middle.parent / "text").write_text("\n".join(texts))
    words = ("-f", "text", "-o", "theirs.gguf", "-c", "128", "--no-ppl", "-fa", "off", "-t", "1")
    command = [program("llama-imatrix"), "-m", middle.name, *words]
    subprocess.run(command, cwd=middle.parent, check=True, capture_output=True)

    mine, other = sums(tmp_path / "ours.gguf"), sums(middle.parent / "theirs.gguf")
    routers = {name for name in other if "ffn_gate_inp" in name}
    assert mine.keys() == other.keys() - routers
    for name, values in mine.items():
        assert values.shape == other[name].shape
        far = np.abs(values - other[name]).sum() / np.abs(other[name]).sum()
        assert far < CLOSE[config.model_type], f"{name}: {far}"


@pytest.mark.full  # test_gguf_pass.py has the bytes of llama-quantize
def test_a_file_made_with_it_is_llama_quantizes_own(tmp_path):
    ((middle,),) = converted(TINY / "base", tmp_path, "bf16")
    ours = walked(TINY / "base", tmp_path / "walk", ROWS)
    (middle.parent / ours.name).write_bytes(ours.read_bytes())
    files = made(TINY / "base", tmp_path / "ours", "q4_k_m", ours)
    measured = ours.with_name(files[0].name)

    digest = gguf.GGUFReader(files[0]).fields[DIGEST_KEY].contents()
    words = ("--imatrix", ours.name, "--override-kv", f"{DIGEST_KEY}=str:{digest}")
    assert same(files, theirs(middle, tmp_path / "theirs", "q4_k_m", *words))
    assert same(files, [measured])
    assert {path.name for path in ours.parent.iterdir()} == {ours.name, measured.name}


@pytest.mark.full  # tests/unit/stages/test_quantize.py resumes steps, and so these
def test_what_a_killed_run_has_measured_is_not_measured_again(tmp_path):
    ours = walked(TINY / "base", tmp_path / "first", ROWS[:4])
    (tmp_path / "second").mkdir()
    shutil.copy(ours, tmp_path / "second")

    again = walked(TINY / "base", tmp_path / "second", ROWS)

    assert again.read_bytes() == ours.read_bytes()
    assert same([again.with_name("demo.gguf")], [ours.with_name("demo.gguf")])


@pytest.mark.full  # tests/unit/quantizers/test_gguf.py refuses it by the same rule
def test_a_text_that_is_too_short_is_refused_beside_the_converter(tmp_path):
    with pytest.raises(InputRefused, match="1 calibration texts have 1 tokens") as refused:
        walked(TINY / "base", tmp_path / "out", ({"text": "a"},))

    assert "imatrix to off" in refused.value.hint


def test_the_walks_loops_do_not_change_what_the_converter_computes(tmp_path):
    """Powers of this base have other last bits with AVX-512."""
    rotary = {"rope_type": "llama3", "rope_theta": 9058.0, "factor": 8.0, "low_freq_factor": 0.01,
              "high_freq_factor": 700.0, "original_max_position_embeddings": 4096}  # fmt: skip
    config = LlamaConfig(**SHAPE, head_dim=32, vocab_size=512, rope_parameters=rotary)
    model = make_random(tmp_path / "model", config, TINY / "base")

    ours = walked(model, tmp_path / "walk", ROWS)

    (file,) = made(model, tmp_path / "made", "q4_k_m", ours)
    assert "rope_freqs.weight" in read_header(file).tensors
    assert same([file], [ours.with_name("demo.gguf")])


def test_base_and_adapter_give_the_file_of_the_merged_checkpoint(tmp_path):
    (config,) = (config for config in CONFIGS if config.model_type == "llama")
    config.vocab_size = 512
    base = make_random(tmp_path / "base", config, TINY / "base")
    adapters = ((make_adapter(base, tmp_path / "adapter"), 1.0),)
    files = []
    for headers_only in (False, True):
        model = tmp_path / f"model-{headers_only}"
        made = merge(
            MergeRequest(base=base, adapters=adapters, out=model, headers_only=headers_only)
        )
        virtual = computing(base, adapters, made) if headers_only else None
        files.append(walked(model, tmp_path / f"out-{headers_only}", ROWS, virtual=virtual))

    assert files[0].read_bytes() == files[1].read_bytes()
    assert same(*([file.with_name("demo.gguf")] for file in files))
