"""GGUF files of base and adapters, without a merged checkpoint: the bytes of the usual way."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from weightsmith.building.wiring import cache_folder
from weightsmith.core.errors import InputRefused
from weightsmith.core.job_inputs import Input, Virtual
from weightsmith.core.merge_options import Merge
from weightsmith.merging.engine import MergeRequest, merge
from weightsmith.outside.local import LocalRunner
from weightsmith.quantizers import formats
from weightsmith.stages.quantize import QuantizeOptions, job_of

from tests.fakes.ggufs import CONFIGS, TINY, make_random, model_type, same
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


@pytest.mark.grid(2)
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


def test_weights_that_are_not_those_of_the_merge_are_refused(tmp_path):
    (config,) = (config for config in CONFIGS if config.model_type == "llama")
    config.vocab_size = 512
    base, model = make_random(tmp_path / "base", config, TINY / "base"), tmp_path / "out" / "model"
    adapters = ((make_adapter(base, tmp_path / "adapter"), 1.0),)
    made = merge(MergeRequest(base=base, adapters=adapters, out=model, headers_only=True))
    others = ((make_adapter(base, tmp_path / "other"), 1.0),)

    with pytest.raises(InputRefused, match="not those that were merged"):
        quantized(model, "q4_k_m", computing(base, others, made))


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
