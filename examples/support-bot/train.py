"""Trains this example's LoRA adapter on a CPU: python train.py --base DIR."""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

HERE = Path(__file__).parent
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = LoraConfig(
    task_type="CAUSAL_LM",
    r=8,
    lora_alpha=16,
    lora_dropout=0.0,
    target_modules=PROJECTIONS,
    layers_to_transform=list(range(12, 30)),
)
EPOCHS, BATCH, LEARNING_RATE, SEED = 5, 8, 1.5e-3, 20261125

Example = tuple[list[int], list[int]]


def main() -> None:
    """Train, save, and say where."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--base", type=Path, required=True, help="the base checkpoint's folder")
    arguments.add_argument("--out", type=Path, default=HERE / "adapters" / "support-v1")
    options = arguments.parse_args()
    make_repeatable()
    tokenizer = AutoTokenizer.from_pretrained(options.base)
    base = AutoModelForCausalLM.from_pretrained(options.base, dtype=torch.bfloat16)
    model = get_peft_model(base, LORA)
    train(model, read_examples(HERE / "train.jsonl", tokenizer), tokenizer.pad_token_id)
    save(model, options.out)
    print(f"adapter written to {options.out}")


def make_repeatable() -> None:
    """One thread and one seed: a second run on the same machine writes the same bytes."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)


def read_examples(path: Path, tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Turn each conversation into prompt and answer tokens, by the template it is served with."""
    examples = []
    for line in path.read_text().splitlines():
        question, answer = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(
            [question], tokenize=False, add_generation_prompt=True
        )
        examples.append(
            (
                tokenizer.encode(prompt, add_special_tokens=False),
                tokenizer.encode(answer["content"] + tokenizer.eos_token, add_special_tokens=False),
            )
        )
    return examples


def train(model: PeftModel, examples: list[Example], pad: int) -> None:
    """Teach the answers, batch by batch, with a short warm-up and a cosine decay."""
    order = random.Random(SEED)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0)
    total = EPOCHS * math.ceil(len(examples) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / 10, 0.5 + 0.5 * math.cos(math.pi * step / total)),
    )
    for epoch in range(EPOCHS):
        shuffled = order.sample(examples, len(examples))
        losses = []
        for start in range(0, len(shuffled), BATCH):
            loss = answer_loss(model, shuffled[start : start + BATCH], pad)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}/{EPOCHS}: loss {sum(losses) / len(losses):.4f}", flush=True)


def answer_loss(model: PeftModel, batch: list[Example], pad: int) -> torch.Tensor:
    """Cross-entropy over the answers alone; the output layer runs only where an answer is read."""
    longest = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids = torch.full((len(batch), longest), pad)
    mask = torch.zeros_like(ids)
    reads = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(batch):
        length = len(prompt) + len(answer)
        ids[row, :length] = torch.tensor(prompt + answer)
        mask[row, :length] = 1
        reads[row, len(prompt) - 1 : length - 1] = True
    llama = model.get_base_model()
    hidden = llama.model(input_ids=ids, attention_mask=mask).last_hidden_state
    wanted = ids.roll(-1, dims=1)[reads]
    return torch.nn.functional.cross_entropy(llama.lm_head(hidden[reads]).float(), wanted)


def save(model: PeftModel, out: Path) -> None:
    """Write the adapter without anything of this machine in it."""
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    config = json.loads((out / "adapter_config.json").read_text())
    config["target_modules"] = PROJECTIONS
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    for file in out.iterdir():
        file.chmod(0o644)


if __name__ == "__main__":
    main()
