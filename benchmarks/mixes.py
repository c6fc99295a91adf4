"""What mixes lose beside other formats, at equal size of file.

    python benchmarks/mixes.py MODEL [--engine vllm] [--only "q4_k_m,mix of q4_k_m"]
        [--tokens 1536]

MODEL is a checkpoint's folder. All files have an importance matrix by our walk over the same text:
paragraphs of this project's documentation, of which a quarter is held out. The divergence from the
checkpoint and the agreement of the likeliest token are those of the dequantized weights on the
held-out text, as in the quality gate. `mix of X` has at most the bytes of the file X, `0.9 mix of
X` nine tenths. `dynamic` is llama-quantize with rules like those of Unsloth's dynamic types: more
bits for embeddings, head, attention's values and outputs, the down projections of the first and
last layers. Of vLLM, `N bits` is a mix of N bits per weight, `read FOLDER` a checkpoint of weights
that another tool has dequantized, and what fp8 rounds of a layer's inputs is in no figure. Files
are kept below benchmarks/work/mixes, so that `--only` can go on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from weightsmith.core.jobs import Input
from weightsmith.core.values import Json
from weightsmith.models.facts import read_facts
from weightsmith.models.tensors import CheckpointTensors, View
from weightsmith.quantizers import of_format
from weightsmith.quantizers.calibration import Texts, read_texts
from weightsmith.quantizers.quality.measure import measure
from weightsmith.recipe.schema import TextBounds

ROOT = Path(__file__).parents[1]
sys.path[0] = str(ROOT)  # here, gguf.py would stand for the package

from tests.fakes.ggufs import quantize  # noqa: E402

WORK = ROOT / "benchmarks" / "work" / "mixes"
FILES = WORK
TEXTS = 40
WAYS = {
    "llamacpp": (
        "q4_k_m",
        "mix of q4_k_m",
        "0.9 mix of q4_k_m",
        "dynamic",
        "mix of dynamic",
        "q5_k_m",
        "mix of q5_k_m",
        "0.9 mix of q5_k_m",
    ),
    "vllm": ("gptq", "awq", "mix of awq", "fp8", "0.9 mix of fp8", "mix of fp8"),
}
MIXES = {"llamacpp": "mix", "vllm": "mix-compressed"}
ENGINE = "llamacpp"


def write_texts(file: Path) -> None:
    """Write paragraphs of the pages, drawn by their digests."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    paragraphs = [part for page in pages for part in page.read_text("utf-8").split("\n\n")]
    plain = {part for part in paragraphs if 400 <= len(part) <= 1200 and part[0].isalpha()}
    drawn = sorted(plain, key=lambda part: hashlib.sha256(part.encode()).digest())[:TEXTS]
    file.write_text("".join(json.dumps({"text": part}) + "\n" for part in drawn))


def options_of(way: str, layers: int) -> tuple[str, dict[str, Json]]:
    """Return the format and the options of a way's file."""
    if way == "dynamic":
        ends = "|".join(str(layer) for layer in (0, 1, layers - 2, layers - 1))
        rules = {
            r"token_embd|^output\.weight": "q8_0",
            "attn_v|attn_output": "q6_k",
            rf"blk\.({ends})\.ffn_down": "q6_k",
        }
        return "q4_k_m", {"tensor_types": rules}
    share, _, of = way.rpartition("mix of ")
    if way.endswith(" bits"):
        return MIXES[ENGINE], {"bits": float(way.removesuffix(" bits"))}
    if of == way:  # groups that the mix has, too
        return way, {"group_size": 32} if way in ("awq", "gptq") else {}
    return MIXES[ENGINE], {"size": int(float(share or 1) * file_of(of).stat().st_size)}


def file_of(way: str) -> Path:
    name = "demo.gguf" if ENGINE == "llamacpp" else "model.safetensors"
    return FILES / way.replace(" ", "-") / name


