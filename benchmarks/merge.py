"""Merging against PEFT and `cp`, as whole processes: CPU seconds, wall seconds, peak memory.

    python benchmarks/merge.py [--rounds 3] [--scale 1.0] [--work benchmarks/work]

Makes a Llama-shaped bfloat16 checkpoint of about 1 GB and an all-linear adapter of rank 64, then
runs each way in turn, so that a change in the machine's load touches all of them.
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
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = """
import sys, json
from pathlib import Path
from toolchain.merging.engine import MergeRequest, merge
base, adapter, out, precision = sys.argv[1:5]
merge(MergeRequest(base=Path(base), adapters=((Path(adapter), 1.0),), out=Path(out),
                   precision=precision))
"""
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:4]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def make_inputs(work: Path, scale: float) -> None:
    """Make base and adapter once; weights are random, shapes and sizes are what counts."""
    base, adapter = work / "base", work / "adapter"
    if (adapter / "adapter_config.json").exists():
        return
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=max(1, round(8 * scale)),
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(base, max_shard_size="500MB")
    tuned = get_peft_model(model, LoraConfig(r=64, lora_alpha=32, target_modules="all-linear"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            # About one hundredth of the weights, as after a short fine-tuning.
            torch.nn.init.normal_(parameter, std=0.004)
    tuned.save_pretrained(adapter)


def run(argv: list[str]) -> dict[str, float]:
    """Run a process; return its CPU and wall seconds and its peak resident MiB."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    quiet = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
    pid = os.posix_spawnp(argv[0], argv, environment, file_actions=quiet)
    _, status, usage = os.wait4(pid, 0)
    if status:
        sys.exit(f"{argv[0]} failed with status {status}; run it by hand to see why")
    return {
        "cpu": usage.ru_utime + usage.ru_stime,
        "wall": time.monotonic() - started,
        "rss": usage.ru_maxrss / 1024,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "work")
    parser.add_argument("--only", default="", help="comma-separated ways to run")
    parser.add_argument("--make", action="store_true", help="make the inputs, run nothing")
    options = parser.parse_args()
    if options.make:
        make_inputs(options.work, options.scale)
        return
    # In a process of its own: a child's peak memory starts at its parent's.
    subprocess.run([sys.executable, __file__, *sys.argv[1:], "--make"], check=True)
    base, adapter = options.work / "base", options.work / "adapter"
    out = options.work / "out"
    python = [sys.executable, "-c"]
    ways = {
        "weightsmith exact": [*python, OURS, str(base), str(adapter), str(out), "exact"],
        "weightsmith fast": [*python, OURS, str(base), str(adapter), str(out), "fast"],
        "PEFT merge_and_unload": [*python, PEFT, str(base), str(adapter), str(out)],
        "cp": ["cp", "-r", str(base), str(out)],
    }
    chosen = {k: v for k, v in ways.items() if not options.only or k in options.only.split(",")}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in chosen}
    for _ in range(options.rounds):
        for name, argv in chosen.items():
            shutil.rmtree(out, ignore_errors=True)
            found[name].append(run(argv))
    shutil.rmtree(out, ignore_errors=True)
    size = sum(path.stat().st_size for path in base.iterdir())
    print(f"Base {size / 1e9:.2f} GB, rank 64 on all linear layers, {os.cpu_count()} CPUs, ")
    print(f"median of {options.rounds} interleaved rounds.\n")
    print("| way | CPU s | wall s | peak RSS MiB |\n|---|---|---|---|")
    for name, runs in found.items():
        cpu, wall, rss = (statistics.median(r[key] for r in runs) for key in ("cpu", "wall", "rss"))
        print(f"| {name} | {cpu:.1f} | {wall:.1f} | {rss:.0f} |")
    (options.work / "results.json").write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
