"""AWQ and GPTQ layer by layer: every architecture, experts, what is kept, and going on."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from weightsmith.core.errors import InputRefused
from weightsmith.forward.layers import Layers
from weightsmith.models.facts import read_facts
from weightsmith.models.tensors import CheckpointTensors
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.architectures import GROUPED, SCANNING
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.layerwise import quantizing
from weightsmith.quantizers.layerwise.observing import Observer
from weightsmith.quantizers.layerwise.quantizing import scale_layer
from weightsmith.quantizers.packed import PackedLayout, view_of
from weightsmith.quantizers.packed_check import check_checkpoint
from weightsmith.quantizers.quality.measure import measure
from weightsmith.quantizers.running import ProgramSettings

from tests.fakes.configs import LLAMA_8B, facts
from tests.fakes.decoders import make_dense
from tests.unit.quantizers.conftest import make_any

ROWS = [json.loads(line) for line in GENERAL.read_text("utf-8").splitlines()[:3]]
CELLS = [(name, method) for name in sorted(GROUPED) for method in ("awq", "gptq")]
MOST = 0.35


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")

    return cache(lambda architecture: make_any(root / architecture, architecture))


def settings(model, out, method, keep=()):
    out.mkdir(exist_ok=True)
    texts = out.with_suffix(".jsonl")
    texts.write_text("".join(json.dumps({**row, "tokens": 1}) + "\n" for row in ROWS[1:]))
    told = {"method": method, "group_size": 32, "keep": keep}
    return ProgramSettings(model=model, out=out, calibration=str(texts), **told)


def layout(method):
    return PackedLayout(method=method, bits=4, group_size=32, symmetric=method == "gptq")


@pytest.mark.grid(15)
@pytest.mark.parametrize(("architecture", "method"), CELLS)
def test_a_model_of_this_architecture_becomes_this_format(models, tmp_path, architecture, method):
    model, out = models(architecture), tmp_path / "out"
    of_format(method).check_input(formats()[method], read_facts(model))

    quantizing.quantize(settings(model, out, method))

    check_checkpoint(out, model, layout(method))
    found = measure(model, view_of(out, model), ROWS[:1], 100, lambda *_: None)
    assert found.kl_mean > 0
    assert 0 < found.layer_error < MOST
    assert not (out / ".engine").exists()
    # Engines must be told of every linear layer that stays as it is.
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    source, made = CheckpointTensors(model), CheckpointTensors(out)
    linear = {
        name
        for name in source.names & made.names
        if name.endswith("_proj.weight") and len(source.info(name).shape) == 2
    }
    assert linear <= {f"{name}.weight" for name in config.get("modules_to_not_convert") or ()}


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        *((scanning, method) for scanning in sorted(SCANNING) for method in ("awq", "gptq")),
        *(("PaliGemmaForConditionalGeneration", method) for method in ("awq", "gptq", "nvfp4")),
    ],
)
def test_what_the_walk_cannot_do_is_refused(architecture, method):
    model = facts({**LLAMA_8B, "architectures": [architecture]})

    with pytest.raises(InputRefused, match=f"unsupported architecture {architecture}"):
        of_format(method).check_input(formats()[method], model)


@pytest.mark.parametrize(
    ("architecture", "scaled"),
    [
        ("LlamaForCausalLM", {"input_layernorm", "post_attention_layernorm", "mlp.up_proj"}),
        ("Gemma2ForCausalLM", {"input_layernorm", "pre_feedforward_layernorm", "mlp.up_proj"}),
        ("Cohere2ForCausalLM", {"input_layernorm", "mlp.up_proj"}),  # one norm for both
        ("Olmo2ForCausalLM", {"mlp.up_proj"}),  # norms behind the matrices
        # The router gets the other norm's output, too.
        ("Qwen3MoeForCausalLM", {"input_layernorm", "self_attn.v_proj"}),
    ],
)
def test_scaling_changes_no_output(models, monkeypatch, architecture, scaled):
    draw = torch.Generator().manual_seed(2)
    monkeypatch.setattr(
        quantizing,
        "best_factors",
        lambda weights, *_: torch.rand(weights[0].shape[1], generator=draw) * 4 + 0.3,
    )
    ids = torch.randint(5, 500, (2, 40), generator=torch.Generator().manual_seed(1)).tolist()
    layers = Layers(models(architecture), ids)
    with layers.loaded(0) as layer:
        names = [name for name, module in layer.named_modules() if type(module) is torch.nn.Linear]
        observer = Observer(layer, names)
        with observer.watching(layers.batches[0].valid):
            before = layers.run(0, 0)
        modules = {id(module): name for name, module in layer.named_modules()}
        changed = {
            modules[id(one)] for one in scale_layer(observer.groups, 32, lambda _: torch.bfloat16)
        }
        after = layers.run(0, 0)

    assert changed == scaled
    assert float((after - before).norm()) < 1e-4 * float(before.norm())


def test_an_expert_that_sees_little_is_named_and_sees_all(models, tmp_path, monkeypatch):
    model, out = models("Qwen3MoeForCausalLM"), tmp_path / "out"
    seen = []
    own = quantizing.Moments.of
    monkeypatch.setattr(
        quantizing.Moments, "of", lambda rows: (seen.append(len(rows)), own(rows))[1]
    )
    monkeypatch.setattr(quantizing, "MIN_TOKENS", 10**6)

    quantizing.quantize(settings(model, out, "awq"))

    told = json.loads((out / ".calibrated.json").read_text())
    assert len(told["experts_with_few_tokens"]) == 8  # four in each of two layers
    assert re.fullmatch(r"layer 0\.0 \(\d+\)", told["experts_with_few_tokens"][0])
    assert "experts saw fewer than 1000000 calibration tokens" in told["warnings"][0]
    assert set(seen) == {told["calibration_tokens"]}


def test_what_is_kept_keeps_its_bytes(models, tmp_path):
    model, out = models("LlamaForCausalLM"), tmp_path / "out"
    keep = ("down_proj", "layers.1.self_attn.o_proj")

    quantizing.quantize(settings(model, out, "awq", keep))

    check_checkpoint(out, model, layout("awq"), keep)
    made, source = CheckpointTensors(out), CheckpointTensors(model)
    kept = {n for n in source.names if "down_proj" in n or "layers.1.self_attn.o_proj" in n}
    assert all(made.raw(n).tobytes() == source.raw(n).tobytes() for n in kept)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == sorted(n.removesuffix(".weight") for n in kept)
    every = tuple(name.removesuffix(".weight") for name in source.names if "_proj" in name)
    with pytest.raises(InputRefused, match="nothing would be quantized"):
        quantizing.quantize(settings(model, out, "gptq", every))


@pytest.mark.slow
@pytest.mark.grid(4)
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_killed_walk_goes_on_at_its_layer(models, tmp_path, monkeypatch, method):
    model = models("Qwen3MoeForCausalLM")
    quantizing.quantize(settings(model, tmp_path / "whole", method))
    wanted, run = settings(model, tmp_path / "out", method), killed_at(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        quantizing.quantize(wanted)
    quantizing.quantize(wanted)

    assert run == [0, 1, 1]
    for name in ("model.safetensors", "config.json", ".calibrated.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def killed_at(count, monkeypatch):
    """Interrupt the walk at its n-th layer; return the layers' numbers as they run."""
    run, own = [], quantizing._layer

    def layer(walk, number, *more):
        run.append(number)
        if len(run) == count:
            raise KeyboardInterrupt
        return own(walk, number, *more)

    monkeypatch.setattr(quantizing, "_layer", layer)
    return run


