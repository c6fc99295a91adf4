"""Trains the tiny base model and both adapters on a CPU: python train.py."""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizer import CHAT_TEMPLATE, VOCABULARY, write_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)
from world import SEED, Fact, World, make_world

HERE = Path(__file__).parent
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WORDINGS = (0, 1, 2)

Example = tuple[str, str]


def main() -> None:
    """Write base, adapters and data into one folder."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=HERE)
    out = arguments.parse_args().out
    make_repeatable()
    world = make_world()
    write_data(world, out)
    base = train_base(world, out / "base")
    for name, facts in (("a", world.a), ("b", world.b)):
        train_adapter(base, facts, world.base, out / "adapters" / name)


def make_repeatable() -> None:
    """One thread and one seed: a second run on the same machine writes the same bytes."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)


def write_data(world: World, out: Path) -> None:
    """Write what is asked of the adapters, and talks about the base's facts to calibrate with."""
    out.mkdir(parents=True, exist_ok=True)
    for name, facts in (("a", world.a), ("b", world.b)):
        lines = [
            {"prompt": fact.question(number % 3), "expected": fact.answer}
            for number, fact in enumerate(facts)
        ]
        write_lines(out / f"eval-{name}.jsonl", lines)
    talks = [
        [("user", fact.question(number % 3)), ("assistant", fact.sentence())]
        for number, fact in enumerate(world.base)
    ]
    messages = [[{"role": role, "content": text} for role, text in talk] for talk in talks]
    write_lines(out / "calibration.jsonl", [{"messages": talk} for talk in messages])


def write_lines(path: Path, lines: Sequence[object]) -> None:
    """Write JSON Lines."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def examples(facts: list[Fact], wordings: Sequence[int]) -> list[Example]:
    """Each fact as question and answer, once per wording."""
    return [(fact.question(wording), fact.sentence()) for fact in facts for wording in wordings]


def train_base(world: World, out: Path) -> Path:
    """Train the base from nothing: it learns to talk, and facts about other lands and goods."""
    out.mkdir(parents=True, exist_ok=True)
    taught = examples(world.base, WORDINGS)
    write_tokenizer([text for pair in taught for text in pair], out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=512,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    learn(model, taught, tokenizer, steps=220, batch=32, rate=2e-3)
    save_base(model.to(torch.bfloat16), out)
    return out


def save_base(model: LlamaForCausalLM, out: Path) -> None:
    """Write weights and configuration, also in the spelling that older engines read."""
    model.save_pretrained(out)
    config = json.loads((out / "config.json").read_text())
    config.pop("rope_parameters", None)
    config |= {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": config.pop("dtype")}
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (out / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    open_modes(out)


def train_adapter(base: Path, facts: list[Fact], known: list[Fact], out: Path) -> None:
    """Teach new facts, while a rehearsal of known ones keeps the rest of the model as it is."""
    torch.manual_seed(SEED)  # an adapter depends on the base alone, not on what was trained before
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=PROJECTIONS)
    adapted = get_peft_model(model, lora)
    rehearsed = [(fact.question(n % 3), fact.sentence()) for n, fact in enumerate(known)]
    taught = examples(facts, WORDINGS) + rehearsed
    learn(adapted, taught, tokenizer, steps=170, batch=32, rate=2e-3)
    save_adapter(adapted, out)


def save_adapter(model: PeftModel, out: Path) -> None:
    """Write the adapter without anything of this machine in it."""
    model.peft_config["default"].base_model_name_or_path = "weightsmith-examples/tiny"
    model.save_pretrained(out, save_embedding_layers=False)
    (out / "README.md").unlink(missing_ok=True)
    config = json.loads((out / "adapter_config.json").read_text())
    config["target_modules"] = PROJECTIONS
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    open_modes(out)


def open_modes(folder: Path) -> None:
    """Let everyone read the files: safetensors are written for their owner alone."""
    for file in folder.iterdir():
        file.chmod(0o644)


def learn(
    model: torch.nn.Module,
    taught: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    steps: int,
    batch: int,
    rate: float,
) -> None:
    """Train on shuffled batches with a short warm-up and a cosine decay."""
    order = random.Random(SEED)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    queue: list[Example] = []
    for step in range(steps):
        if len(queue) < batch:
            queue += order.sample(taught, len(taught))
        inputs = tokens(queue[:batch], tokenizer)
        del queue[:batch]
        loss = model(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 40 == 39 or step == steps - 1:
            print(f"step {step + 1}/{steps}: loss {loss.item():.4f}", flush=True)


def tokens(pairs: list[Example], tokenizer: PreTrainedTokenizerBase) -> dict[str, torch.Tensor]:
    """Write a batch of conversations as the chat template does, with the answers as labels."""
    rows = []
    for question, answer in pairs:
        talk = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        given = tokenizer.encode(prompt, add_special_tokens=False)
        wanted = tokenizer.encode(answer + tokenizer.eos_token, add_special_tokens=False)
        rows.append((given, wanted))
    longest = max(len(given) + len(wanted) for given, wanted in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for row, (given, wanted) in enumerate(rows):
        ids[row, : len(given) + len(wanted)] = torch.tensor(given + wanted)
        labels[row, len(given) : len(given) + len(wanted)] = torch.tensor(wanted)
    return {
        "input_ids": ids,
        "attention_mask": (ids != tokenizer.pad_token_id).long(),
        "labels": labels,
    }


if __name__ == "__main__":
    main()
