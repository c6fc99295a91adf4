"""A first week with models of one's own, on the command line: what is said before any work.

Builds of every kind of adapter are in `test_adapter_kinds_in_memory.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.fakes.command_line import Ended, weightsmith
from tests.fakes.configs import LLAMA_8B
from tests.paths import ROOT, TINY

ENCODER = {"vocab_size": 96, "d_model": 32, "num_heads": 4, "is_encoder_decoder": True}
BERT = {
    "model_type": "bert", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 512,
}  # fmt: skip
NOT_SERVED: dict[str, tuple[dict[str, Any], str]] = {
    "T5": (
        {"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "num_layers": 2}
        | ENCODER,
        "is an encoder with a decoder, and no target serves one",
    ),
    "BART": (
        {"architectures": ["BartForConditionalGeneration"], "model_type": "bart"} | ENCODER,
        "is an encoder with a decoder, and no target serves one",
    ),
    "filler of gaps": (
        BERT | {"architectures": ["BertForMaskedLM"]},
        "fills gaps in texts, and no target serves such a model",
    ),
    "Mamba": (
        {
            "architectures": ["MambaForCausalLM"], "model_type": "mamba", "hidden_size": 32,
            "num_hidden_layers": 2, "state_size": 16, "vocab_size": 96,
        },
        "keeps states alone, and no keys and values",
    ),
}  # fmt: skip


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a classifier": (
        LLAMA_8B | {"architectures": ["LlamaForSequenceClassification"]},
        "llamacpp-q4_k_m", "has no endpoint for labels",
    ),
    "a classifier of tokens": (
        BERT | {"architectures": ["BertForTokenClassification"]},
        "llamacpp-f16", "has no endpoint for scores of single tokens",
    ),
    "BERT that scores pairs": (
        BERT | {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "x"}},
        "llamacpp-f16", "leaves out BERT's pooler",
    ),
    "an embedder": (
        BERT | {"architectures": ["BertModel"]},
        "sglang", "is planned here as a server that continues text alone",
    ),
}  # fmt: skip
"""What one engine serves and another does not: its config.json, that other target, and why."""


def folder_of(tmp_path: Path, config: dict[str, Any]) -> Path:
    """A folder with a config.json alone, as before a download."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return tmp_path / "model"


def published(name: str) -> dict[str, Any]:
    """The config.json of a model that was published."""
    path = ROOT / "tests" / "golden" / "models" / f"{name}.json"
    return dict(json.loads(path.read_text("utf-8"))["config"])


def plan(base: Path, target: str, *words: object) -> Ended:
    return weightsmith("plan", "--base", base, "--target", target, *words)


def planned(base: Path, target: str, *words: object) -> dict[str, Any]:
    ended = plan(base, target, "--json", *words)
    assert ended.code == 0, ended.err
    return dict(json.loads(ended.out))


@pytest.mark.parametrize(
    ("command", "target"), [("plan", "vllm-awq"), ("build", "llamacpp-q4_k_m")]
)
@pytest.mark.parametrize("kind", NOT_SERVED)
def test_what_no_target_serves_is_said_before_any_work(
    tmp_path: Path, kind: str, target: str, command: str
) -> None:
    config, reason = NOT_SERVED[kind]
    base = folder_of(tmp_path, config)
    if command == "build":  # a plan needs no weights
        save_file({"w": np.zeros(4, np.float32)}, base / "model.safetensors")

    ended = weightsmith(command, "--base", base, "--target", target)

    assert ended.code == 3
    assert f"{config['architectures'][0]} {reason}" in ended.err
    assert "`merge` and `validate` take it" in ended.err
    assert not ended.out


@pytest.mark.parametrize("kind", REFUSED)
def test_what_another_target_serves_is_said_before_any_work(tmp_path: Path, kind: str) -> None:
    config, target, reason = REFUSED[kind]
    base = folder_of(tmp_path, config)

    refused = plan(base, target, "--gpu", "nvidia-h100" if target == "sglang" else "cpu")

    assert refused.code == 3
    assert reason in refused.err
    assert "serves it" in refused.err
    assert plan(base, "vllm").code == 0


