"""What a quantized model loses, measured beside its checkpoint; a few rows at a time."""

import json
import math
import shutil
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    CohereConfig,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    JambaConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)
from weightsmith.core.errors import CheckFailed, InputRefused, Unmeasurable
from weightsmith.forward.lockstep import Lockstep
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers import formats
from weightsmith.quantizers.quality.limits import limits_for
from weightsmith.quantizers.quality.measure import Totals, measure
from weightsmith.quantizers.quality.result import QualityResult
from weightsmith.quantizers.quality.runs import ROUNDING, TILE, LazyMatrix, Squares, run_both
from weightsmith.recipe.schema import Quality

from tests.paths import ROOT
from tests.unit.quantizers.quality.conftest import TEXTS
from tests.unit.validating.conftest import make_model

TINY = ROOT / "examples" / "tiny"
ROWS = [json.loads(line) for line in (TINY / "calibration.jsonl").read_text().splitlines()][:12]


class View:
    """The tiny checkpoint, each matrix of its layers passed through `change`."""

    stored = ""

    def __init__(self, change=lambda name, data: data, model=TINY / "base"):
        self.truth, self.change = CheckpointTensors(model), change
        self.names = self.truth.names

    def tensor(self, name):
        data = self.truth.tensor(name)
        inside = "layers." in name or ".h." in name
        return self.change(name, data) if data.ndim == 2 and inside else data

    def rows(self, name, start, stop):
        return self.tensor(name)[start:stop]

    def kind(self, _):
        return self.stored


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


def allowed(found, name="q4_k_m"):
    limits = limits_for(formats()[name], Quality())
    return not QualityResult(loss=found).judged(limits, TEXTS).exceeded


def test_the_checkpoint_loses_nothing_and_a_sound_quantization_little():
    same, found = measured(View()), measured(View(sound))

    assert (same.kl_mean, same.top1, same.perplexity_ratio) == (0, 1, 1)
    assert all(worst.error == 0 for worst in same.worst_layers)
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


@pytest.mark.slow
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


@pytest.mark.slow
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
    found = measured(View(broken))

    assert not allowed(found)
    if broken is zeroed_layer:
        assert found.worst_layers[0].layer == 2
        assert "layers.2." in found.worst_tensors[0].tensor


@pytest.mark.grid(2)
@pytest.mark.parametrize("name", ["self_attn.k_proj", "mlp.up_proj"])
def test_one_damaged_tensor_is_named_though_the_whole_hardly_changes(name):
    """A twentieth of its scales belong to other groups, as after a fault of memory."""
    damaged_name = f"model.layers.1.{name}.weight"

    def damaged(tensor, data):
        if tensor != damaged_name:
            return sound(tensor, data)
        codes, scales = four_bits(tensor, data)
        scales[::20] *= 8
        return (codes * scales).reshape(data.shape)

    view, untouched = View(damaged), View(sound)
    view.stored = untouched.stored = "q4_0"
    found, good = measured(view), measured(untouched)

    assert good.damaged == ()
    assert [fault.tensor for fault in found.damaged] == [damaged_name]
    assert found.damaged[0].error > 2 * found.damaged[0].limit
    exceeded = (
        QualityResult(loss=found).judged({"perplexity_ratio": 1.3, "kl_mean": 0.25}, TEXTS).exceeded
    )
    assert len(exceeded) == 1
    assert damaged_name in exceeded[0]


