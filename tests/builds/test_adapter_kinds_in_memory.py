"""A build of every kind of adapter, with real merges, validations and reference answers.

What PEFT's own model answers, with the adapter unmerged, is what the reference must answer; that
of the merged model is held to it by the validation.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from weightsmith.merging.families import families
from weightsmith.worker.jobs import STAGES

from tests.fakes.memory import Memory
from tests.unit.merging import test_tuners, test_variants
from tests.unit.merging.oracle import make_base, model_class, save_adapter
from tests.unit.merging.test_reference import add_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.slow]
Q = {"target_modules": ["q_proj", "v_proj"]}
TIED = {"tie_word_embeddings": True}
WORDS, ROWS = 96, 98
TOKENS = 6
PROMPTS = ("w1 w2 w3", "w5", "w7 w8 w9 w10")
SAVED = {"modules_to_save": ["embed_tokens", "lm_head"]}
LOADED = ("FROD", "OSF", "PSOFT", "TINYLORA")
"""PEFT computes with the base's weights as it loads these."""
NEW = {"token_indices": [96, 97]}
BOTH = {"tied": NEW, "untied": NEW | {"target_modules": ["embed_tokens", "lm_head"]}}
"""Of an untied head that is not trained, PEFT saves no new rows."""

Case = tuple[str, dict[str, Any], str, dict[str, Any], int]
"""Architecture, its options, PEFT's type, its options, rows after a resize or 0."""


def cases() -> dict[str, Case]:
    found: dict[str, Case] = {
        name: ("llama", model, "LORA", lora, 0)
        for name, (model, lora) in test_variants.VARIANTS.items()
    }
    targets = {"target_modules": ["q_proj", "down_proj"]}
    found |= {
        kind: ("llama", {"attention_bias": True}, kind, targets | rest, 0)
        for kind, rest in test_tuners.CASES.items()
    }
    found["FROD"] = ("llama", {}, "FROD", targets, 0)
    found["split"] = ("hrm_text", {}, "LORA", {"target_modules": "all-linear"}, 0)
    found |= {
        name: (kind, model, "LORA", lora, 0)
        for name, (kind, model, lora) in test_variants.ARCHITECTURES.items()
        if kind in ("gpt2", "gemma3", "phi3", "falcon", "qwen3_moe", "mixtral", "gpt_oss")
    }
    for tie, model in (("untied", {}), ("tied", TIED)):
        found |= {
            f"resized-{tie}": ("llama", model, "LORA", Q | SAVED, ROWS),
            f"resized-tokens-{tie}": (
                "llama", model, "LORA", Q | {"trainable_token_indices": [96, 97]}, ROWS,
            ),
            f"resized-only-tokens-{tie}": ("llama", model, "TRAINABLE_TOKENS", BOTH[tie], ROWS),
            f"resized-untrained-{tie}": ("llama", model, "LORA", Q, ROWS),
        }  # fmt: skip
    return found


CASES = cases()


NOT_SERVED = (
    "LoRA on Conv1d, Conv2d, Conv3d",
    "LoRA on MultiheadAttention",
    "heads of another task (`task_type` SEQ_CLS, TOKEN_CLS, QUESTION_ANS)",
)
"""Rows of docs/reference/adapters.md for models that no target serves."""
OTHER_ROWS = {
    "resized vocabularies": "resized-tied",
    "LoRA on layers that the base stores in one tensor": "split",
}


def test_every_row_of_the_table_is_built() -> None:
    rows = {row: case for row, case in test_variants.ROWS.items() if row not in NOT_SERVED}

    assert {*(rows | OTHER_ROWS).values()} <= set(CASES)
    assert {kind for family in families() for kind in family.kinds} <= {
        kind for _, _, kind, _, _ in CASES.values()
    }


def config_of(kind: str, options: dict[str, Any]) -> Any:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    nested = {
        key: test_variants.nested(value[0], **value[1]) if isinstance(value, tuple) else value
        for key, value in options.items()
    }
    usual = {"r": 4, "lora_alpha": 6} if kind == "LORA" else {}
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**usual | nested)


def load(base: Path, architecture: str, rows: int) -> Any:
    model = model_class(architecture).from_pretrained(base, dtype=torch.float32)
    if rows:
        model.resize_token_embeddings(rows)
    return model


def train(base: Path, case: Case, folder: Path) -> None:
    """Save an adapter whose parameters are moved from where they start."""
    from peft import get_peft_model

    architecture, _, kind, options, rows = case
    torch.manual_seed(1)
    tuned = get_peft_model(load(base, architecture, rows), config_of(kind, options))
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    save_adapter(tuned.eval(), folder)


def greedy(base: Path, case: Case, adapter: Path) -> list[str]:
    """The oracle: PEFT's model, one token after the other."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    architecture, *_, rows = case
    words = AutoTokenizer.from_pretrained(adapter if rows else base)
    model = PeftModel.from_pretrained(load(base, architecture, rows), adapter).eval()
    found, ends = [], {words.eos_token_id, model.config.eos_token_id}
    for prompt in PROMPTS:
        asked = ids = list(words(prompt)["input_ids"])
        while len(ids) < len(asked) + TOKENS and not ends & {ids[-1]}:
            with torch.no_grad():
                best = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()
            ids = [*ids, int(best)]
        found.append(words.decode(ids[len(asked) :], skip_special_tokens=True))
    return found


def answers(job: Any, result: Any, name: str) -> list[str]:
    """Return what a subject answered in a proof."""
    models = [one for walk in job.reference.walks for task in walk.tasks for one in task.models]
    (key,) = [one.key for one in models if one.name == name]
    return [row["answer"] for row in result["answers"][key]]


@pytest.mark.grid(12)
@pytest.mark.parametrize("name", CASES)
def test_a_build_of_every_kind(name: str, memory: Memory) -> None:
    architecture, model, *_, rows = case = CASES[name]
    base, adapter = memory.home / "base", memory.home / "a"
    shutil.rmtree(base)
    shutil.rmtree(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_base(base, architecture, **model)
        add_tokenizer(base)
        train(base, case, adapter)
    if rows:
        add_tokenizer(adapter)
        add_words(adapter, rows)
    asked = [{"prompt": prompt, "expected": "zero"} for prompt in PROMPTS]
    (memory.home / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    proofs = list[Any]()

    def prove(job: Any, report: Any) -> Any:
        proofs.append((job, STAGES["proof"](job, report)))
        return proofs[-1][1]

    memory.bench.quality |= {"kl_mean": 0.0, "kl_p99": 0.0, "top1": 1.0, "layer_error": 0.0}
    memory.runner.stages = {**memory.bench.stages, "proof": prove}

    memory.build(f"evaluate.max_tokens={TOKENS}", targets=("llamacpp-f16",))

    ((job, result),) = proofs
    validation = result["validation"]
    assert validation["passed"]
    assert [one for one in validation["findings"] if one["severity"] == "warning"] == []
    assert validation["streamed"] == (name not in LOADED)
    assert answers(job, result, "adapter") == greedy(base, case, adapter)
    assert answers(job, result, "merged") == answers(job, result, "adapter")


def add_words(folder: Path, rows: int) -> None:
    path = folder / "tokenizer.json"
    told = json.loads(path.read_text())
    told["added_tokens"] = [
        {"id": n, "content": f"<new{n}>", "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for n in range(WORDS, rows)
    ]
    path.write_text(json.dumps(told))
