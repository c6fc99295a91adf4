"""A head that an adapter brings to a checkpoint of an encoder or decoder alone.

transformers loads what is merged without a missing tensor, and its own names are those in the file.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from weightsmith.core.errors import InputRefused
from weightsmith.validating.structure import compare_files

from tests.unit.merging.oracle import run, save_adapter
from tests.unit.merging.tensors import lora as factors
from tests.unit.merging.tensors import random
from tests.unit.merging.tensors import run as merged

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
DISTILBERT = {
    "vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2,
    "max_position_embeddings": 32, "pad_token_id": 0,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "Bert": ("bert.", SIZES, "dense"),
    "Roberta": ("roberta.", SIZES, "dense"),
    "XLMRoberta": ("roberta.", SIZES, "dense"),
    "DistilBert": ("distilbert.", DISTILBERT, "lin1"),
    "Electra": ("electra.", SIZES, "dense"),
    "ModernBert": ("model.", SIZES, "Wqkv"),
    "Llama": ("model.", SIZES, "down_proj"),
}
TASKS = {"SEQ_CLS": "ForSequenceClassification", "TOKEN_CLS": "ForTokenClassification"}


GAPS = ("Roberta", "DistilBert", "Electra", "ModernBert")
BASES = [
    *((name, "Model") for name in MODELS), *((name, "ForMaskedLM") for name in GAPS),
    ("Bert", "ForPreTraining"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.grid(3)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("name", "kind"), BASES)
def test_the_tensors_are_those_of_the_class_that_transformers_saves(
    tmp_path: Path, name: str, kind: str, task: str
) -> None:
    """BERT's pooler, which `dense` names too, is not in its class for tokens."""
    from peft import LoraConfig, get_peft_model

    prefix, sizes, target = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    base = getattr(transformers, f"{name}{kind}")(config)
    base.save_pretrained(tmp_path / "base")
    headed = getattr(transformers, f"{name}{TASKS[task]}")
    ids = torch.arange(1, 21).view(2, 10)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = headed.from_pretrained(tmp_path / "base", num_labels=3)
        # PEFT saves no other part that a class adds: ModernBERT's is asked for.
        more = {"modules_to_save": ["head"]} if name == "ModernBert" else {}
        lora = LoraConfig(r=2, task_type=task, target_modules=[target], **more)
        tuned = get_peft_model(model, lora)
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        save_adapter(tuned, tmp_path / "adapter")
        out = tmp_path / "out"
        run(tmp_path / "base", tmp_path / "adapter", out)
        found, told = headed.from_pretrained(out, output_loading_info=True)

    names = load_file(out / "model.safetensors").keys()
    assert {*names} - {f"{prefix}pooler.dense.{part}" for part in ("weight", "bias")} == {
        *found.state_dict()
    } - {f"{prefix}pooler.dense.{part}" for part in ("weight", "bias")}
    heads = ("classifier", "pre_classifier", "score", "head")
    assert {one for one in names if not one.startswith(prefix)} == {
        one for one in found.state_dict() if one.startswith(heads)
    }
    assert not told["missing_keys"]
    assert found.config.num_labels == 3
    with torch.no_grad():
        wanted, got = tuned.eval()(input_ids=ids).logits, found.eval()(input_ids=ids).logits
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert compare_files(tmp_path / "base", (tmp_path / "adapter",), out) == []


HEAD = {"task_type": "SEQ_CLS", "target_modules": ["query"], "modules_to_save": ["classifier"]}


@pytest.mark.parametrize(
    ("name", "kept"), [("BertForPreTraining", set()), ("BertForCausalLM", {"cls.bias"})]
)
def test_a_base_with_a_head_keeps_its_names(tmp_path: Path, name: str, kept: set[str]) -> None:
    """But a head for gaps in texts goes."""
    base = {"bert.layer.0.query.weight": random(4, 4), "cls.bias": random(4)}
    adapter = factors("bert.layer.0.query", random(2, 4), random(4, 2))
    adapter |= {"classifier.weight": random(3, 4)}

    found = merged(tmp_path, base, adapter, HEAD, architectures=[name])

    assert found.keys() == {"bert.layer.0.query.weight", "classifier.weight"} | kept


def test_a_layer_that_the_file_lacks_is_refused_with_a_new_head_too(tmp_path: Path) -> None:
    base = {f"layer.{n}.query.weight": random(4, 4) for n in range(2)}
    adapter = factors("bert.layer.0.query", random(2, 4), random(4, 2))
    adapter |= {"classifier.weight": random(3, 4)}

    with pytest.raises(InputRefused, match=r"no weights for 1 of its target modules.*layer\.1"):
        merged(tmp_path, base, adapter, HEAD, architectures=["BertModel"])


def test_a_part_that_only_the_new_class_has_is_asked_for(tmp_path: Path) -> None:
    """BERT's pooler is drawn anew in training if the base has none."""
    base = {"bert.layer.0.query.weight": random(4, 4)}
    adapter = factors("bert.layer.0.query", random(2, 4), random(4, 2))
    adapter |= factors("bert.pooler.dense", random(2, 4), random(4, 2))
    adapter |= {"classifier.weight": random(3, 4)}

    with pytest.raises(InputRefused, match=r"bert\.pooler\.dense, which the base does not have"):
        merged(
            tmp_path, base, adapter, {**HEAD, "target_modules": ["query", "dense"]},
            architectures=["BertForMaskedLM"],
        )  # fmt: skip