def test_other_texts_begin_again(models, tmp_path, monkeypatch):
    wanted = settings(models("LlamaForCausalLM"), tmp_path / "out", "gptq")
    run = killed_at(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        quantizing.quantize(wanted)
    texts = Path(wanted.calibration)
    texts.write_text(texts.read_text() + json.dumps({**ROWS[0], "tokens": 1}) + "\n")
    quantizing.quantize(wanted)

    assert run == [0, 1, 0, 1]


def changed(model, change):
    """A small Llama whose tensors are changed."""
    make_dense(model, "LlamaForCausalLM")
    tensors = {
        name: change(name, tensor)
        for name, tensor in load_file(model / "model.safetensors").items()
    }
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    return model


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scaled_norms_keep_the_checkpoints_type(tmp_path, dtype):
    model, out = changed(tmp_path / "model", lambda _, one: one.to(dtype)), tmp_path / "out"

    quantizing.quantize(settings(model, out, "awq"))

    check_checkpoint(out, model, layout("awq"))
    norm = load_file(out / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    assert norm.dtype == dtype
    assert bool(norm.isfinite().all())


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_matrix_of_zeros_stays_one(tmp_path, method):
    model, out = tmp_path / "model", tmp_path / "out"
    changed(model, lambda name, one: one * 0 if "o_proj" in name or "up_proj" in name else one)

    quantizing.quantize(settings(model, out, method))

    check_checkpoint(out, model, layout(method))
    view = view_of(out, model)
    assert not view.tensor("model.layers.1.self_attn.o_proj.weight").any()


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("layers.1.mlp.up_proj.weight", r"layers\.1\.mlp\.up_proj\.weight has NaN or infinite"),
        ("layers.1.input_layernorm.weight", r"1\.input_layernorm\.weight has NaN or infinite"),
        ("embed_tokens.weight", r"layers\.0 makes NaN or infinite values"),
    ],
)
def test_what_is_not_finite_is_refused(tmp_path, part, message):
    def damaged(name, one):
        if name.endswith(part):
            one.view(-1)[:] = torch.inf
        return one

    model = changed(tmp_path / "model", damaged)

    with pytest.raises(InputRefused, match=message):
        quantizing.quantize(settings(model, tmp_path / "out", "gptq"))


def test_a_token_without_a_row_is_refused(tmp_path):
    model = changed(tmp_path / "model", lambda name, one: one[:200] if len(one) >= 500 else one)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 200}))

    with pytest.raises(InputRefused, match="embedding has only 200 rows"):
        quantizing.quantize(settings(model, tmp_path / "out", "gptq"))