@pytest.mark.parametrize(
    ("kind", "size", "damaged"),
    [("q8_0", 1e-5, False), ("f16", 1e-8, False), ("q8_0", 0.01, True), ("f16", 1e-5, True)],
)
def test_weights_too_small_for_a_type_may_become_zero(tmp_path, kind, size, damaged):
    """llama.cpp's q8_0 makes zeros of weights around 1e-6; rows of unused tokens have fewer."""
    model, name = tmp_path / "model", "model.layers.1.mlp.up_proj.weight"
    shutil.copytree(TINY / "base", model)
    (file,) = model.glob("*.safetensors")
    tensors = load_file(file)
    tensors[name] = (torch.randn(tensors[name].shape) * size).to(tensors[name].dtype)
    save_file(tensors, file, {"format": "pt"})
    view = View(lambda tensor, data: data * (tensor != name), model)
    view.stored = kind

    found = measure(model, view, ROWS, 300, lambda done, total: None)

    assert [fault.tensor for fault in found.damaged] == [name] * damaged


def test_weights_of_any_distribution_are_no_damage():
    """A row or a block with one large weight has a larger error, as rounding would have it."""
    random = np.random.default_rng(0)

    def spiked(shape):
        made = random.standard_t(2, shape).astype(np.float32)
        made[:, 7] *= 50
        return made

    for block, kind in ((32, "q4_0"), (0, "int-quantized")):
        rows = spiked((256, 512))
        blocks = rows.reshape(-1, block or 512)
        steps = np.abs(blocks).max(1, keepdims=True) / (7 if block else 127)
        rounded = (np.round(blocks / steps) * steps).reshape(rows.shape)
        error = np.linalg.norm(rounded - rows) / np.linalg.norm(rows)

        assert error > 0
        assert error < ROUNDING[kind].limit(torch.from_numpy(rows))
        assert ROUNDING[kind].limit(torch.from_numpy(rows)) < 1, "zeros would pass"


def test_values_that_are_no_numbers_and_another_shape_are_refused():
    def poisoned(name, data):
        return np.where(data == data.max(), np.nan, data) if "layers.1.mlp.up" in name else data

    with pytest.raises(CheckFailed, match=r"layers\.1\.mlp\.up_proj\.weight has NaN"):
        measured(View(poisoned))
    with pytest.raises(CheckFailed, match="has shape"):
        measured(View(lambda name, data: data[:-1]))


@pytest.mark.parametrize("more", [1, 300])
@pytest.mark.parametrize("name", ["layers.1.mlp.up_proj", "embed_tokens"])
def test_a_tensor_with_more_rows_is_refused_by_name(name, more):
    class Longer(View):
        def tensor(self, of):
            data = super().tensor(of)
            return np.concatenate([data, data[:1].repeat(more, 0)]) if name in of else data

    with pytest.raises(CheckFailed, match=rf"{name}\.weight has more than \d+ rows"):
        measured(Longer())


def test_too_little_text_is_reported_with_numbers():
    with pytest.raises(InputRefused, match=r"has \d+ tokens, .* needs 64"):
        measure(TINY / "base", View(), ROWS[:1], 300, lambda done, total: None)


SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def written(folder, config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() == 3:  # experts, which transformers leaves as the memory was
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(folder)
    return model


IDS = torch.stack([torch.arange(20) + 3, torch.arange(20) + 30])
LENGTHS = [20, 12]
"""The second text's last tokens are padding."""
PLACES = [(row, column) for row in range(2) for column in range(LENGTHS[row])]


def assert_same(mine, network):
    with torch.inference_mode():
        wanted = network(IDS).logits.log_softmax(-1)[tuple(zip(*PLACES, strict=True))]
    torch.testing.assert_close(mine.log_probabilities(PLACES), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SMALL, tie_word_embeddings=True),
        Gemma3TextConfig(**SMALL, head_dim=8, final_logit_softcapping=5.0),
        CohereConfig(**SMALL),
        GPT2Config(vocab_size=64, n_layer=2, n_head=4, n_embd=32),
        MixtralConfig(**SMALL, num_local_experts=4),
        Qwen3MoeConfig(**SMALL, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2),
    ],
    ids=lambda config: config.model_type,
)
def test_both_models_run_as_whole_ones(tmp_path, config):
    right = written(tmp_path, config)
    view = View(lambda _, data: np.round(data * 64) / 64, tmp_path)

    found = run_both(tmp_path, view, IDS, LENGTHS, lambda done, total: None)

    rounded = {name: torch.tensor(view.tensor(name)) for name in view.names}
    save_file(rounded, tmp_path / "model.safetensors", {"format": "pt"})
    other = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for mine, whole in ((found.checkpoint, right), (found.quantized, other)):
        assert_same(mine, whole)
        matrices = [p for p in mine.model.parameters() if p.dim() > 1]
        assert all(p.untyped_storage().nbytes() == 4 for p in matrices), "one stayed in memory"
    assert len(found.layers) == 2
    assert all(error > 0 for error in found.layers.values())


