"""GGUF files by our builder and by llama.cpp's own programs, and random models for both."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from weightsmith.building.wiring import cache_folder
from weightsmith.core.jobs import Input, SiblingFormat
from weightsmith.core.values import Json
from weightsmith.outside.local import LocalRunner
from weightsmith.outside.toolset import tools_variable, toolset_folder
from weightsmith.quantizers import formats
from weightsmith.quantizers.gguf_importance import DIGEST_KEY
from weightsmith.stages.quantize import QuantizeOptions, job_of

from tests.fakes.journal import RecordingProgress
from tests.paths import TINY

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "max_position_embeddings": 128,
}
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


def model_type(config) -> str:
    return config.model_type


def make_random(model: Path, config, tokenizer: Path, dtype=torch.bfloat16) -> Path:
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


def quantize(
    model: Path,
    out: Path,
    name: str,
    options: Mapping[str, object],
    statistics: Path | None = None,
    **more: object,
) -> Mapping[str, Json]:
    """Quantize in the builder by a job with these changes; return its result."""
    out.mkdir(exist_ok=True)
    wanted = QuantizeOptions(
        name="demo",
        format=formats()[name],
        options=options,
        statistics=Input(path=statistics) if statistics else None,
    )
    job = replace(job_of(Input(path=model), 1 << 20, wanted, out), **more)
    return LocalRunner(cache_folder()).run(job, RecordingProgress())


def made(
    model: Path, out: Path, name: str, statistics: Path | None = None, **options
) -> list[Path]:
    out.mkdir()
    options = {"imatrix": str(statistics) if statistics else "off", **options}
    quantize(model, out, name, options, statistics)
    left = sorted(path for path in out.iterdir() if path.name != "imatrix.gguf")
    assert all(path.suffix == ".gguf" and not path.name.startswith(".") for path in left)
    return left


def walked(model: Path, out: Path, rows: tuple[Mapping[str, str], ...], **more: object) -> Path:
    quantize(model, out, "q4_k_m", {"imatrix": "walk"}, texts=rows, **more)
    return out / "imatrix.gguf"


def beside(
    model: Path,
    out: Path,
    first: str,
    *names: str,
    told: list[str] | None = None,
    **options: object,
) -> dict[str, list[Path]]:
    """Make several types in one job; `told` gets the warnings of the first."""
    out.mkdir()
    options = {"imatrix": "off", **options}
    others = tuple(SiblingFormat(format=name, options=options) for name in names)
    found = quantize(model, out, first, options, siblings=others)
    if told is not None:
        told += found["warnings"]
    for one in others:
        assert found["siblings"][one.format]["file_type"] == one.format
    folders = {first: out, **{one.format: out / one.folder for one in others}}
    return {name: sorted(path.glob("*.gguf")) for name, path in folders.items()}


CONVERT = """
import sys
from pathlib import Path
from weightsmith.quantizers.convert import run
converter, model, *outs = map(Path, sys.argv[1:])
about = ["--model-name", "demo", "--metadata", str(outs[0].with_name("metadata"))]
runs = (["--outfile", str(out), "--outtype", out.parent.name, *about] for out in outs)
run(converter, model, *((words, None) for words in runs))
"""
GUESSED = ("basename", "finetune", "organization", "version", "size_label")


def converted(model: Path, folder: Path, *names: str) -> list[list[Path]]:
    """Let llama.cpp's converter write files itself."""
    outs = [folder / name / "demo.gguf" for name in names]
    for out in outs:
        out.parent.mkdir(parents=True)
    metadata = json.dumps({f"general.{key}": None for key in GUESSED})
    (outs[0].parent / "metadata").write_text(metadata)
    converter = program("").parent / "convert" / "convert_hf_to_gguf.py"
    command = [sys.executable, "-c", CONVERT, converter, model, *outs]
    subprocess.run(command, check=True, capture_output=True)
    return [[out] for out in outs]


def program(name: str) -> Path:
    return toolset_folder(cache_folder(), "llamacpp") / "bin" / name


def theirs(middle: Path, out: Path, name: str, *words: object) -> list[Path]:
    out.mkdir()
    split = "--keep-split" in words
    target = out / ("demo" if split else "demo.gguf")
    command = [program("llama-quantize"), *words, middle, target, name.upper()]
    subprocess.run(command, cwd=middle.parent, check=True, capture_output=True)
    return sorted(out.iterdir())


def same(ours: list[Path], others: list[Path]) -> bool:
    names = [[path.name for path in files] for files in (ours, others)]
    return names[0] == names[1] and all(
        a.read_bytes() == b.read_bytes() for a, b in zip(ours, others, strict=True)
    )


def with_matrix(middle: Path, *, measured: bool) -> tuple[str, ...]:
    if not measured:
        return ()
    digest = hashlib.sha256((middle.parent / "imatrix.gguf").read_bytes()).hexdigest()
    return "--imatrix", "imatrix.gguf", "--override-kv", f"{DIGEST_KEY}=str:sha256:{digest}"


def make_middle(folder: Path) -> None:
    """Make the tiny base in 16 bits, bf16/demo.gguf, and beside it an importance matrix."""
    ((file,),) = converted(TINY / "base", folder, "bf16")
    texts = [json.loads(line) for line in (TINY / "calibration.jsonl").read_text().splitlines()]
    (file.parent / "text").write_text("\n".join(str(row) for row in texts))
    # Where other tests run too, threads of llama.cpp would wait for each other in loops.
    words = ("-f", "text", "-c", "128", "--chunks", "4", "--no-ppl", "-t", "1")
    for name, form in (("imatrix.gguf", "gguf"), ("imatrix.dat", "dat")):
        command = [program("llama-imatrix"), "-m", file.name, *words, "-o", name]
        command += ["--output-format", form]
        subprocess.run(command, cwd=file.parent, check=True, capture_output=True)


def compare(model: Path, folder: Path, dtype: str, *more: str) -> dict[str, list[Path]]:
    """Make types of llama-quantize and of the converter in one pass; hold them against both.

    Return all files by type, with those of `more` types.
    """
    between = {"bfloat16": "bf16", "float32": "f32"}.get(dtype, "f16")
    kinds = list(dict.fromkeys([between, "f16", "q8_0"]))
    middle, *others = converted(model, folder / "converted", *kinds)
    ours = beside(model, folder / "ours", "q5_k_m", *kinds[1:], *more)
    assert same(ours["q5_k_m"], theirs(middle[0], folder / "theirs", "q5_k_m"))
    for name, file in zip(kinds[1:], others, strict=True):
        assert same(ours[name], file), name
    return ours


PROGRAM = ("-m", "weightsmith.worker.quantize_gguf")


def run(
    middle: Path, folder: Path, name: str, words: tuple[str, ...] = PROGRAM, **options: object
) -> subprocess.CompletedProcess:
    file = {
        "out": str(folder / "demo.gguf"), "format": name, "tensor_types": {}, "importance": "",
        "overrides": {}, "direct": False, **options,
    }  # fmt: skip
    settings = {
        "convert": [], "middle": middle.name, "between": "bf16",
        "quantize": str(program("llama-quantize")),
        "threads": 3, "split": False, "files": [file],
    }  # fmt: skip
    (folder / "settings").write_text(json.dumps(settings))
    return subprocess.run(
        [sys.executable, *words, folder / "settings"],
        cwd=middle.parent, check=False, capture_output=True, text=True,
        env={**os.environ, tools_variable("kernels"): toolset_folder(cache_folder(), "kernels")},
    )  # fmt: skip