def moved(model: Path) -> Path:
    """Return a copy of a model whose weights were of Q4_1, each moved at random within its step."""
    out = WORK / f"{model.parent.name[:12]}-moved"
    if out.is_dir():
        return out
    shutil.copytree(model, out)
    (file,) = out.glob("*.safetensors")
    draw, tensors = torch.Generator().manual_seed(0), load_file(file)
    for name, tensor in tensors.items():
        if "proj" in name:
            blocks = tensor.float().view(-1, 32)
            step = (blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)) / 15
            blocks += (torch.rand(blocks.shape, generator=draw) - 0.5) * step
            tensors[name] = blocks.view(tensor.shape).to(tensor.dtype)
    save_file(tensors, file, {"format": "pt"})
    return out


def make(model: Path, way: str, texts: Texts) -> Mapping[str, Json]:
    """Make a way's file, and measure importance and losses first, once."""
    matrix, losses = FILES / "imatrix.gguf", FILES / "losses.json"
    if not losses.is_file():
        whole = {"imatrix": "walk", "bits": 12}
        quantize(model, FILES / "first", MIXES[ENGINE], whole, texts=texts.calibration)
        (FILES / "first" / "imatrix.gguf").rename(matrix)
        (FILES / "first" / "losses.json").rename(losses)
    format_, options = options_of(way, read_facts(model).layers)
    out = file_of(way).parent
    shutil.rmtree(out, ignore_errors=True)
    given: dict[str, object] = {"texts": texts.calibration} if ENGINE == "vllm" else {}
    if format_ == MIXES[ENGINE]:
        given["losses"] = Input(path=losses)
    elif ENGINE == "vllm":
        return quantize(model, out, format_, options, **given)
    return quantize(model, out, format_, {"imatrix": "given", **options}, matrix, **given)


class Read(CheckpointTensors):
    """A View of weights that were dequantized before."""

    def tensor(self, name: str) -> np.ndarray:
        return self.f32(name)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self.part(name, (slice(start, stop),))

    def kind(self, _name: str) -> str:
        return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--engine", choices=WAYS, default="llamacpp")
    parser.add_argument("--only", help="default: all of the engine's, separated by commas")
    parser.add_argument("--texts", type=Path, help="JSON Lines; default: pages of this project")
    parser.add_argument("--tokens", type=int, default=1536)
    parser.add_argument("--moved", action="store_true", help="see `moved`")
    options = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    model = moved(options.model) if options.moved else options.model
    global ENGINE, FILES
    ENGINE = options.engine
    FILES = WORK / f"{model.parent.name[:12]}-{model.name}"
    FILES = FILES / ENGINE if ENGINE != "llamacpp" else FILES
    FILES.mkdir(parents=True, exist_ok=True)
    write_texts(WORK / "texts.jsonl")
    texts = read_texts(options.texts or WORK / "texts.jsonl", TextBounds())
    print("| file | MB | bits | KL mean | 95 % interval | KL p99 | top-1 | foreseen |")
    print("|" + "---|" * 8)
    for way in options.only.split(",") if options.only else WAYS[ENGINE]:
        details: Mapping[str, Json] = {"size": 0, "bits_per_weight": 0, "types": ""}
        view: View
        if way.startswith("read "):
            view = Read(Path(way.removeprefix("read ")))
        else:
            details = make(model, way, texts)
            maker = of_format(options_of(way, read_facts(model).layers)[0]).view
            view = maker(file_of(way) if ENGINE == "llamacpp" else file_of(way).parent, model)
        found = measure(model, view, texts.held_out, options.tokens, lambda *_: None)
        low, high = found.intervals["kl_mean"]
        cells = (
            *(way, f"{details['size'] / 1e6:.2f}", f"{details['bits_per_weight']:.3f}"),
            *(f"{found.kl_mean:.5f}", f"{low:.5f} to {high:.5f}", f"{found.kl_p99:.4f}"),
            *(f"{found.top1:.4f}", f"{details['mix']['loss']:.4f}" if "mix" in details else ""),
        )
        print(f"| {' | '.join(cells)} |", flush=True)
        print(way, details.get("types", ""), file=sys.stderr)


if __name__ == "__main__":
    main()
