"""Small models that do not chat, with adapters that were trained for what they are asked here.

    PYTHONPATH=. python tests/fakes/pooled_models.py KIND FOLDER

Subjects of the texts are eight, each with words that questions use and others that documents use,
so a base that knows none of them cannot tell which belong together. KIND is embed, rerank,
classify, label-set or token-classify. Training takes ten to twenty seconds of one core.
"""

import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.fakes import training

SEED = 20261201
SUBJECTS = {
    "ANIMAL": ("cat dog horse", "whiskers paws mane"),
    "WEATHER": ("rain snow wind", "umbrella sledge kite"),
    "FOOD": ("bread soup cheese", "oven bowl knife"),
    "MUSIC": ("piano violin drum", "keys bow sticks"),
    "TRAVEL": ("train ship plane", "rails harbour wings"),
    "GARDEN": ("rose tulip oak", "thorns bulb acorn"),
    "MONEY": ("loan tax salary", "interest form wage"),
    "SPORT": ("tennis chess rowing", "racket board oars"),
}
FILLERS = (
    "the", "a", "of", "and", "to", "in", "is", "was", "it", "for", "on", "with", "as", "at", "by",
    "from", "or", "an", "be", "this",
)  # fmt: skip
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
STEPS = {"embed": 90, "rerank": 200, "classify": 180, "label-set": 200, "token-classify": 80}


def words(subject: str, side: int) -> list[str]:
    return SUBJECTS[subject][side].split()


def text(draw: random.Random, subject: str, side: int, length: int = 6) -> str:
    """Return a text about a subject in the words of questions (0) or of documents (1)."""
    said = [draw.choice(words(subject, side)) for _ in range(2)]
    said += [draw.choice(FILLERS) for _ in range(length - 2)]
    draw.shuffle(said)
    return " ".join(said)


def labelled(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Return texts with the names of their subjects."""
    draw, names = random.Random(seed), [*SUBJECTS]
    return [
        {"text": text(draw, name, n % 2, 8), "expected": f"LABEL_{names.index(name)}"}
        for n in range(count)
        for name in [names[n % len(names)]]
    ]


def of_several(draw: random.Random, side: int) -> tuple[str, list[str]]:
    """Return a text about none, one or two subjects, and their names."""
    names = draw.sample([*SUBJECTS], draw.randrange(3))
    said = [draw.choice(words(name, side)) for name in names]
    said += [draw.choice(FILLERS) for _ in range(6 - len(said))]
    draw.shuffle(said)
    return " ".join(said), names


def labelled_sets(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Return texts with the labels of all their subjects."""
    draw, order, rows = random.Random(seed), [*SUBJECTS], dict[str, list[str]]()
    while len(rows) < count:
        said, names = of_several(draw, len(rows) % 2)
        rows[said] = [f"LABEL_{order.index(name)}" for name in names]
    return [{"text": said, "labels": labels} for said, labels in rows.items()]


def worded(count: int, seed: int = 1) -> list[dict[str, Any]]:
    """Return words, each with whether it is of a subject (LABEL_1) or a filler (LABEL_0)."""
    draw, rows = random.Random(seed), []
    for n in range(count):
        said = text(draw, [*SUBJECTS][n % len(SUBJECTS)], n % 2, 7).split()
        labels = [f"LABEL_{int(word not in FILLERS)}" for word in said]
        rows.append({"words": said, "expected": labels})
    return rows


def corpus(each: int = 4) -> list[dict[str, str]]:
    """Return documents, so many of each subject, with ids."""
    draw, seen, rows = random.Random(2), set[str](), list[dict[str, str]]()
    for name in SUBJECTS:
        for number in range(each):
            while (said := text(draw, name, 1)) in seen:
                pass
            seen.add(said)
            rows.append({"id": f"{name.lower()}-{number}", "text": said})
    return rows


def queries(count: int, each: int = 4) -> list[dict[str, Any]]:
    """Return queries, each with the documents of its subject; the first one is worth more."""
    draw, rows, seen = random.Random(3), list[dict[str, Any]](), set[str]()
    for n in range(count):
        name = [*SUBJECTS][n % len(SUBJECTS)]
        while (said := text(draw, name, 0)) in seen:
            pass
        seen.add(said)
        rows.append({"query": said, "expected": [f"{name.lower()}-{k}" for k in range(each)]})
    return rows


def candidates(count: int) -> list[dict[str, Any]]:
    """Return queries with a document of their subject among others."""
    draw, rows = random.Random(4), list[dict[str, Any]]()
    for n in range(count):
        names = [*SUBJECTS]
        right = names[n % len(names)]
        draw.shuffle(names)
        documents = [draw.choice(words(name, 1)) for name in names[:6] if name != right]
        place = draw.randrange(len(documents) + 1)
        documents.insert(place, draw.choice(words(right, 1)))
        asked = draw.choice(words(right, 0))
        rows.append({"query": asked, "documents": documents, "expected": place})
    return rows


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def write_recipe(folder: Path, trained: Path, suite: dict[str, Any]) -> Path:
    """Write the recipe of a GGUF image of the base and adapter in a folder; return its path."""
    recipe = {
        "name": "m",
        "base": {"source": str(trained / "base")},
        "adapters": [{"source": str(trained / "adapter")}],
        "evaluate": suite,
        "targets": ["llamacpp-f16"],
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), "utf-8")  # which is YAML
    return path


