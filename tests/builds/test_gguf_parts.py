"""GGUF files in parts of one kind of matrix each: equal where adapters changed nothing."""

import json
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig
from weightsmith.core.jobs import Input
from weightsmith.merging.engine import MergeRequest, merge
from weightsmith.models.gguf_config import gguf_models
from weightsmith.quantizers.calibration import GENERAL

from tests.fakes.ggufs import SHAPE, TINY, made, make_random, program, quantize

pytestmark = [pytest.mark.builders, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

ROWS = tuple(json.loads(line) for line in GENERAL.read_text("utf-8").splitlines()[:4])
WIDE = {**SHAPE, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}
OTHERS = [
    pytest.param(LlamaConfig(**WIDE), "q8_0", id="no-importance"),
    pytest.param(MixtralConfig(**WIDE, num_local_experts=4), "q4_k_m", id="experts"),
]


def fine_tune(base: Path, folder: Path, seed: int) -> Path:
    """Merge a random adapter on the queries."""
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(network, LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        for key, parameter in tuned.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.2)
    tuned.save_pretrained(folder / "adapter")
    model = folder / "model"
    merge(MergeRequest(base=base, adapters=((folder / "adapter", 1.0),), out=model))
    return model


def parts(model: Path, out: Path, base: Path, name: str) -> dict[str, list[str]]:
    """Quantize; return the kinds of tensors in each file."""
    imatrix = "walk" if name == "q4_k_m" else "off"
    facts = quantize(
        model,
        out,
        name,
        {"imatrix": imatrix, "shared_layers": True},
        texts=ROWS if imatrix == "walk" else (),
        measured_on=Input(path=base),
    )
    assert facts["files"] == sorted(path.name for path in out.glob("model-*.gguf"))
    assert gguf_models(facts["files"]) == facts["files"]
    return facts["kinds"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, list[str]]]:
    """A base, a model with one adapter, quantized beside itself, and its parts."""
    folder = tmp_path_factory.mktemp("llama")
    base = make_random(folder / "base", LlamaConfig(**WIDE), TINY / "base")
    model = fine_tune(base, folder / "1", 1)
    return base, model, parts(model, model.parent / "gguf", base, "q4_k_m")


def tensors(files: list[Path]) -> dict[str, tuple[str, bytes]]:
    every = (tensor for file in files for tensor in gguf.GGUFReader(file).tensors)
    return {t.name: (t.tensor_type.name, np.asarray(t.data).tobytes()) for t in every}


def test_what_an_adapter_leaves_is_the_same_for_all_of_a_base(tmp_path, llama):
    base, model, kinds = llama
    other = fine_tune(base, tmp_path / "2", 2)
    check_parts([model, other], [kinds, parts(other, tmp_path / "2" / "gguf", base, "q4_k_m")])


@pytest.mark.full
@pytest.mark.parametrize(("config", "name"), OTHERS)
def test_and_of_other_bases_and_formats(tmp_path, config, name):
    base = make_random(tmp_path / "base", config, TINY / "base")
    models = [fine_tune(base, tmp_path / f"{seed}", seed) for seed in (1, 2)]
    check_parts(models, [parts(model, model.parent / "gguf", base, name) for model in models])


def check_parts(models: list[Path], kinds: list[dict[str, list[str]]]) -> None:
    folders = [model.parent / "gguf" for model in models]

    assert kinds[0] == kinds[1]
    files = sorted(path.name for path in folders[0].glob("model-*.gguf"))
    differ = {f for f in files if len({(one / f).read_bytes() for one in folders}) > 1}
    (own,) = [f for f, some in kinds[0].items() if "model.layers.N.self_attn.q_proj" in some]
    assert differ == {own}
    assert kinds[0][own] == ["model.layers.N.self_attn.q_proj"]
    assert "" not in kinds[0]


def test_llama_cpp_reads_the_parts_as_it_reads_one_file(tmp_path, llama):
    _, model, _ = llama
    out = model.parent / "gguf"
    (whole,) = made(model, tmp_path / "whole", "q4_k_m", out / "imatrix.gguf")
    files = sorted(out.glob("model-*.gguf"))

    assert tensors(files) == tensors([whole])
    assert not gguf.GGUFReader(files[0]).tensors
    (tmp_path / "text").write_text("\n".join(row["text"] for row in ROWS))
    words = ("-f", tmp_path / "text", "-c", "64", "--chunks", "2", "-t", "1", "-fa", "off")
    said = []
    for file in (files[0], whole):
        # What it prints may be lost when it ends: a thread of its own writes it.
        command = [program("llama-perplexity"), "-m", file, *words, "--save-all-logits", "logits"]
        subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
        said.append((tmp_path / "logits").read_bytes())
    assert said[0] == said[1]
    assert len(said[0]) > 2 * 31 * 2 * WIDE["vocab_size"]  # chunks, tokens judged, bytes, words
