"""What our formats, GPTQModel and llm-compressor lose on a tiny trained model with experts.

    python benchmarks/quantize_experts.py [--model mixtral] [--ways "fp8;awq, GPTQModel"]

The model is the tests' (tests/fakes/experts.py), merged by our merge. A row without another tool's
name is our `quantize`. Other tools are called by hand in their builders, with the same calibration
text, groups of 128, zero points in AWQ, and their defaults otherwise. Our view reads every result;
the quality gate compares it with the merged model on the same held-out text, and its dequantized
weights answer the questions about the model's facts in transformers. Of Mixtral, our view reads our
own formats only, because both tools rename its experts. Files are written below
benchmarks/work/quantize-experts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

from quantize import HEADINGS, PROGRAM, dequantized, heading, row, say
from quantize_by_hand import COMPRESSOR, HAND, SAMPLES, python_of
from weightsmith.building.wiring import cache_folder
from weightsmith.core.ports import Silent
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.outside.local import LocalRunner
from weightsmith.quantizers import formats
from weightsmith.quantizers.calibration import read_texts
from weightsmith.quantizers.checkpoints import finish
from weightsmith.quantizers.packed import view_of
from weightsmith.quantizers.quality.limits import limits_for
from weightsmith.quantizers.quality.measure import measure
from weightsmith.quantizers.quality.result import QualityResult
from weightsmith.quantizers.quality.texts import as_lines
from weightsmith.recipe.schema import Quality, TextBounds

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.fakes.experts import KINDS, trained  # noqa: E402

WORK = ROOT / "benchmarks" / "work" / "quantize-experts"
GPTQ = HAND["gptq"].replace(", mse=2.0", "")
AWQ = (
    GPTQ.replace("GPTQConfig", "AWQConfig")
    .replace("desc_act=False, sym=True", "sym=False")
    .replace("GPTQ_TORCH", "AWQ_TORCH")
    .replace("dtype=torch.float32", 'dtype="auto"')
)
# Its packing kernel does not take float32 by itself.
WIDE = """
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
AwqTorchLinear.SUPPORTS_DTYPES = [*AwqTorchLinear.SUPPORTS_DTYPES, torch.float32]
"""
# Its AWQ uses only the last of several samples of different lengths.
EQUAL = """
joined = sum(samples, [])
count = -(-len(joined) // 512)
size = -(-len(joined) // count)
joined += joined[:count * size - len(joined)]
samples = [joined[i:i + size] for i in range(0, len(joined), size)]
"""


def compressor(scheme: str, modifier: str = "QuantizationModifier") -> str:
    """Return llm-compressor's script for one of its schemes."""
    recipe = f'{modifier}(scheme="{scheme}", targets="Linear", ignore=["lm_head"])'
    return f"from llmcompressor.modifiers.quantization import {modifier}" + COMPRESSOR.replace(
        "RECIPE", recipe
    )


PEERS = {
    "gptq, GPTQModel": ("gptq", "gptqmodel", GPTQ),
    "gptq, GPTQModel, mse=2.0": ("gptq", "gptqmodel", HAND["gptq"]),
    "gptq, llm-compressor": ("gptq", "compressor", compressor("W4A16", "GPTQModifier")),
    "awq, GPTQModel": ("awq", "gptqmodel", AWQ),
    "awq, GPTQModel, samples of equal length": ("awq", "gptqmodel", EQUAL + AWQ),
    "awq, GPTQModel, float32": (
        "awq",
        "gptqmodel",
        WIDE + AWQ.replace('dtype="auto"', "dtype=torch.float32"),
    ),
    "awq, llm-compressor": ("awq", "compressor", HAND["awq-compressed"]),
    "fp8, llm-compressor": ("fp8", "compressor", compressor("FP8_DYNAMIC")),
    "fp8-static, llm-compressor": ("fp8-static", "compressor", HAND["fp8-static"]),
    "nvfp4a16, llm-compressor": ("nvfp4a16", "compressor", compressor("NVFP4A16")),
}
"""What a row says -> our format with the same limits, builder, script."""
OURS = ("fp8", "awq", "gptq", "nvfp4a16")


def tool(*words: object) -> dict:
    """Run a command of ours and return its JSON."""
    line = [*PROGRAM, *map(str, words), "--runner", "local", "--json"]
    return json.loads(subprocess.run(line, check=True, stdout=subprocess.PIPE).stdout)


def by_hand(name: str, model: Path, folder: Path) -> None:
    """Let a peer quantize, and write `folder`/out with other tensors in the model's dtype."""
    _, builder, script = PEERS[name]
    LocalRunner(cache_folder()).prepare(builder, Silent())
    (folder / "hand.py").write_text((SAMPLES + script).replace("GROUP", "128"))
    environment = {"HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    with (folder / "log").open("wb") as log:
        subprocess.run(
            [python_of(builder), "hand.py", model, WORK / "texts", "raw"],
            cwd=folder,
            env={**os.environ, **environment, "PYTHONPATH": ""},
            check=True,
            stdout=log,
            stderr=log,
        )
    (folder / "out").mkdir()
    config = json.loads((folder / "raw" / "config.json").read_text())
    finish(model, folder / "raw", folder / "out", config["quantization_config"])


def lost_by(name: str, kind: str, model: Path, data: Path) -> list[str]:
    """Quantize in one way and return its line of the table."""
    folder = WORK / name.replace(" ", "-")
    folder.mkdir(parents=True)
    texts = read_texts(data / "calibration.jsonl", TextBounds())
    if name in PEERS:
        by_hand(name, model, folder)
    else:
        words = ("--format", name, "--calibration", data / "calibration.jsonl", "--no-gate")
        tool("quantize", "--model", model, "--out", folder / "out", *words)
    format_ = formats()[PEERS[name][0] if name in PEERS else name]
    view = view_of(folder / "out", model)
    loss = measure(model, view, texts.held_out, Quality().tokens, lambda _done, _total: None)
    limits = limits_for(format_, Quality(), perplexity=loss.perplexity_reference)
    plain = dequantized(folder, format_.name, model)
    asked = ("--data", data / "eval.jsonl", "--metric", "contains", "--max-tokens", 32)
    score = tool("evaluate", "--model", plain, *asked)
    made, own = CheckpointTensors(folder / "out"), CheckpointTensors(model)
    packed = sum(made.array(n).nbytes for n in made.names)
    size = sum(path.stat().st_size for path in (folder / "out").iterdir())
    weights = sum(math.prod(own.info(n).shape) for n in own.names)
    lost = QualityResult(loss=loss).judged(limits, None).to_json()
    cells = row(f"{kind}, tiny", name, size, 8 * packed / weights, lost, score)
    return [*cells[:2], f"{size / 1e6:.2f}", *cells[3:]]


def main() -> None:
    """Merge once, quantize in each way, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=sorted(KINDS), default="qwen3_moe")
    parser.add_argument("--ways", default=";".join((*OURS, *PEERS)), help="separated by ;")
    asked = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    WORK.mkdir(parents=True)
    data, model = trained(asked.model, cache_folder() / "trained"), WORK / "merged"
    tool("merge", "--base", data / "base", "--adapter", data / "adapter", "--out", model)
    texts = read_texts(data / "calibration.jsonl", TextBounds())
    lines = as_lines(model, texts.calibration).splitlines()
    (WORK / "texts").write_text("".join(json.dumps(json.loads(x)["text"]) + "\n" for x in lines))
    heading(HEADINGS)
    for name in asked.ways.split(";"):
        say(lost_by(name, asked.model, model, data))
    shutil.rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    main()
