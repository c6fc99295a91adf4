"""Times our quantization jobs against the same tools called by hand.

    python benchmarks/quantize_by_hand.py CHECKPOINT [--formats q4_k_m,gptq] [--rounds 3]
    python benchmarks/quantize_by_hand.py CHECKPOINT --billion --formats q4_k_m --imatrix off
    python benchmarks/quantize_by_hand.py CHECKPOINT --billion --lora 64 --formats q4_k_m \
        --imatrix off|FILE [--only ours]

Ours is the job in the local builder: it applies the chat template, writes the result with the
checkpoint's own tokenizer, reads it back and checks it, without the gate. By hand means llama.cpp's
three commands (two without a matrix), or a script that calls the library and saves. Both
use the general texts. `--billion` takes CHECKPOINT's tokenizer alone, for random weights in the
shape of a Llama of 1.07 billion. With `--lora`, an adapter of that rank on all linear layers is
merged as well: by our merge that writes no checkpoint, and by PEFT's `merge_and_unload`. `start` is
the builder's Python importing the library. Files are written below
benchmarks/work/quantize-by-hand.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import merge as shapes
import ml_dtypes
import numpy as np
from merge import PEFT, Shape, make_adapter, make_base
from quantize import watched
from safetensors.numpy import save_file
from weightsmith.building.wiring import cache_folder
from weightsmith.outside.environment import Pins, environment_folder
from weightsmith.outside.toolset import toolset_folder
from weightsmith.quantizers import of_format
from weightsmith.quantizers.calibration import GENERAL, read_texts
from weightsmith.recipe.schema import TextBounds

ROOT = Path(__file__).parents[1]
WORK = ROOT / "benchmarks" / "work" / "quantize-by-hand"
BILLION = Shape(2048, 8192, 16, 32, 8, 49152)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")

OURS = """
import sys
from pathlib import Path
from weightsmith.outside.local import LocalRunner
from weightsmith.core.jobs import Input
from weightsmith.core.ports import Silent
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.calibration import GENERAL, read_texts
from weightsmith.recipe.schema import TextBounds
from weightsmith.stages.quantize import QuantizeOptions, job_of
from weightsmith.building.wiring import cache_folder
model, out, name, imatrix = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
wanted = QuantizeOptions(name="m", format=formats()[name],
                options=of_format(name).options(formats()[name], {"imatrix": imatrix}),
                texts=read_texts(GENERAL, TextBounds()) if imatrix == "auto" else None)
LocalRunner(cache_folder()).run(job_of(Input(path=model), 4 << 30, wanted, out), Silent())
"""

MERGED = """
import sys
from dataclasses import replace
from pathlib import Path
from weightsmith.outside.local import LocalRunner
from weightsmith.core.jobs import Input, MergeJob, Virtual
from weightsmith.core.merge_options import Merge
from weightsmith.core.ports import Silent
from weightsmith.quantizers import formats
from weightsmith.stages.quantize import QuantizeOptions, job_of
from weightsmith.building.wiring import cache_folder
base, out, name, imatrix, adapter = sys.argv[1:]
base, out, adapter = Path(base), Path(out), Path(adapter)
model, file = out / "model", out / "file"
model.mkdir(), file.mkdir()
given = {"base": Input(path=base), "adapters": (Input(path=adapter),), "weights": (1.0,),
         "options": Merge()}
runner = LocalRunner(cache_folder())
made = runner.run(MergeJob(builder="merge", output=model, seconds=0, memory_bytes=4 << 30,
                           headers_only=True, **given), Silent())
digests = {shard["file"]: shard["sha256"] for shard in made["shards"]}
wanted = QuantizeOptions(name="m", format=formats()[name], options={"imatrix": "off"})
if imatrix != "off":
    matrix = Input(path=Path(imatrix))
    wanted = QuantizeOptions(name="m", format=formats()[name], options={}, statistics=matrix)
job = job_of(Input(path=model), 4 << 30, wanted, file)
runner.run(replace(job, virtual=Virtual(**given, digests=digests)), Silent())
"""

SAMPLES = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, texts, out = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
read = [tokenizer(json.loads(line), add_special_tokens=False)["input_ids"] for line in open(texts)]
samples = [ids[i:i + 512] for ids in read for i in range(0, len(ids), 512)]
"""

