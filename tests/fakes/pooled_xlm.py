"""A small XLM-RoBERTa that scores pairs, trained as those of `pooled_models`.

    PYTHONPATH=. python tests/fakes/pooled_xlm.py FOLDER

llama.cpp scores no pairs of a BERT as transformers does. The vocabulary is as transformers writes
it of SentencePiece's: tokenizer.json alone, without a map of characters.
"""

import sys
from pathlib import Path
from typing import Any

from tests.fakes import pooled_models, training

WORDS = [
    *pooled_models.FILLERS,
    *(word for subject in pooled_models.SUBJECTS for side in (0, 1)
      for word in pooled_models.words(subject, side)),
]  # fmt: skip


def made(cache: Path) -> Path:
    """Return a folder with `base` and `adapter`, trained once for the pins."""
    sources = [Path(__file__), Path(pooled_models.__file__)]
    root = sources[0].parents[2]
    return training.trained("pooled-xlm", cache, sources, lambda _: [], root, root / "toolchain")


def _train(out: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import XLMRobertaConfig, XLMRobertaForSequenceClassification

    from tests.fakes.encoders import unigrams

    base, headed = out / "base", XLMRobertaForSequenceClassification
    tokenizer = unigrams(WORDS)
    sizes: dict[str, Any] = {**pooled_models.SIZES, "max_position_embeddings": 66}
    torch.manual_seed(pooled_models.SEED)
    config = XLMRobertaConfig(vocab_size=len(tokenizer), type_vocab_size=1, num_labels=1, **sizes)
    model = headed(config)
    pooled_models._learn(model, "rerank", tokenizer, rate=3e-4)
    model.roberta.save_pretrained(base)
    tokenizer.save_pretrained(base)
    torch.manual_seed(pooled_models.SEED)
    adapted = get_peft_model(
        headed.from_pretrained(base, dtype=torch.float32, num_labels=1),
        LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=32,
                   target_modules=["query", "key", "value", "dense"],
                   exclude_modules=["pooler.dense", "classifier.dense"]),
    )  # fmt: skip
    pooled_models._learn(adapted, "rerank", tokenizer, rate=2e-3)
    adapted.save_pretrained(out / "adapter")


if __name__ == "__main__":
    _train(Path(sys.argv[1]))
