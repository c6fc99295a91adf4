"""Mixes are llama-quantize's own files with a type for each tensor, within their budget."""

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig
from weightsmith.core.errors import InputRefused
from weightsmith.quantizers.gguf_mix import BOUND, LOSS

from tests.fakes.ggufs import (
    SHAPE,
    TINY,
    converted,
    make_random,
    quantize,
    same,
    theirs,
    with_matrix,
)

pytestmark = [pytest.mark.builders, pytest.mark.slow]
ROWS = tuple(
    json.loads(line) for line in (TINY / "calibration.jsonl").read_text("utf-8").splitlines()
)
WIDE = {**SHAPE, "hidden_size": 256, "intermediate_size": 512}


def by_llamacpp(model: Path, out: Path, details: dict, folder: Path) -> list[Path]:
    """Let llama-quantize write the file, with the types that were chosen."""
    ((middle,),) = converted(model, folder / "16", "bf16")
    shutil.copy(out / "imatrix.gguf", middle.parent)
    read = gguf.GGUFReader(out / "demo.gguf")
    words = [*with_matrix(middle, measured=True)]
    for key in (LOSS, BOUND):
        words += ["--override-kv", f"{key}=str:{read.fields[key].contents()}"]
    for name, kind in details["tensor_types"].items():
        words += ["--tensor-type", f"^{name}$={kind.lower()}"]
    number = read.fields["general.file_type"].contents()
    name = next(n.name for n in gguf.LlamaFileType if n == number).removeprefix("MOSTLY_")
    return theirs(middle, folder / "theirs", name, *words)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**WIDE, vocab_size=512, tie_word_embeddings=False),
        pytest.param(LlamaConfig(**SHAPE, vocab_size=512), marks=pytest.mark.full),
        pytest.param(
            MixtralConfig(**WIDE, vocab_size=512, num_local_experts=4), marks=pytest.mark.full
        ),
    ],
    ids=["rows-of-256", "rows-of-32", "experts"],
)
def test_a_mix_has_the_bytes_of_llama_quantize(tmp_path, config):
    model = make_random(tmp_path / "model", config, TINY / "base")
    options = {"imatrix": "walk", "bits": 5.3}
    details = quantize(model, tmp_path / "ours", "mix", options, texts=ROWS)

    file = tmp_path / "ours" / "demo.gguf"
    assert same([file], by_llamacpp(model, tmp_path / "ours", details, tmp_path))
    assert 5.0 < details["bits_per_weight"] <= 5.3
    assert len(details["types"]) > 3
    assert 0 < details["mix"]["bound"] <= details["mix"]["loss"]


@pytest.mark.full
def test_a_size_is_kept_and_a_mix_taken_again(tmp_path):
    config = LlamaConfig(**WIDE, vocab_size=512, tie_word_embeddings=False)
    model = make_random(tmp_path / "model", config, TINY / "base")
    options = {"imatrix": "walk", "bits": 5.3}
    details = quantize(model, tmp_path / "ours", "mix", options, texts=ROWS)

    size = (tmp_path / "ours" / "demo.gguf").stat().st_size
    again = {"imatrix": "walk", "size": size}
    smaller = quantize(model, tmp_path / "sized", "mix", again, texts=ROWS)
    assert 0.97 * size < (tmp_path / "sized" / "demo.gguf").stat().st_size <= size
    assert smaller["mix"]["loss"] >= details["mix"]["loss"]

    types = {name: kind.lower() for name, kind in details["tensor_types"].items()}
    given = {"imatrix": "walk", "mix": types}
    quantize(model, tmp_path / "given", "mix", given, texts=ROWS)
    mine, theirs_ = (gguf.GGUFReader(tmp_path / f / "demo.gguf") for f in ("ours", "given"))
    assert all((a.data == b.data).all() for a, b in zip(mine.tensors, theirs_.tensors, strict=True))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"bits": 4.26}, r"no mix is that small: the smallest has \d"),
        ({"mix": {"blk.9.attn_q.weight": "q4_k"}}, "the mix is of another model"),
    ],
)
@pytest.mark.full
def test_what_is_found_out_late_is_refused_all_the_same(tmp_path, options, why):
    config = LlamaConfig(**SHAPE, vocab_size=512)
    model = make_random(tmp_path / "model", config, TINY / "base")

    with pytest.raises(InputRefused, match=why):
        quantize(model, tmp_path / "out", "mix", {"imatrix": "walk", **options}, texts=ROWS)


@pytest.mark.full
def test_foreseen_losses_are_what_transformers_measures(tmp_path):
    """Each matrix alone is rounded in the whole model, whose divergence is then measured."""
    out = tmp_path / "out"
    quantize(TINY / "base", out, "mix", {"imatrix": "off", "bits": 6}, texts=ROWS)
    losses = json.loads((out / "losses.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    text = "\n".join(tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in ROWS)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    windows = ids[: len(ids) // 128 * 128].reshape(-1, 128)[:32]

    def logs():
        with torch.inference_mode():
            return model(input_ids=windows).logits.log_softmax(-1)

    right, ratios = logs(), []
    for tensor, parameter in {
        "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj",
        "blk.2.attn_output.weight": "model.layers.2.self_attn.o_proj",
        "blk.3.ffn_up.weight": "model.layers.3.mlp.up_proj",
        "output.weight": "lm_head",
        "token_embd.weight": "model.embed_tokens",
    }.items():
        weight = model.get_submodule(parameter).weight
        own = weight.detach().clone()
        kind = gguf.GGMLQuantizationType["Q4_0"]
        weight.data = torch.from_numpy(gguf.dequantize(gguf.quantize(own.numpy(), kind), kind))
        measured = (right.exp() * (right - logs())).sum(-1).mean()
        weight.data = own
        ratios.append(losses[tensor]["Q4_0"] / float(measured))

    assert all(0.4 < ratio < 2.5 for ratio in ratios), ratios
    assert np.exp(np.mean(np.log(ratios))) == pytest.approx(1, abs=0.3), ratios