COMPRESSOR = """
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
IntermediatesCache.pin_memory = lambda *a, **k: None
network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
rows = [{"input_ids": s, "attention_mask": [1] * len(s)} for s in samples]
oneshot(model=network, tokenizer=tokenizer, dataset=Dataset.from_list(rows), recipe=RECIPE,
        max_seq_length=512, num_calibration_samples=len(rows))
network.save_pretrained(out, save_compressed=True)
"""

HAND = {
    "gptq": """
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.quantization.config import GPTQConfig
config = GPTQConfig(bits=4, group_size=GROUP, desc_act=False, sym=True, mse=2.0)
config.device, config.pack_impl = "cpu", "original"
loaded = GPTQModel.load(model, config, dtype=torch.float32)
rows = [{"input_ids": torch.tensor([s]), "attention_mask": torch.ones(1, len(s)).long()}
        for s in samples]
loaded.quantize(rows, batch_size=1, calibration_data_min_length=1, tokenizer=tokenizer,
                backend=BACKEND.GPTQ_TORCH)
loaded.save(out)
""",
    "fp8-static": COMPRESSOR.replace(
        "RECIPE", 'QuantizationModifier(scheme="FP8", targets="Linear", ignore=["lm_head"])'
    ),
    "awq-compressed": COMPRESSOR.replace(
        "RECIPE",
        '[AWQModifier(), QuantizationModifier(config_groups={"group_0": {"targets": ["Linear"], '
        '"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP, '
        '"symmetric": False, "dynamic": False}}}, ignore=["lm_head"])]',
    ),
}
START = {
    "gguf": "import gguf, transformers",
    "gptqmodel": "import gptqmodel",
    "compressor": "import llmcompressor",
    "autoawq": "import awq",
    "merge": "import numpy, ml_dtypes",
}
"""The library that each builder must import at least."""


def python_of(builder: str) -> Path:
    """Return a builder's Python."""
    pins = Pins(name=builder, flavour="cpu")
    return environment_folder(cache_folder(), pins) / "bin" / "python"


def by_hand(
    name: str, model: Path, folder: Path, imatrix: str, adapter: Path | None = None
) -> list[list]:
    """Return the commands that a person would run one by one in an empty folder."""
    rows = [str(row["text"]) for row in read_texts(GENERAL, TextBounds()).calibration]
    (folder / "text").write_text("\n".join(rows))
    if of_format(name).builder == "gguf":
        tools = toolset_folder(cache_folder(), "llamacpp")
        threads = str(max(1, len(os.sched_getaffinity(0)) - 1))
        convert = tools / "convert" / "convert_hf_to_gguf.py"
        settings = ["--no-ppl", "-t", threads, "-fa", "off"]
        files, matrix = ["f16.gguf", "m.gguf", name.upper()], ["--imatrix", "imatrix.gguf"]
        commands: list[list] = []
        if adapter:
            commands.append([python_of("merge"), "-c", PEFT, model, adapter, "merged"])
            commands.append(["cp", *(model / name for name in TOKENIZER), "merged"])
            model = folder / "merged"
        commands.append([python_of("gguf"), convert, model, "--outfile", "f16.gguf"])
        if imatrix == "auto":
            measure = [tools / "bin" / "llama-imatrix", "-m", "f16.gguf", "-f", "text", *settings]
            commands.append(measure)
        elif imatrix != "off":
            matrix[1] = imatrix
        if imatrix != "off":
            files = [*matrix, *files]
        return [*commands, [tools / "bin" / "llama-quantize", *files]]
    (folder / "rows").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = json.loads((model / "config.json").read_text())
    widths = (config["hidden_size"], config["intermediate_size"])
    group = next(size for size in (128, 64, 32) if not any(width % size for width in widths))
    (folder / "hand.py").write_text((SAMPLES + HAND[name]).replace("GROUP", str(group)))
    return [[python_of(of_format(name).builder), "hand.py", model, "rows", "out"]]


