import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MixtralConfig,
    Qwen3MoeConfig,
)
from weightsmith.checkpoints.tensors import CheckpointTensors
from weightsmith.errors import CheckFailed, InputRefused
from weightsmith.quality.limits import limits_for
from weightsmith.quality.measure import measure
from weightsmith.quality.result import Quality
from weightsmith.quality.streamed import StreamedModel
from weightsmith.quantizers import formats
from weightsmith.recipe import Quality as Wanted

TINY = Path(__file__).parents[3] / "examples" / "tiny"
ROWS = [json.loads(line) for line in (TINY / "calibration.jsonl").read_text().splitlines()][:12]


class View:
    """The tiny checkpoint, each matrix of its layers passed through `change`."""

    def __init__(self, change=lambda name, data: data, model=TINY / "base"):
        self.truth, self.change = CheckpointTensors(model), change
        self.names = self.truth.names

    def tensor(self, name):
        data = self.truth.tensor(name)
        return self.change(name, data) if data.ndim == 2 and "layers" in name else data


def four_bits(_, data, group=32):
    """Symmetric four-bit rounding with one scale per group: a sound quantization."""
    blocks = data.reshape(-1, group)
    scales = np.abs(blocks).max(1, keepdims=True) / 7
    return np.round(blocks / scales), scales


def sound(name, data):
    codes, scales = four_bits(name, data)
    return (codes * scales).reshape(data.shape)


def measured(view, tokens=300, rows=ROWS):
    return measure(TINY / "base", view, rows, tokens, lambda done, total: None)


TEXTS = {
    "source": "texts.jsonl",
    "texts": 3,
    "held_out": 1,
    "general": 0,
    "digest": "sha256:" + "a" * 64,
    "held_out_digest": "sha256:" + "b" * 64,
}


def allowed(found, name="q4_k_m"):
    limits = limits_for(formats()[name], Wanted())
    return not Quality(loss=found).judged(limits, TEXTS).exceeded


def test_the_checkpoint_loses_nothing_against_itself():
    found = measured(View())

    assert found.kl_mean == 0
    assert found.top1 == 1
    assert found.perplexity_ratio == 1
    assert all(worst.error == 0 for worst in found.worst_layers)


def test_a_sound_quantization_passes_and_is_seen():
    found = measured(View(sound))

    assert found.kl_mean > 0
    assert allowed(found)


def test_a_sound_quantization_of_random_weights_passes(tmp_path):
    """Its successors are all as likely: which of them is first says nothing."""
    model = shutil.copytree(
        TINY / "base", tmp_path / "base", ignore=lambda *_: ["model.safetensors"]
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(model)

    found = measure(model, View(sound, model), ROWS, 300, lambda done, total: None)

    assert found.perplexity_reference > 300
    assert allowed(found)


def test_the_figures_are_those_of_two_whole_forward_passes(tmp_path):
    found = measured(View(sound), tokens=10_000)

    tokenizer = AutoTokenizer.from_pretrained(TINY / "base")
    right = AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32).eval()
    other = AutoModelForCausalLM.from_pretrained(TINY / "base", dtype=torch.float32).eval()
    view = View(sound)
    other.load_state_dict({n: torch.tensor(view.tensor(n)) for n in other.state_dict()})
    divergences, losses = [], []
    for row in ROWS:
        whole = tokenizer(tokenizer.apply_chat_template(row["messages"], tokenize=False),
                          add_special_tokens=False, return_tensors="pt")["input_ids"]  # fmt: skip
        asked = tokenizer.apply_chat_template(
            row["messages"][:-1], tokenize=False, add_generation_prompt=True
        )
        start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        with torch.inference_mode():
            p, q = (m(whole).logits[0, start - 1 : -1].double() for m in (right, other))
        p, q = p.log_softmax(-1), q.log_softmax(-1)
        divergences += (p.exp() * (p - q)).sum(-1).tolist()
        losses += [
            (a - b)
            for a, b in zip(*(m[range(len(m)), whole[0, start:]] for m in (p, q)), strict=True)
        ]

    assert found.kl_mean == pytest.approx(np.mean(divergences), rel=1e-3)
    assert found.kl_p99 == pytest.approx(np.quantile(divergences, 0.99), rel=1e-2)
    assert found.perplexity_ratio == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)


def test_a_layers_error_is_that_of_text_and_not_of_padding():
    longer = [*ROWS, {"text": "One line that is longer than any of those questions. " * 5}]

    plain, padded = (measured(View(sound), tokens=10_000, rows=rows) for rows in (ROWS, longer))

    assert padded.layer_error == pytest.approx(plain.layer_error, rel=1e-4)


def shuffled_scales(name, data):
    codes, scales = four_bits(name, data)
    return (codes * np.random.default_rng(0).permutation(scales)).reshape(data.shape)


def wrong_group(name, data):
    """Written with groups of 32, read with groups of 64: the scales of the first half, twice."""
    codes, scales = four_bits(name, data)
    return (codes * np.repeat(scales[: len(scales) // 2], 2, axis=0)).reshape(data.shape)


def zeroed_layer(name, data):
    return data * 0 if "layers.2." in name else sound(name, data)


def swapped_halves(name, data):
    return np.concatenate([data[len(data) // 2 :], data[: len(data) // 2]])


@pytest.mark.parametrize("broken", [shuffled_scales, wrong_group, zeroed_layer, swapped_halves])
def test_a_broken_quantization_is_stopped(broken):
    assert not allowed(measured(View(broken)))


def test_the_broken_layer_is_named():
    found = measured(View(zeroed_layer))

    assert found.worst_layers[0].layer == 2
    assert "layers.2." in found.worst_tensors[0].tensor


def test_values_that_are_no_numbers_are_refused_with_their_tensor():
    def poisoned(name, data):
        return np.where(data == data.max(), np.nan, data) if "layers.1.mlp.up" in name else data

    with pytest.raises(CheckFailed, match=r"layers\.1\.mlp\.up_proj\.weight has NaN"):
        measured(View(poisoned))


def test_another_shape_is_refused():
    with pytest.raises(CheckFailed, match="has shape"):
        measured(View(lambda name, data: data[:-1]))


def test_too_little_text_is_reported_with_numbers():
    with pytest.raises(InputRefused, match=r"has \d+ tokens, .* needs 64"):
        measure(TINY / "base", View(), ROWS[:1], 300, lambda done, total: None)


def test_conversations_need_a_chat_template(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(TINY / "base", model)
    (model / "chat_template.jinja").unlink()
    config = json.loads((model / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (model / "tokenizer_config.json").write_text(json.dumps(config))

    with pytest.raises(InputRefused, match="no chat template"):
        measure(model, View(), ROWS, 300, lambda done, total: None)


SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**SMALL, num_local_experts=4),
        Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2),
    ],
    ids=lambda config: config.model_type,
)
def test_experts_are_put_together_as_transformers_does(tmp_path, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(20)[None] + 3
    truth = CheckpointTensors(tmp_path)

    def weights(name):
        if name not in truth.names:
            raise KeyError(name)
        return torch.from_numpy(truth.tensor(name).copy())

    streamed, filled = StreamedModel(tmp_path), []

    def count(*_):
        filled.append([all(p.is_meta for p in layer.parameters()) for layer in streamed.layers])

    states = streamed.hidden(ids, weights, lambda _, s: s, count)

    with torch.inference_mode():
        torch.testing.assert_close(streamed.logits(states), model(ids).logits)
    assert filled == [[False, True], [True, False]], "one layer in memory at a time"
    assert all(p.is_meta for layer in streamed.layers for p in layer.parameters())