def test_padding_is_not_multiplied(tmp_path, monkeypatch):
    written(tmp_path, LlamaConfig(**SMALL))
    counts, multiply = set(), Lockstep.multiply
    monkeypatch.setattr(
        Lockstep,
        "multiply",
        lambda self, key, inputs, matrix: (
            counts.add(len(inputs)) or multiply(self, key, inputs, matrix)
        ),
    )

    run_both(tmp_path, View(model=tmp_path), IDS, LENGTHS, lambda done, total: None)

    assert counts == {sum(LENGTHS), sum(LENGTHS) + LENGTHS[0]}


def test_an_architecture_that_cannot_be_streamed_is_measured_in_memory(tmp_path):
    """Jamba's state spaces use weights without calling their module."""
    sizes = {"mamba_d_state": 8, "mamba_dt_rank": 8, "num_experts": 1, "use_mamba_kernels": False}
    config = JambaConfig(**SMALL, **sizes, attn_layer_offset=1, attn_layer_period=2)
    right = written(tmp_path, config)

    found = run_both(tmp_path, View(model=tmp_path), IDS, LENGTHS, lambda done, total: None)

    for mine in (found.checkpoint, found.quantized):
        assert_same(mine, right)
    assert found.layers == {0: 0, 1: 0}


def test_only_the_language_model_of_a_multimodal_one_needs_quantized_weights(tmp_path):
    """llama.cpp writes the vision tower to a file of its own."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62}
    text = SMALL | {"head_dim": 8}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    right = written(tmp_path, config)
    view = View(model=tmp_path)
    view.names = frozenset(name for name in view.names if name.startswith("language_model."))

    found = run_both(tmp_path, view, IDS, LENGTHS, lambda done, total: None)

    assert_same(found.quantized, right)
    assert found.layers == {0: 0, 1: 0}


def test_a_tensor_that_the_quantizer_left_out_is_not_taken_from_the_checkpoint():
    view = View()
    view.names -= {"model.layers.1.mlp.up_proj.weight"}

    with pytest.raises(Unmeasurable, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        measured(view)


def test_a_checkpoint_without_one_of_its_tensors_is_not_measured(tmp_path):
    written(tmp_path, LlamaConfig(**SMALL))
    held = load_file(tmp_path / "model.safetensors")
    del held["model.norm.weight"]
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})

    with pytest.raises(Unmeasurable, match=r"no tensor model\.norm\.weight"):
        run_both(tmp_path, View(model=tmp_path), IDS, LENGTHS, lambda done, total: None)


def test_experts_that_get_no_token_are_compared_too(tmp_path):
    model = make_model(tmp_path, "qwen3_moe", num_experts=64, num_experts_per_tok=1)

    class Louder(View):
        def tensor(self, name):
            return self.truth.tensor(name) * (1.25 if ".experts." in name else 1)

    found = run_both(model, Louder(model=model), torch.arange(8)[None], [8], lambda *_: None)

    errors = [error for name, error in found.errors.items() if ".experts." in name]
    assert errors == [0.25] * 3 * 3 * 64


def logs(rows):
    return torch.log_softmax(torch.tensor(rows), -1)


def totals(shifts, length=25, seed=0):
    """Texts of equal length; the other model's first logit is shifted by so much in each."""
    chance, found = np.random.default_rng(seed), Totals()
    for number, shift in enumerate(shifts):
        rows = chance.normal(size=(length, 5)).astype(np.float32)
        other = rows + np.float32(shift) * np.eye(1, 5, dtype=np.float32)
        following = torch.tensor(chance.integers(5, size=length))
        found.add(logs(rows), logs(other), following, torch.full((length,), number))
    return found


