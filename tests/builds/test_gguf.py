"""GGUF files by llama.cpp's own programs, read back and measured."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
from tokenizers import Tokenizer
from transformers import Qwen3Config
from weightsmith.building.wiring import cache_folder
from weightsmith.outside.toolset import toolset_folder
from weightsmith.quantizers import of_format
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.gguf_types import FILE_TYPES
from weightsmith.quantizers.quality import measure as measuring
from weightsmith.quantizers.quality.texts import Reading

from tests.fakes.ggufs import TINY, make_random
from tests.fakes.ggufs import made as made_files
from tests.paths import ROOT

pytestmark = pytest.mark.builders


def quantize(out: Path, *words: object) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "weightsmith.cli.program", "quantize", "--model", TINY / "base",
         "--calibration", TINY / "calibration.jsonl", "--runner", "local", "--out", out,
         *words, "--json"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
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


def test_a_template_of_its_own_file_is_before_that_of_the_configuration(tmp_path):
    """As in transformers: an adapter brings the file, and its base has both."""
    model = tmp_path / "model"
    shutil.copytree(TINY / "base", model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["chat_template"] = "older"
    (model / "tokenizer_config.json").write_text(json.dumps(settings))

    (file,) = made_files(model, tmp_path / "out", "q8_0")

    field = gguf.GGUFReader(file).fields["tokenizer.chat_template"]
    assert field.contents() == (model / "chat_template.jinja").read_text()


def test_parts_are_no_larger_than_asked_and_nothing_else_is_left(made):
    files = [Path(name) for name in made["files"]]

    assert len(files) > 1
    assert all(path.stat().st_size <= 1_000_000 for path in files)
    assert {path.suffix for path in files} == {".gguf"}
    assert sorted(path.name for path in Path(made["out"]).iterdir()) == [p.name for p in files]


@pytest.mark.full
def test_a_type_that_cannot_be_read_back_is_not_measured(tmp_path):
    done = quantize(tmp_path / "t.gguf", "--format", "q1_0", "--allow-low-bits")

    assert done["quality"] == {"skipped": "the gguf package cannot dequantize Q1_0"}
    assert "quality not measured" in done["stderr"]


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


@pytest.mark.full
def test_the_divergence_is_near_what_llama_cpp_says_of_its_own(tmp_path, monkeypatch):
    """llama.cpp counts the second half of each window, and rounds activations as well.

    Held against the same tokens: the mean over other windows differs by a tenth, by chance alone.
    """
    programs = toolset_folder(cache_folder(), "llamacpp") / "bin"
    text = "\n".join(json.loads(line)["text"] for line in GENERAL.read_text().splitlines())
    (tmp_path / "text").write_text(text)
    whole = quantize(tmp_path / "f16.gguf", "--format", "f16")["out"]
    small = quantize(tmp_path / "q2.gguf", "--format", "q2_k", "--allow-low-bits", "--no-gate")[
        "out"
    ]

    def perplexity(file: str, *words: str) -> str:
        # Where other tests run too, its threads would wait for each other in loops.
        command = [programs / "llama-perplexity", "-m", file, "-f", "text", "-c", "256", "-t", "1"]
        command += ["--kl-divergence-base", "base", *words]
        return subprocess.run(
            command, cwd=tmp_path, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        ).stdout.decode()

    perplexity(whole)
    told = perplexity(small, "--kl-divergence")
    theirs = float(re.search(r"Mean\s+KLD:\s+([\d.]+)", told)[1])
    tokens = Tokenizer.from_file(str(TINY / "base/tokenizer.json")).encode(text).ids
    starts = range(0, len(tokens) - 255, 256)
    windows = [Reading(ids=tuple(tokens[n : n + 256]), answer=129) for n in starts]
    monkeypatch.setattr(measuring, "readings", lambda *_: windows)

    view = of_format("q2_k").view(Path(small), TINY / "base")
    ours = measuring.measure(TINY / "base", view, [], len(tokens), lambda *_: None).kl_mean

    assert ours == pytest.approx(theirs, rel=0.02)


def test_a_qwen_3_is_what_its_class_says(tmp_path):
    """The converter makes a reranker, without a head for words, of one whose folder or README.md
    names one: as here, of an adapter's base that was trained from a reranker's weights."""
    config = Qwen3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, vocab_size=512, tie_word_embeddings=False,
        max_position_embeddings=512,
    )  # fmt: skip
    model = make_random(tmp_path / "Qwen3-Reranker-0.6B", config, TINY / "base")
    (model / "README.md").write_text("# Qwen3-Reranker-0.6B\n")

    (file,) = made_files(model, tmp_path / "out", "q8_0")

    found = gguf.GGUFReader(file)
    assert "output.weight" in {tensor.name for tensor in found.tensors}
    assert not any(tensor.name.startswith("cls") for tensor in found.tensors)
    assert "qwen3.pooling_type" not in found.fields
