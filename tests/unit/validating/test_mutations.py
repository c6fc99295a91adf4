"""Wrong merges, each made on purpose: every one fails, with a finding that points at it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.paths import ROOT
from tests.unit.validating.conftest import (
    edit_tensors,
    held,
    make_adapter,
    make_model,
    merged,
    merged_by_peft,
    tell,
)

PAGE = ROOT / "docs" / "explanation" / "validation.md"
Q1 = "model.layers.1.self_attn.q_proj.weight"
K0 = "model.layers.0.self_attn.k_proj.weight"


@dataclass(frozen=True)
class Place:
    """One test's folders: what is true, and the copy that is spoilt."""

    folder: Path
    base: Path
    lora: Path
    out: Path

    def other(self, change: Callable[[dict[str, torch.Tensor]], None], **config: Any) -> None:
        """Merge another adapter instead: the true one with its tensors or configuration changed."""
        wrong = self.folder / "wrong-lora"
        shutil.copytree(self.lora, wrong)
        path = wrong / "adapter_model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
        told = json.loads((wrong / "adapter_config.json").read_text())
        (wrong / "adapter_config.json").write_text(json.dumps(told | config))
        shutil.rmtree(self.out)
        merged(self.out, self.base, wrong)

    def edit(self, name: str, change: Callable[[dict[str, Any]], None]) -> None:
        """Change a JSON file of the merged folder."""
        told = json.loads((self.out / name).read_text())
        change(told)
        (self.out / name).write_text(json.dumps(told))


def drop(place: Place) -> None:
    base = {}
    edit_tensors(copy(place.base, place.folder / "b"), base.update)
    edit_tensors(place.out, lambda t: t.update({Q1: base[Q1]}))


def double(place: Place) -> None:
    config = json.loads((place.lora / "adapter_config.json").read_text())
    place.other(lambda _: None, lora_alpha=2 * config["lora_alpha"])


def exchange(part: str, old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Return what swaps each tensor with this part in its name and that of the other name."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if part in n]:
            other = name.replace(old, new)
            tensors[name], tensors[other] = tensors[other], tensors[name]

    return change


def swap(place: Place) -> None:
    place.other(exchange(".layers.0.self_attn.q_proj", ".layers.0.", ".layers.1."))


def transpose(place: Place) -> None:
    edit_tensors(place.out, lambda t: t.update({Q1: t[Q1].T.clone()}))


def wrong_expert(place: Place) -> None:
    edit_tensors(place.out, exchange(".layers.1.mlp.experts.0.", ".experts.0.", ".experts.2."))


def adapted_experts(place: Place) -> None:
    edit_tensors(place.out, exchange(".layers.1.mlp.experts.1.down_proj", "experts.1", "experts.3"))


def lost_shard(place: Place) -> None:
    sorted(place.out.glob("model-*.safetensors"))[1].unlink()


def end_of_config(place: Place) -> None:
    place.edit("config.json", lambda told: told.update(eos_token_id=5))


def stale_head(place: Place) -> None:
    edit_tensors(
        place.out, lambda t: t.update({"lm_head.weight": 1.5 * t["model.embed_tokens.weight"]})
    )


def foreign_shard(place: Place) -> None:
    lora = make_adapter(place.folder / "lora2", place.base, seed=9)
    other = merged(place.folder / "out2", place.base, lora)
    name = sorted(place.out.glob("model-*.safetensors"))[1].name
    shutil.copy(other / name, place.out / name)


def flip(place: Place) -> None:
    edit_tensors(place.out, lambda t: t[K0][5, 7].neg_())


def twice(place: Place) -> None:
    out = merged(place.folder / "twice", place.out, place.lora)
    shutil.rmtree(place.out)
    out.rename(place.out)


def foreign_tokenizer(place: Place) -> None:
    path = place.out / "tokenizer.json"
    told = json.loads(path.read_text())
    vocabulary = told["model"]["vocab"]
    names = [n for n in vocabulary if n.isalpha()] if isinstance(vocabulary, dict) else []
    if names:
        one, two = names[10], names[11]
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    else:
        vocabulary[300], vocabulary[301] = vocabulary[301], vocabulary[300]
    path.write_text(json.dumps(told))


def lost_end(place: Place) -> None:
    place.edit("generation_config.json", lambda told: told.pop("eos_token_id"))
    place.edit("config.json", lambda told: told.update(eos_token_id=None))


def lost_template(place: Place) -> None:
    (place.out / "chat_template.jinja").unlink()
    place.edit("tokenizer_config.json", lambda told: told.pop("chat_template", None))


def other_rope(place: Place) -> None:
    def change(told: dict[str, Any]) -> None:
        told["rope_theta"] = 500.0
        told.get("rope_parameters", {})["rope_theta"] = 500.0

    place.edit("config.json", change)


def tied_embedding(place: Place) -> None:
    """What PEFT itself makes of LoRA on a tied embedding: the head gets the delta too."""
    merged_by_peft(place.out, place.base, place.lora)


def lost_norm(place: Place) -> None:
    edit_tensors(place.out, lambda t: t.update({"model.norm.weight": t["model.norm.weight"] * 0}))


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


@dataclass(frozen=True)
class Mutation:
    """A wrong merge, and words of the finding that points at it."""

    title: str
    spoil: Callable[[Place], None]
    says: tuple[str, ...]
    model: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)


