"""A small Qwen 3 that scores pairs by the logits of two tokens, in sentence-transformers' files."""

import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tests.fakes.encoders import TEXTS

SYSTEM = "Say whether the document answers the query."
TEMPLATE = """Judge: {{ messages | selectattr("role", "eq", "system") | map(attribute="content") | first }}
Query: {{ messages | selectattr("role", "eq", "query") | map(attribute="content") | first }}
Document: {{ messages | selectattr("role", "eq", "document") | map(attribute="content") | first }}
{% if add_generation_prompt %}Answer:{% endif %}"""  # noqa: E501
SIZES = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
}  # fmt: skip


def _pieces() -> Any:
    """Return a tokenizer of pieces of bytes, as Qwen's."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    made.train_from_iterator([SYSTEM, *TEXTS, "Query: Document: Answer: true false"] * 2, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, pad_token=end)


def worded(query: str, document: str) -> str:
    """What the template makes of a pair."""
    return f"Judge: {SYSTEM}\nQuery: {query}\nDocument: {document}\nAnswer:"


def written(folder: Path, tied: bool = True) -> tuple[int, int]:
    """Write a base with random weights; return its true and its false token."""
    tokenizer = _pieces()
    torch.manual_seed(1)
    config = Qwen3Config(vocab_size=len(tokenizer), tie_word_embeddings=tied, **SIZES)
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.dim() > 1:
                weights.normal_(0, 0.2 if "embed" in name or "lm_head" in name else 0.04)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Words that the converter would not look for.
    tokens = tuple(tokenizer.encode(word, add_special_tokens=False)[0] for word in ("d", "f"))
    (folder / "1_LogitScore").mkdir()
    kinds = ("base.modules.transformer.Transformer", "cross_encoder.modules.logit_score.LogitScore")
    files: dict[str, Any] = {
        "modules.json": [
            {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.{kind}"}
            for n, (path, kind) in enumerate(zip(("", "1_LogitScore"), kinds, strict=True))
        ],
        "1_LogitScore/config.json": {"true_token_id": tokens[0], "false_token_id": tokens[1]},
        "config_sentence_transformers.json": {
            "model_type": "CrossEncoder", "prompts": {"web": SYSTEM}, "default_prompt_name": "web",
            "activation_fn": "torch.nn.modules.linear.Identity",
        },
        "sentence_bert_config.json": {
            "transformer_task": "text-generation",
            "module_output_name": "causal_logits",
            "modality_config": {
                "text": {"method": "forward", "method_output_name": "logits"},
                "message": {
                    "method": "forward", "method_output_name": "logits", "format": "flat"
                },
            },
            "processing_kwargs": {"chat_template": {"add_generation_prompt": True}},
        },
    }  # fmt: skip
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return tokens[0], tokens[1]


def adapted(base: Path, folder: Path) -> Any:
    """Write an adapter with random weights; return the unmerged model."""
    model = get_peft_model(
        Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(
            task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "up_proj"]
        ),
    )
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "lora_" in name:
                weights.normal_(0, 0.1, generator=draw)
    model.save_pretrained(folder)
    return model.eval()


@torch.inference_mode()
def scores(model: Any, base: Path, query: str, documents: list[str]) -> list[float]:
    """Return the logit of the true token less the false one's, of each document alone."""
    settings = json.loads((base / "1_LogitScore" / "config.json").read_text())
    tokenizer, found = AutoTokenizer.from_pretrained(base), []
    for document in documents:
        ids = tokenizer(worded(query, document), add_special_tokens=False, return_tensors="pt")
        logits = model(**ids).logits[0, -1]
        found.append(float(logits[settings["true_token_id"]] - logits[settings["false_token_id"]]))
    return found
