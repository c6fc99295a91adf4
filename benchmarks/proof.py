"""Reference answers, validation and quality gate, each compared with the same done by hand.

"reference and validation" is what a build runs: both in one process.

    python benchmarks/proof.py [--folders BASE ADAPTER MERGED] [--questions FILE] [--limit 33]
        [--only NAME,…] [--merged-dtype bfloat16|float32] [--work benchmarks/work]

Without folders, the model is a synthetic Llama with 1.07 billion weights in bfloat16 and an adapter
of rank 16 on every linear layer, merged here. With random weights, answers have near ties, at which
a merged model in bfloat16 leaves the adapter's text; in float32 it hardly ever does. By hand means
transformers and PEFT with whole models in float32: the questions in one batch to base, adapter and
merged model; logits of the same probes with and without merging, and every tensor against
`merge_and_unload`; the held-out text through the checkpoint and its copy rounded to int8. Every way
runs in its own process, ours with our kernels, as a job does. Memory is the largest anonymous
memory seen every 20 ms; pages of mapped files do not count, as the kernel may drop them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import merge as shapes
from validate import make_merged

ROOT = shapes.ROOT
EXAMPLE = ROOT / "examples" / "support-bot"
COMMON = """
import json, os, sys
from pathlib import Path
from weightsmith.forward.libraries import import_for_good
from weightsmith.merging.libc import keep_freed_memory
keep_freed_memory(192 << 20)  # as in a job
import_for_good("peft")
import torch
base, adapter, merged = map(Path, sys.argv[1:4])
rows = [json.loads(line) for line in open(sys.argv[4])][: int(sys.argv[5])]
chats = [[{"role": "user", "content": row["prompt"]}] for row in rows]
texts = [json.loads(line) for line in open(sys.argv[6])][-12:]
"""
ROUNDED = """
import numpy as np
from weightsmith.quantizers.rounding import round_rows
from weightsmith.quantizers.schemes import SCHEMES
from weightsmith.models.tensors import CheckpointTensors
class View(CheckpointTensors):
    def tensor(self, name):
        return self._rounded(name, self.f32(name))
    def rows(self, name, start, stop):
        return self._rounded(name, self.part(name, (slice(start, stop),)))
    def kind(self, name):
        return ""
    def _rounded(self, name, data):
        if "layers" not in name or data.ndim != 2:
            return data
        codes, scales = round_rows(data, SCHEMES["w8a8"])
        return codes * scales.astype(np.float32)