def test_an_interval_is_that_of_means_of_texts():
    """With texts of one length, against numpy drawing the texts' own means."""
    found = totals([0.0, 0.2, 0.4, 0.8, 1.6, 0.1, 0.3, 0.5])
    result = found.result()
    means = [float(part.mean()) for part in found.divergences]
    chance = np.random.default_rng(1)
    drawn = chance.choice(means, size=(20_000, len(means))).mean(1)

    low, high = result["intervals"]["kl_mean"]
    assert result["kl_mean"] == pytest.approx(np.mean(means), rel=1e-5)
    assert low == pytest.approx(np.quantile(drawn, 0.025), rel=0.1)
    assert high == pytest.approx(np.quantile(drawn, 0.975), rel=0.1)


def test_intervals_hold_the_values_and_are_always_the_same():
    shifts = [0.1, 0.5, 0.9, 0.2, 0.7]
    result, same = totals(shifts).result(), totals([0.0] * 6).result()

    assert result == totals(shifts).result()
    for name, (low, high) in result["intervals"].items():
        assert low <= result[name] <= high
        assert math.isfinite(high)
    assert same["kl_mean"] == same["kl_p99"] == 0.0
    assert same["intervals"]["top1"] == same["intervals"]["perplexity_ratio"] == (1.0, 1.0)
    assert totals([0.1, 0.5, 0.9]).result()["intervals"] == {}  # too few texts


HEIGHT = 3 * TILE + 7
VALUES = torch.arange(HEIGHT * 2, dtype=torch.float32).reshape(HEIGHT, 2)


class Counting:
    def __init__(self, room=1 << 20):
        self.read: list[int] = []
        self.compared: dict[int, Squares] = {}
        self.tiles = LazyMatrix(VALUES.shape, self.rows, self.compared, self.squares, _room=room)

    def rows(self, first, last):
        self.read.append(first)
        return VALUES[first:last].clone()

    def squares(self, first, tile):
        return Squares(float(first), float(len(tile)))


@pytest.mark.parametrize("room", [0, 1 << 20])
@pytest.mark.parametrize(
    "where", [slice(0, 1), slice(TILE - 3, 2 * TILE + 3), slice(0, HEIGHT), slice(9, 9)]
)
def test_any_rows_are_those_of_the_whole(where, room):
    assert torch.equal(Counting(room).tiles[where], VALUES[where])


def test_an_embedding_gets_its_rows_and_every_tile_is_compared():
    made = Counting()
    rows = torch.tensor([HEIGHT - 1, 0, TILE, 0])

    assert torch.equal(made.tiles[rows], VALUES[rows])
    assert list(made.compared) == [0, TILE, 2 * TILE, 3 * TILE]
    assert sum(one.size for one in made.compared.values()) == HEIGHT


def test_what_fits_stays_and_the_rest_is_read_again_but_compared_once():
    made = Counting(room=TILE * 2 * 4)

    for _ in range(2):
        assert torch.equal(made.tiles[0:HEIGHT], VALUES)

    assert made.read.count(0) == 1
    assert made.read.count(2 * TILE) == 2
    assert len(made.compared) == 4


def test_several_threads_may_read_it():
    made, wrong = Counting(room=TILE * 8), list[int]()

    def read(first):
        for at in range(first, HEIGHT, 5):
            if not torch.equal(made.tiles[at : at + 9], VALUES[at : at + 9]):
                wrong.append(at)

    threads = [threading.Thread(target=read, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not wrong
    assert sum(one.size for one in made.compared.values()) == HEIGHT
