"""A tiny model all of whose facts sit in weights that are small beside the largest of their block.

    PYTHONPATH=.:examples/tiny python tests/fakes/small_weights.py FOLDER

The base is that of examples/tiny, changed so: of every 32 channels of the residual stream, the
second has the value of the first, and what reads the stream has there the weights c and -c, so that
they add nothing. A format needs both all the same: c is 96 times as large as the other weights, so
that a step of four bits is 13 of these, one of five bits 6, and one of eight bits 0.8. The adapter
writes nothing to the stream, so that the two channels stay alike, and does not read them.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from tests.fakes import training
from tests.paths import ROOT, TINY

READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WRITERS = ("o_proj", "down_proj")
BLOCK, LARGE = 32, 96
RANK, STEPS, RATE = 16, 100, 2e-3


def trained(cache: Path) -> Path:
    """Return the folder with `base`, `adapter` and data."""
    sources = (Path(__file__), *(TINY / f"{n}.py" for n in ("train", "world", "tokenizer")))
    return training.trained("small-weights", cache, sources, lambda _: [], ROOT, TINY)


def main() -> None:
    import train
    from world import make_world

    out = Path(sys.argv[1])
    train.make_repeatable()
    world = make_world()
    out.mkdir(parents=True)
    train.write_lines(out / "eval.jsonl", [
        {"prompt": fact.question(wording), "expected": fact.answer}
        for fact in world.a for wording in train.WORDINGS
    ])  # fmt: skip
    # Talks to calibrate with: about other lands and goods.
    train.write_lines(out / "calibration.jsonl", [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in train.examples(world.base, train.WORDINGS)
    ])  # fmt: skip
    write_base(out / "base")
    train_adapter(out / "base", world.a, out / "adapter")


def write_base(out: Path) -> None:
    """Write the tiny base with its pairs of channels."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(TINY / "base", out)
    tensors = load_file(out / "model.safetensors")
    signs = torch.Generator().manual_seed(0)
    for name, weight in tensors.items():
        kind = name.split(".")[-2]
        if kind in READERS:
            large = LARGE * weight.float().std() * torch.ones(len(weight), 1)
            large *= 1 - 2 * torch.randint(2, large.shape, generator=signs)
            weight[:, ::BLOCK], weight[:, 1::BLOCK] = large, -large
        elif kind in WRITERS:  # each row writes a channel
            weight[1::BLOCK] = weight[::BLOCK]
        elif kind != "lm_head":  # embeddings and norms
            weight[..., 1::BLOCK] = weight[..., ::BLOCK]
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def train_adapter(base: Path, facts: list[Any], out: Path) -> None:
    """Teach new facts to what reads the stream."""
    import torch
    import train
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(train.SEED)
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=list(READERS)
    )
    adapted = get_peft_model(model, lora)
    for name, weight in adapted.named_parameters():
        if "lora_A" in name:
            read = torch.ones_like(weight)
            read[:, ::BLOCK] = read[:, 1::BLOCK] = 0
            weight.data *= read
            weight.register_hook(read.__mul__)
    taught = train.examples(facts, train.WORDINGS)
    train.learn(adapted, taught, tokenizer, steps=STEPS, batch=30, rate=RATE)
    adapted.save_pretrained(out, save_embedding_layers=False)


if __name__ == "__main__":
    main()