def test_a_plan_before_the_download_counts_what_will_be_there(tmp_path: Path) -> None:
    base = folder_of(tmp_path, published("llama-3.1-70b"))
    config = json.loads((TINY / "adapters/a/adapter_config.json").read_text())
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": ["q_proj"]})
    )
    rows, name = config["r"], "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    halves = {"A": np.zeros((rows, 8192), np.float16), "B": np.zeros((8192, rows), np.float16)}
    weights = {name.format(n, half): part for n in range(80) for half, part in halves.items()}
    save_file(weights, adapter / "adapter_model.safetensors")

    alone = planned(base, "vllm-awq", "--gpu", "nvidia-h100")
    tuned = planned(base, "vllm-awq", "--gpu", "nvidia-h100", "--adapter", adapter)

    size = 141_107_412_992  # of the published checkpoint
    for said in (alone, tuned):
        rows = {row["stage"]: row for row in said["stages"]}
        assert abs(rows["resolve"]["read_bytes"] / size - 1) < 0.01
        assert not any(row["cached"] for row in said["stages"])
    assert [row["stage"] for row in tuned["stages"]][:3] == ["resolve", "merge", "validate"]
    text = plan(base, "vllm-awq", "--gpu", "nvidia-h100", "--adapter", adapter)
    assert "worked out" in text.out
    assert "an estimate" in text.out


@pytest.mark.parametrize(
    ("model", "words", "says"),
    [
        (
            "llama-3.1-70b",
            ("vllm-awq", "--gpu", "nvidia-h100"),
            (
                "11 requests of 8192 tokens at once",
                "requests at once, of other lengths: 1 of 91024, 2 of 32768, 5 of 16384",
            ),
        ),
        (
            "llama-3.1-70b",
            ("llamacpp-q4_k_m", "--gpu", "nvidia-l4"),
            ("of 80 layers fit on nvidia-l4; the rest run on the host's CPU",),
        ),
        (
            "deepseek-v3",
            ("vllm", "--gpu", "nvidia-h200", "--gpu-count", 8),
            ("the cache is there 8 times", "data parallelism"),
        ),
        ("gemma-3-27b", ("vllm", "--gpu", "nvidia-h100"), ("the server reads pictures",)),
    ],
)
def test_what_a_plan_says_of_a_large_model(
    tmp_path: Path, model: str, words: tuple[Any, ...], says: tuple[str, ...]
) -> None:
    text = plan(folder_of(tmp_path, published(model)), *words)

    assert text.code == 0
    assert "is not known" not in text.out + text.err
    assert [said for said in says if said not in text.out] == []


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("tool-call-parser=hermess", "did you mean hermes?"),
        ("enable-auto-tool-choice=true", "needs tool-call-parser"),
        ("max-logprobs=many", "serve.extra.max-logprobs"),
    ],
)
def test_a_value_that_the_engine_would_refuse_is_refused_by_the_plan(
    setting: str, says: str
) -> None:
    ended = plan(TINY / "base", "vllm", "--set", f"serve.extra.{setting}")

    assert ended.code == 2
    assert says in ended.err


def test_the_last_checkpoint_of_a_training_run_is_proposed(tmp_path: Path) -> None:
    for step in (9, 20, 40):
        shutil.copytree(TINY / "adapters" / "a", tmp_path / f"checkpoint-{step}")

    ended = plan(TINY / "base", "vllm", "--adapter", tmp_path)

    assert ended.code == 3
    assert str(tmp_path / "checkpoint-40") in ended.err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_what_no_target_serves_can_be_merged_and_validated(tmp_path: Path) -> None:
    from peft import LoraConfig

    from tests.unit.merging.oracle import make_base, train
    from tests.unit.merging.test_reference import add_tokenizer

    base, merged = make_base(tmp_path / "base", "t5"), tmp_path / "merged"
    add_tokenizer(base)
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["q", "v", "wo"])
    adapter = train(base, "t5", tmp_path / "adapter", lora)
    both = ("--base", base, "--adapter", adapter, "--runner", "local")

    assert weightsmith("merge", *both, "--out", merged).code == 0
    validated = weightsmith("validate", *both, "--merged", merged)

    assert validated.code == 0
    assert "only files were checked" in validated.err
