"""Views of models whose code reads weights without calling their layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from weightsmith.core.errors import InputRefused
from weightsmith.forward.lockstep import Lockstep
from weightsmith.forward.views import view
from weightsmith.merging.reference import UnmergedModel

from tests.unit.forward.answering import logits
from tests.unit.merging.oracle import build, make_base, train, unmerged

IDS = torch.arange(7, 47).reshape(2, 20)


@pytest.mark.parametrize("kind", ["nemotron_h", "mamba2"])
def test_models_with_states_are_streamed(kind: str, tmp_path: Path) -> None:
    """They filter single channels by functions of their own."""
    torch.manual_seed(0)
    model = build(kind).eval()
    model.save_pretrained(tmp_path)

    lockstep = Lockstep(cpus=2)
    network = view(tmp_path, [], lockstep, 0)

    found = lockstep.run({"": lambda: logits(network, IDS)})[""]

    torch.testing.assert_close(found, logits(model, IDS), rtol=1e-4, atol=1e-5)


NEW = {
    "saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "saved-embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "trained-tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 96, 97]},
    "untrained": {"target_modules": ["q_proj"]},
    "factors": {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
}
"""Ways to train a model whose vocabulary was resized; PEFT saves embedding and head by itself."""


@pytest.mark.grid(4)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [98, 90])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("how", NEW)
def test_an_adapter_of_another_vocabulary_answers_as_in_peft(
    how: str, tied: bool, rows: int, tmp_path: Path
) -> None:
    """As PEFT after `resize_token_embeddings`, streamed and with the weights in memory."""
    options = NEW[how]
    if rows < 96 and "trainable_token_indices" in options:
        options = options | {"trainable_token_indices": [5, 88]}
    base = make_base(tmp_path / "base", "llama", tie_word_embeddings=tied)
    config = LoraConfig(r=4, lora_alpha=6, **options)
    adapter = train(base, "llama", tmp_path / "adapter", config, resize=rows)
    wanted = unmerged(base, "llama", adapter, resize=rows)
    ids = torch.arange(40).view(2, 20) % 90
    subject, lockstep = UnmergedModel(model=base, adapters=[(adapter, 1.0)]), Lockstep(cpus=2)
    streamed = subject.streamed(lockstep, 0)

    for found in (
        lockstep.run({"": lambda: logits(streamed, ids)})[""],
        logits(subject.whole(), ids),
    ):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    assert streamed.config.get_text_config().vocab_size == rows


HALF = {"target_modules": ["q_proj", "lm_head"]}


@pytest.mark.filterwarnings("ignore")
def test_a_head_whose_embedding_was_not_saved_is_refused(tmp_path: Path) -> None:
    """Of a resized embedding, PEFT saves nothing if only the head is in `target_modules`."""
    base = make_base(tmp_path / "base", "llama")
    adapter = train(base, "llama", tmp_path / "adapter", LoraConfig(r=4, **HALF), resize=98)
    subject = UnmergedModel(model=base, adapters=[(adapter, 1.0)])

    with pytest.raises(InputRefused, match="98 tokens in lm_head, and 96 in"):
        subject.streamed(Lockstep(cpus=2), 0)


@pytest.mark.filterwarnings("ignore")
def test_a_trained_token_without_a_row_is_refused(tmp_path: Path) -> None:
    """As PEFT leaves it if it did not find the base's config.json when it saved the adapter."""
    base = make_base(tmp_path / "base", "llama")
    config = LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[5, 97])
    adapter = train(base, "llama", tmp_path / "adapter", config, resize=98)
    path = adapter / "adapter_model.safetensors"
    kept = {name: one for name, one in load_file(path).items() if "base_layer" not in name}
    save_file({name: one for name, one in kept.items() if "lm_head" not in name}, path)

    for run in (lambda one: one.streamed(Lockstep(cpus=2), 0), lambda one: one.whole()):
        with pytest.raises(InputRefused, match="trains token 97; the embedding has 96 rows"):
            run(UnmergedModel(model=base, adapters=[(adapter, 1.0)]))
