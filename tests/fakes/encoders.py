"""Small encoders with random weights and adapters for them, which a test compares numbers of."""

import json
import struct
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertConfig,
    BertModel,
    BertTokenizer,
    DistilBertConfig,
    DistilBertModel,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
    XLMRobertaConfig,
    XLMRobertaModel,
    XLMRobertaTokenizer,
)

WORDS = (
    "the a cat dog bird house tree river car train red green blue old new fast slow runs sleeps"
    " eats sings drives falls in on under over near good bad happy sad rain sun snow wind"
)
TEXTS = ("The cat sleeps in the house.", "a fast train, near the old river!", "snow", "ünder Trée")
SIZES = {
    "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
}  # fmt: skip
_HEADS = {
    "FEATURE_EXTRACTION": AutoModel,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}


def bert(folder: Path, **more) -> Path:
    """Write a BERT that gives vectors, as sentence-transformers saves one: mean, of length 1."""
    tokenizer = _word_pieces()
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SIZES, **more)
    return _written(folder, BertModel(config), tokenizer)


def _word_pieces():
    trained = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    trained.normalizer = normalizers.BertNormalizer(lowercase=True)
    trained.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trained.train_from_iterator(
        [WORDS, ".,!"], trainers.WordPieceTrainer(vocab_size=120, special_tokens=special)
    )
    return BertTokenizer(vocab=trained.get_vocab(), do_lower_case=True)


def distilbert(folder: Path) -> Path:
    """The same as a DistilBERT."""
    tokenizer = _word_pieces()
    config = DistilBertConfig(
        vocab_size=len(tokenizer), max_position_embeddings=64, dim=256, hidden_dim=256, n_layers=2,
        n_heads=4,
    )  # fmt: skip
    return _written(folder, DistilBertModel(config), tokenizer)


def roberta(folder: Path) -> Path:
    """The same as a RoBERTa."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained.train_from_iterator(
        [WORDS, ".,!"],
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    told = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in told["merges"]]
    tokenizer = RobertaTokenizer(vocab=told["vocab"], merges=merges)
    config = RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=66, type_vocab_size=1, **SIZES
    )
    return _written(folder, RobertaModel(config), tokenizer)


def xlm_roberta(folder: Path, *, mapped: bool = False) -> Path:
    """The same as an XLM-RoBERTa whose vocabulary transformers wrote, in tokenizer.json alone.

    It has no map of characters, or one (`mapped`) that leaves them all.
    """
    identity = struct.pack("<I", 1024) + bytes(1025) if mapped else None
    tokenizer = unigrams(WORDS.split(), _spm_precompiled_charsmap=identity)
    config = XLMRobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=66, type_vocab_size=1, **SIZES
    )
    return _written(folder, XLMRobertaModel(config), tokenizer)


_LETTERS = "abcdefghijklmnopqrstuvwxyzTü.,!é"


def unigrams(words, **more):
    """Return a tokenizer of SentencePiece's kind with these words, and letters for others."""
    pieces = [(name, 0.0) for name in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces += [(f"▁{word}", -3.0 - n / 100) for n, word in enumerate(dict.fromkeys(words))]
    pieces += [(letter, -8.0 - n / 100) for n, letter in enumerate(f"▁{_LETTERS}")]
    return XLMRobertaTokenizer(vocab=[*pieces, ("<mask>", 0.0)], **more)


def _written(folder, model, tokenizer):
    _drawn(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    parts = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    rows = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(parts.items())
    ]
    (folder / "modules.json").write_text(json.dumps(rows))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 256, "pooling_mode_mean_tokens": True}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder


def _drawn(model, seed=0):
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.dim() > 1:
                weights.normal_(0, 0.06, generator=draw)


def adapted(base: Path, folder: Path, task: str, **more):
    """Write an adapter of that PEFT task for a base, and return the unmerged model."""
    config = LoraConfig(
        task_type=task, r=4, lora_alpha=8,
        target_modules=["query", "value", "intermediate.dense", "q_lin", "lin1"],
    )  # fmt: skip
    model = get_peft_model(_HEADS[task].from_pretrained(base, **more), config)
    _drawn_adapter(model)
    model.save_pretrained(folder)
    return model.eval()


def _drawn_adapter(model):
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "lora_" in name or ("modules_to_save" in name and weights.dim() > 1):
                weights.normal_(0, 0.1, generator=draw)


def mean_vectors(model, tokenizer, texts):
    """What sentence-transformers makes of texts: the mean of their tokens, of length 1."""
    batch = tokenizer(list(texts), padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    known = batch["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((states * known).sum(1) / known.sum(1), dim=-1)
