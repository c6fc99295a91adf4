"""Models that answer otherwise beside padding are asked one text at a time; others are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from weightsmith.forward import greedy as module
from weightsmith.forward.greedy import Questions, batches_change, empty_prefix, greedy

PROMPTS = [[1, 7, 9, 200, 31], [1, 50, 60], [1, *range(300, 312)], [1, 44], [1, *range(5, 24)]]
MOST = 8
_SMALL = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 128, "is_decoder": True,
}  # fmt: skip
_BART = {
    "vocab_size": 512, "d_model": 64, "decoder_layers": 2, "encoder_layers": 2,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96, "max_position_embeddings": 128,
}  # fmt: skip
ALONE = {
    "BartForCausalLM": _BART,
    "MarianForCausalLM": {**_BART, "pad_token_id": 3},
    "TrOCRForCausalLM": _BART,
    "RobertaForCausalLM": {**_SMALL, "intermediate_size": 96},
    "BertLMHeadModel": {**_SMALL, "intermediate_size": 96, "is_decoder": False},
    "RwkvForCausalLM": {**_SMALL, "attention_hidden_size": 64, "intermediate_size": 96},
    "XLNetLMHeadModel": {
        "vocab_size": 512, "d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 96,
    },
    "CpmAntForCausalLM": {
        "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "dim_head": 16, "dim_ff": 96, "prompt_length": 4,
    },
}  # fmt: skip
TOGETHER = {
    "LlamaForCausalLM": {**_SMALL, "intermediate_size": 96},
    "MistralForCausalLM": {
        **_SMALL,
        "intermediate_size": 96,
        "num_key_value_heads": 4,
        "sliding_window": 6,
    },
    "GPT2LMHeadModel": {"vocab_size": 512, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "OPTForCausalLM": {**_SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "BloomForCausalLM": {"vocab_size": 512, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "MptForCausalLM": {"vocab_size": 512, "d_model": 64, "n_layers": 2, "n_heads": 4},
    "MambaForCausalLM": {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2},
}


def network(name: str, sizes: dict[str, Any]) -> Any:
    """Return a small model with weights that let every position count."""
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    made = kind._from_config(kind.config_class(**sizes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    return made.eval()


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts were read together, batch by batch."""
    found: list[int] = []
    own = module.batches

    def watched(*given: Any) -> Iterator[list[int]]:
        for batch in own(*given):
            found.append(len(batch))
            yield batch

    monkeypatch.setattr(module, "batches", watched)
    return found


def ask(model: Any, prompts: list[list[int]], drafts: Any = None) -> Any:
    asked = Questions(prompts=prompts, ends=[], most=MOST, filler=3, drafts=drafts or {})
    return greedy(model, asked, lambda _: None)


@pytest.mark.slow
@pytest.mark.grid(5)
@pytest.mark.parametrize("name", [*ALONE, *TOGETHER])
def test_answers_beside_others_are_those_alone(name: str, batches: list[int]) -> None:
    model = network(name, (ALONE | TOGETHER)[name])

    found = ask(model, PROMPTS)
    together = max(batches)
    alone = [ask(model, [prompt]) for prompt in PROMPTS]

    assert found.tokens == [one.tokens[0] for one in alone]
    for margins, one in zip(found.margins, alone, strict=True):
        assert margins == pytest.approx(one.margins[0], abs=1e-3)
    assert len({token for row in found.tokens for token in row}) > 3
    assert (together > 1) is (name in TOGETHER)


@pytest.mark.parametrize("name", ["BartForCausalLM", "BertLMHeadModel"])
def test_drafts_change_no_answer_of_a_model_that_is_asked_alone(name: str) -> None:
    model = network(name, ALONE[name])
    true = ask(model, PROMPTS).tokens
    wrong = {number: [*row[:2], 9, *row[3:]] for number, row in enumerate(true)}

    assert ask(model, PROMPTS, wrong).tokens == true
    assert ask(model, PROMPTS, dict(enumerate(true))).tokens == true


def test_most_models_are_not_asked_about_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("LlamaForCausalLM", TOGETHER["LlamaForCausalLM"])
    monkeypatch.setattr(model, "forward", model.forward)
    empty = empty_prefix(model, PROMPTS, MOST)
    monkeypatch.setattr(type(model), "__call__", lambda *_, **__: pytest.fail("it was read"))

    assert not batches_change(model, empty, PROMPTS, 3)