TIED = {"tie_word_embeddings": True}
MUTATIONS = (
    Mutation("one adapter tensor dropped", drop, (Q1, "missing")),
    Mutation("scaling off by 2", double, ("doubled",)),
    Mutation(
        "A and B of two layers swapped",
        swap,
        ("belongs to model.layers.1.self_attn.q_proj.weight",),
    ),
    Mutation("square matrix transposed", transpose, (Q1, "transposed")),
    Mutation(
        "wrong expert",
        wrong_expert,
        ("experts.0.down_proj.weight: it has the base's model.layers.1.mlp.experts.2.down_proj",),
        {"kind": "qwen3_moe"},
        {"target_modules": ["q_proj", "v_proj"]},
    ),
    Mutation(
        "an adapted expert in another's place",
        adapted_experts,
        ("experts.down_proj", "expert 1"),
        {"kind": "qwen3_moe"},
        {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]},
    ),
    Mutation("tied head stale", stale_head, ("lm_head.weight", "ties"), TIED),
    Mutation(
        "tied head changed with the embedding",
        tied_embedding,
        ("lm_head.weight and model.embed_tokens.weight share a tensor",),
        TIED,
        {"target_modules": ["embed_tokens", "q_proj"]},
    ),
    Mutation("shard from another run", foreign_shard, ("not a merge of",)),
    Mutation("shard lost", lost_shard, ("model-00002",)),
    Mutation("one sign bit flipped", flip, (K0, "[5, 7]", "sign is flipped")),
    Mutation("adapter applied twice", twice, ("twice",)),
    Mutation("tokenizer from another model", foreign_tokenizer, ("tokenizer",)),
    Mutation("end of sequence lost", lost_end, ("end-of-sequence", "token 2")),
    Mutation("end of sequence changed in config.json", end_of_config, ("token 2",)),
    Mutation("chat template lost", lost_template, ("template is missing",)),
    Mutation("positions computed otherwise", other_rope, ("rope",)),
    Mutation("a norm zeroed", lost_norm, ("model.norm.weight",)),
)


@pytest.mark.grid(12)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.title.replace(" ", "-"))
def test_mutation_is_caught(tmp_path: Path, mutation: Mutation) -> None:
    base = make_model(tmp_path / "base", **mutation.model)
    lora = make_adapter(tmp_path / "lora", base, **mutation.adapter)
    place = Place(tmp_path, base, lora, tmp_path / "out")
    if mutation.spoil is not tied_embedding:
        merged(place.out, base, lora)

    mutation.spoil(place)
    result = held(place.base, place.out, place.lora)

    errors = [f for f in result.findings if f.severity == "error"]
    text = "\n".join(f.message for f in errors)
    assert not result.passed
    assert all(words in text for words in mutation.says), tell(result)
    assert documented()[mutation.title] == {f.check for f in errors}, tell(result)


def test_every_documented_mutation_is_made() -> None:
    assert list(documented()) == [mutation.title for mutation in MUTATIONS]


def documented() -> dict[str, set[str]]:
    """Return the page's table: which detectors see which wrong merge."""
    table = PAGE.read_text("utf-8").split("| wrong merge | seen by |\n|---|---|\n")[1]
    rows = [line.strip("|").split("|") for line in table.split("\n\n")[0].splitlines()]
    return {title.strip(): set(re.findall(r"`(\w+)`", seen)) for title, seen in rows}
