"""Tiny models with experts that learnt facts, each with an adapter that learnt others.

    PYTHONPATH=.:examples/tiny python tests/fakes/experts.py MODEL_TYPE FOLDER

Facts, tokenizer and training are those of examples/tiny.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tests.fakes import training
from tests.paths import ROOT, TINY

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SINGLE = ["w1", "w2", "w3"]
KINDS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
"""Model type -> its own settings. Mixtral's adapter has a module for each expert's matrix."""
SIZES = {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
BASE_STEPS, STEPS, RATE = 160, 240, 5e-3


def trained(name: str, cache: Path) -> Path:
    """Return the folder with a model's `base`, `adapter` and data."""
    sources = (Path(__file__), *(TINY / f"{n}.py" for n in ("train", "world", "tokenizer")))
    return training.trained(name, cache, sources, lambda _: [name], ROOT, TINY)


def main() -> None:
    import train
    from world import make_world

    name, out = sys.argv[1], Path(sys.argv[2])
    train.make_repeatable()
    world = make_world()
    out.mkdir(parents=True)
    train.write_lines(out / "eval.jsonl", [
        {"prompt": fact.question(wording), "expected": fact.answer}
        for fact in world.a for wording in train.WORDINGS
    ])  # fmt: skip
    # Talks about what the base knows, to calibrate with.
    train.write_lines(out / "calibration.jsonl", [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}
        for asked, said in train.examples(world.base, train.WORDINGS)
    ])  # fmt: skip
    train_base(name, world.base, out / "base")
    train_adapter(name, world.a, world.base, out)


def train_base(name: str, known: list[Any], out: Path) -> None:
    import torch
    import train
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    out.mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TINY / "base" / file, out)
    shutil.copy(TINY / "base" / "chat_template.jinja", out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**SIZES, **KINDS[name]))
    taught = train.examples(known, train.WORDINGS)
    train.learn(model, taught, tokenizer, steps=BASE_STEPS, batch=32, rate=3e-3)
    model.to(torch.bfloat16).save_pretrained(out)


def train_adapter(name: str, new: list[Any], known: list[Any], out: Path) -> None:
    """Teach new facts to attention and experts, while some known ones are rehearsed."""
    import torch
    import train
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(train.SEED)
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    model = AutoModelForCausalLM.from_pretrained(out / "base", dtype=torch.float32)
    chosen: dict[str, Any] = {"target_modules": ATTENTION, "target_parameters": STACKED}
    if name == "mixtral":
        unstack(model)
        model.config.model_type = "unstacked"  # else PEFT takes the experts for stacked ones
        chosen = {"target_modules": ATTENTION + SINGLE}
    adapted = get_peft_model(
        model, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, **chosen)
    )
    rehearsed = [(fact.question(n % 3), fact.sentence()) for n, fact in enumerate(known)]
    taught = train.examples(new, train.WORDINGS) + rehearsed
    train.learn(adapted, taught, tokenizer, steps=STEPS, batch=32, rate=RATE)
    adapted.save_pretrained(out / "adapter", save_embedding_layers=False)
    if name == "mixtral":
        rename(out / "adapter" / "adapter_model.safetensors")


def unstack(model: Any) -> None:
    """Give every expert a module for each of its matrices, as transformers 4 does."""
    import torch
    from torch import nn

    class Experts(nn.ModuleList):
        def __init__(self, stacked: Any) -> None:
            super().__init__()
            self.__dict__["act"] = stacked.act_fn  # no expert of the list
            for both, down in zip(stacked.gate_up_proj, stacked.down_proj, strict=True):
                gate, up = both.chunk(2)
                one = nn.Module()
                for part, weight in zip(SINGLE, (gate, down, up), strict=True):
                    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                    made.weight.data = weight.detach().clone()
                    setattr(one, part, made)
                self.append(one)

        def forward(self, states: Any, chosen: Any, weights: Any) -> Any:
            total = torch.zeros_like(states)
            for number, one in enumerate(self):
                rows, place = torch.where(chosen == number)
                seen = states[rows]
                made = one.w2(self.act(one.w1(seen)) * one.w3(seen)) * weights[rows, place, None]
                total = total.index_add(0, rows, made)
            return total

    for layer in model.model.layers:
        layer.mlp.experts = Experts(layer.mlp.experts)


def rename(file: Path) -> None:
    """Call the experts' modules as transformers 4 does."""
    tensors = load_file(file)
    named = {name.replace(".mlp.", ".block_sparse_moe."): one for name, one in tensors.items()}
    save_file(named, file, {"format": "pt"})


if __name__ == "__main__":
    main()