def timed(commands: list[list], folder: Path, made: Path) -> tuple[float, float, float, float]:
    """Run commands one by one; return wall and CPU seconds, the peak MiB, and MB below `made`."""
    tools = toolset_folder(cache_folder(), "llamacpp")
    more = {
        "PYTHONPATH": f"{tools}/convert:{tools}/convert/gguf-py:{ROOT}:{ROOT}/toolchain",
        "WEIGHTSMITH_CPU_VARIANT": "x86-64-v3",
        "GPTQMODEL_CPU_WORKERS": "2",
        "HF_HUB_OFFLINE": "1",
    }
    began, cpu, peak = time.monotonic(), 0.0, 0
    with watched(made) as disk:
        for words in commands:
            process = subprocess.Popen(
                [str(word) for word in words],
                cwd=folder,
                env={**os.environ, **more},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                sys.exit(f"{words} ended with {process.returncode}")
            cpu += usage.ru_utime + usage.ru_stime
            peak = max(peak, usage.ru_maxrss)
    return time.monotonic() - began, cpu, peak / 1024, disk[0] / 1e6


def compare(
    name: str, model: Path, ways: list[str], rounds: int, imatrix: str, adapter: Path | None = None
) -> None:
    """Print the medians of the ways: our jobs, the tools by hand, and their start."""
    builder = of_format(name).builder
    found: dict[str, list[tuple[float, ...]]] = {way: [] for way in ways}
    for _ in range(rounds):
        shutil.rmtree(WORK, ignore_errors=True)
        for way in found:
            (WORK / way).mkdir(parents=True)
        ours = [sys.executable, "-c", OURS, model, WORK / "ours", name, imatrix]
        if adapter:
            ours = [*ours[:2], MERGED, *ours[3:], adapter]
        commands = {
            "ours": [ours],
            "by hand": by_hand(name, model, WORK / "by hand", imatrix, adapter)
            if "by hand" in found
            else [],
            "start": [[python_of(builder), "-c", START[builder]]],
        }
        for way, rows in found.items():
            at = ROOT if way == "ours" else WORK / way
            rows.append(timed(commands[way], at, WORK / way))
    median = {
        way: [statistics.median(column) for column in zip(*rows, strict=True)]
        for way, rows in found.items()
    }
    for way, (wall, cpu, peak, disk) in median.items():
        ratio = f"{cpu / median['by hand'][1]:.2f}" if "by hand" in median else "-"
        cells = (name, way, f"{wall:.1f}", f"{cpu:.1f}", ratio, f"{peak:.0f}", f"{disk:.1f}")
        print(f"| {' | '.join(cells)} |", flush=True)


def billion(tokenizer: Path, folder: Path, shape: Shape = BILLION) -> Path:
    """Make random weights with tied embeddings for a tokenizer, once; return their folder."""
    if folder.exists():
        return folder
    vocabulary = json.loads((tokenizer / "config.json").read_text())["vocab_size"]
    make_base(folder, replace(shape, vocabulary=vocabulary))
    config = json.loads((folder / "config.json").read_text())
    more = {"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(config | more))
    index = folder / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    last = folder / places.pop("lm_head.weight")
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    save_file({"model.norm.weight": np.ones(shape.hidden, ml_dtypes.bfloat16)}, last)
    for name in TOKENIZER:
        shutil.copy(tokenizer / name, folder)
    return folder


def main() -> None:
    """Compare each format, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?", default=ROOT / "examples" / "tiny" / "base")
    parser.add_argument("--formats", default="q4_k_m,gptq,fp8-static")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--imatrix", default="auto", metavar="auto|off|FILE")
    parser.add_argument("--billion", action="store_true")
    parser.add_argument("--lora", type=int, metavar="RANK")
    parser.add_argument("--only", default="ours,by hand,start", help="ways, separated by commas")
    asked = parser.parse_args()
    model = asked.model.absolute()
    if asked.billion:
        model = billion(model, WORK.with_name("billion"))
    adapter = WORK.with_name(f"billion-lora-{asked.lora}") if asked.lora else None
    if adapter and not adapter.exists():
        shapes.RANK = asked.lora
        make_adapter(adapter, BILLION, "LORA")
    headings = ("format", "way", "wall s", "CPU s", "of by hand", "peak MiB", "peak disk MB")
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    for name in asked.formats.split(","):
        compare(name, model, asked.only.split(","), asked.rounds, asked.imatrix, adapter)
    shutil.rmtree(WORK, ignore_errors=True)


if __name__ == "__main__":
    main()