"""
HAND = """
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import PeftModel
torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
tokenizer = AutoTokenizer.from_pretrained(merged, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
def tokens(chats, **more):
    return tokenizer.apply_chat_template(chats, add_generation_prompt=True, padding=True,
                                         return_tensors="pt", return_dict=True, **more)
"""
WAYS = {
    "reference": """
from weightsmith.merging.reference import UnmergedModel, answers
both = ((adapter, 1.0),)
answers({"base": UnmergedModel(model=base), "adapter": UnmergedModel(model=base, adapters=both),
         "merged": UnmergedModel(model=merged, draft="adapter")}, chats, 32)
""",
    "reference by hand": HAND
    + """
def ask(model):
    model.generate(**tokens(chats), max_new_tokens=32, do_sample=False)
with torch.inference_mode():
    model = load(base)
    ask(model)
    model = PeftModel.from_pretrained(model, adapter).eval()
    ask(model)
    del model
    ask(load(merged))
""",
    "validation": """
from weightsmith.validating.validate import ValidationRequest, validate
found = validate(ValidationRequest(base=base, adapters=((adapter, 1.0),), merged=merged,
                                   items=tuple(chats)))
assert found.passed, found.findings
""",
    "reference and validation": """
import tempfile
from weightsmith.core.jobs import Input
from weightsmith.core.jobs import (AskedModel, AskedTask, AskedWalk, ProofJob, Question,
                                   ReferenceJob,
                              ValidateJob)
from weightsmith.worker.jobs import STAGES
inputs = [Input(path=path) for path in (base, adapter, merged)]
folder = tempfile.TemporaryDirectory()
envelope = {"builder": "merge", "output": Path(folder.name), "seconds": 0}
models = (AskedModel(name="base", key="base", model=0),
          AskedModel(name="adapter", key="adapter", model=0, adapters=(0,), weights=(1.0,)),
          AskedModel(name="merged", key="merged", model=1, draft="adapter"))
task = AskedTask(models=models, max_tokens=32,
                 questions=tuple(Question(messages=tuple(chat)) for chat in chats))
job = ProofJob(**envelope,
    reference=ReferenceJob(**envelope, models=(inputs[0], inputs[2]), adapters=(inputs[1],),
        walks=(AskedWalk(tasks=(task,), choose=False),)),
    validation=ValidateJob(**envelope, base=inputs[0], merged=inputs[2], adapters=(inputs[1],),
        weights=(1.0,), chats=tuple(map(tuple, chats)), scope="all", mixture=None))
found = STAGES["proof"](job, lambda *_: None)
assert found["validation"]["passed"], found["validation"]["findings"]
""",
    "validation by hand": HAND
    + """
with torch.inference_mode():
    asked = tokens(chats[::max(1, len(chats) // 8)][:8])
    tuned = PeftModel.from_pretrained(load(base), adapter).eval()
    there = load(merged)
    made = there.generate(**asked, max_new_tokens=16, do_sample=False)
    logits = [model(input_ids=made).logits for model in (tuned, there)]
    assert (logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean() > 0.5
    exact, found = tuned.merge_and_unload().state_dict(), there.state_dict()
    assert all(torch.allclose(exact[n], found[n], rtol=2**-7, atol=1e-5) for n in exact)
""",
    "gate": ROUNDED
    + """
from weightsmith.quantizers.quality.measure import measure
measure(merged, View(merged), texts, 1024, lambda done, total: None)
""",
    "gate by hand": HAND
    + ROUNDED
    + """
with torch.inference_mode():
    right, other = load(merged), load(merged)
    view = View(merged)
    for name, parameter in other.named_parameters():
        parameter.copy_(torch.from_numpy(view.tensor(name).copy()))
    for text in texts:
        ids = tokenizer.apply_chat_template(text["messages"], return_tensors="pt",
                                            return_dict=True)["input_ids"]
        p, q = (model(input_ids=ids).logits[0].log_softmax(-1) for model in (right, other))
        (p.exp() * (p - q)).sum(-1).mean()
""",
}
BILLION = replace(shapes.SMALL, layers=16, inner=8192, key_heads=8, vocabulary=49152)
"""1.07 billion weights with the head."""


def make_inputs(work: Path, dtype: str) -> tuple[Path, Path, Path]:
    """Make base, adapter and merged model once."""
    names = "base", "adapter", "merged" if dtype == "bfloat16" else f"merged-{dtype}"
    base, adapter, merged = (work / f"proof-{name}" for name in names)
    shapes.RANK = 16
    if not (base / "config.json").exists():
        shapes.make_base(base, BILLION)
    if not (adapter / "adapter_config.json").exists():
        shapes.make_adapter(adapter, BILLION, "LORA")
    make_merged(base, adapter, merged, dtype)
    return base, adapter, merged


def run(argv: list[str]) -> dict[str, float]:
    """Run a process; return its CPU and wall seconds and its peak anonymous MiB."""
    paths = os.pathsep.join([str(ROOT / "toolchain"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"} | shapes.kernels()
    began, peak = time.monotonic(), 0
    quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
    pid = os.posix_spawnp(argv[0], argv, environment, file_actions=quiet)
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        lines = Path(f"/proc/{pid}/status").read_text("utf-8").splitlines()
        held = (int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        peak = max(peak, *held, 0)
        time.sleep(0.02)
    if status:
        sys.exit(f"failed with status {status}: {argv[3:]}")
    cpu = usage.ru_utime + usage.ru_stime
    return {"cpu": cpu, "wall": time.monotonic() - began, "MiB": peak / 1024}


def main() -> None:
    """Run all ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folders", nargs=3, type=Path, metavar=("BASE", "ADAPTER", "MERGED"))
    parser.add_argument("--questions", type=Path, default=EXAMPLE / "eval.jsonl")
    parser.add_argument("--limit", type=int, default=33)
    parser.add_argument("--only", default="", help="comma-separated ways to run")
    parser.add_argument("--merged-dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "work")
    parser.add_argument("--make", action="store_true", help="make the inputs, run nothing")
    options = parser.parse_args()
    if options.make:
        make_inputs(options.work, options.merged_dtype)
        return
    if not options.folders:  # in its own process: a child's peak memory starts at its parent's
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--make"], check=True)
    folders = options.folders or make_inputs(options.work, options.merged_dtype)
    words = [*folders, options.questions, options.limit, EXAMPLE / "calibration.jsonl"]
    loads = " ".join(f"{load:.1f}" for load in os.getloadavg())
    print(f"{os.cpu_count()} CPUs, load {loads}, {options.limit} questions\n", flush=True)
    print("| way | CPU s | wall s | peak anonymous MiB |\n|---|---|---|---|")
    for name, code in WAYS.items():
        if not options.only or name in options.only.split(","):
            argv = [sys.executable, "-W", "ignore", "-c", COMMON + code, *map(str, words)]
            cost = run(argv)
            cells = f"{cost['cpu']:.1f} | {cost['wall']:.1f} | {cost['MiB']:.0f}"
            print(f"| {name} | {cells} |", flush=True)
    print(json.dumps({"loads": os.getloadavg()}), file=sys.stderr)


if __name__ == "__main__":
    main()