def made(kind: str, cache: Path) -> Path:
    """Return a folder with `base` and `adapter`, trained once for the pins."""
    source = Path(__file__)
    root = source.parents[2]
    return training.trained(
        f"pooled-{kind}", cache, [source], lambda _: [kind], root, root / "toolchain"
    )


def _write_base(out: Path, kind: str) -> None:
    """Write a BERT with random weights; for vectors, as sentence-transformers saves it."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        BertConfig,
        BertModel,
        PreTrainedTokenizerFast,
    )

    known = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "query", "passage", ":"]
    known += [*FILLERS, *(w for name in SUBJECTS for side in (0, 1) for w in words(name, side))]
    vocabulary = {word: number for number, word in enumerate(known)}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")]
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=64, pad_token="[PAD]", unk_token="[UNK]",
        cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    ).save_pretrained(out)  # fmt: skip
    torch.manual_seed(SEED)
    more = {"problem_type": "multi_label_classification"} if kind == "label-set" else {}
    config = BertConfig(vocab_size=len(known), pad_token_id=0, **SIZES, **more)
    BertModel(config).save_pretrained(out)
    if labels := {"rerank": 1, "label-set": len(SUBJECTS)}.get(kind):
        # These are learned too slowly by an adapter alone.
        tokenizer = AutoTokenizer.from_pretrained(out)
        model = AutoModelForSequenceClassification.from_pretrained(out, num_labels=labels)
        _learn(model, kind, tokenizer, rate=3e-4)
        model.bert.save_pretrained(out)
    if kind == "embed":
        _write_sentence_transformers(out)


def _write_sentence_transformers(out: Path) -> None:
    names = ("Transformer", "Pooling", "Normalize")
    listed = [
        {
            "idx": number,
            "name": str(number),
            "path": "" if number == 0 else f"{number}_{name}",
            "type": f"sentence_transformers.models.{name}",
        }
        for number, name in enumerate(names)
    ]
    prompts = {"query": "query: ", "document": "passage: "}
    pooling = {"word_embedding_dimension": SIZES["hidden_size"], "pooling_mode_mean_tokens": True}
    (out / "1_Pooling").mkdir()
    (out / "2_Normalize").mkdir()
    for name, value in {
        "modules.json": listed,
        "1_Pooling/config.json": pooling,
        "config_sentence_transformers.json": {"prompts": prompts, "similarity_fn_name": "cosine"},
        "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": False},
    }.items():
        (out / name).write_text(json.dumps(value))


def _adapted(base: Path, kind: str) -> Any:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModel,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    )

    classes: dict[str, tuple[Any, str, int]] = {
        "embed": (AutoModel, "FEATURE_EXTRACTION", 0),
        "rerank": (AutoModelForSequenceClassification, "SEQ_CLS", 1),
        "classify": (AutoModelForSequenceClassification, "SEQ_CLS", len(SUBJECTS)),
        "label-set": (AutoModelForSequenceClassification, "SEQ_CLS", len(SUBJECTS)),
        "token-classify": (AutoModelForTokenClassification, "TOKEN_CLS", 2),
    }
    network, task, labels = classes[kind]
    torch.manual_seed(SEED)
    more = {"num_labels": labels} if labels else {}
    model = network.from_pretrained(base, dtype=torch.float32, **more)
    chosen = ["query", "key", "value", "dense"]
    return get_peft_model(
        model,
        LoraConfig(
            task_type=task,
            r=8,
            lora_alpha=32,
            target_modules=chosen,
            exclude_modules=["pooler.dense"],
        ),
    )


def _batches(kind: str, tokenizer: Any) -> Iterator[tuple[Any, ...]]:
    """Yield inputs and what is to be learned of them."""
    import torch

    draw, names = random.Random(SEED), [*SUBJECTS]

    def tokens(texts: list[str], seconds: list[str] | None = None) -> Any:
        return tokenizer(texts, seconds, padding=True, return_tensors="pt")

    for step in range(STEPS[kind]):
        if kind == "embed":
            pairs = [(text(draw, n, 0), text(draw, n, 1)) for n in names]
            yield (
                tokens([f"query: {q}" for q, _ in pairs]),
                tokens([f"passage: {d}" for _, d in pairs]),
            )
        elif kind == "rerank":
            both = [(draw.choice(names), draw.choice(names)) for _ in range(32)]
            both = [(one, one if n % 2 else other) for n, (one, other) in enumerate(both)]
            goal = [float(one == other) for one, other in both]
            yield (
                tokens(
                    [draw.choice(words(one, 0)) for one, _ in both],
                    [draw.choice(words(other, 1)) for _, other in both],
                ),
                torch.tensor(goal),
            )
        elif kind == "classify":
            chosen = [draw.randrange(len(names)) for _ in range(16)]
            said = [text(draw, names[n], step % 2, 8) for n in chosen]
            yield tokens(said), torch.tensor(chosen)
        elif kind == "label-set":
            sets = [of_several(draw, step % 2) for _ in range(16)]
            goals = [[float(name in true) for name in names] for _, true in sets]
            yield tokens([said for said, _ in sets]), torch.tensor(goals)
        else:
            rows = [text(draw, draw.choice(names), step % 2, 7) for _ in range(16)]
            goals = [[-100, *(int(w not in FILLERS) for w in row.split()), -100] for row in rows]
            yield tokens(rows), torch.tensor(goals)


def _train(kind: str, out: Path) -> None:
    from transformers import AutoTokenizer

    base = out / "base"
    base.mkdir(parents=True)
    _write_base(base, kind)
    model = _adapted(base, kind)
    _learn(model, kind, AutoTokenizer.from_pretrained(base), rate=2e-3)
    model.save_pretrained(out / "adapter")


def _learn(model: Any, kind: str, tokenizer: Any, rate: float) -> None:
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for asked, goal in _batches(kind, tokenizer):
        if kind == "embed":
            vectors = [
                torch.nn.functional.normalize(_mean(model, each), dim=-1) for each in (asked, goal)
            ]
            loss = torch.nn.functional.cross_entropy(
                20 * vectors[0] @ vectors[1].T, torch.arange(len(SUBJECTS))
            )
        else:
            logits = model(**asked).logits
            if kind == "label-set":
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, goal)
            elif kind == "rerank":
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], goal)
            else:
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), goal.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()


def _mean(model: Any, asked: Any) -> Any:
    weights = asked["attention_mask"][..., None]
    return (model(**asked).last_hidden_state * weights).sum(1) / weights.sum(1)


if __name__ == "__main__":
    _train(sys.argv[1], Path(sys.argv[2]))
