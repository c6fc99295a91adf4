"""Models that are no causal ones, heads with biases, odd kinds: right merges of them pass."""

from pathlib import Path

import pytest

from tests.unit.validating.conftest import edit_tensors, held, make_model, make_tuned, merged, tell

NOT_CAUSAL = {
    "bart": "an encoder with a decoder, cannot be run",
    "whisper": "an encoder with a decoder, cannot be run",
    "t5": "an encoder with a decoder, cannot be run",
    "roberta": "RobertaForSequenceClassification cannot be run",
    "bert": "BertForMaskedLM cannot be run",
    "vectors": "MistralModel cannot be run",
    "llama": "LlamaForSequenceClassification cannot be run",
}


@pytest.mark.parametrize("kind", NOT_CAUSAL)
def test_a_model_of_which_only_a_part_would_run_is_checked_by_its_files(kind, tmp_path):
    """Transformers has a causal class for each, without the encoder or with another head."""
    import transformers
    from peft import LoraConfig, get_peft_model

    small = {"vocab_size": 96, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    small |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    small |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "pad_token_id": 0, "eos_token_id": 2}
    plain = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "pad_token_id": 0}
    plain |= {"num_attention_heads": 2, "intermediate_size": 48}
    model = {
        "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**small)),
        "whisper": lambda: transformers.WhisperForConditionalGeneration(
            transformers.WhisperConfig(**small, bos_token_id=1, decoder_start_token_id=1)
        ),
        "llama": lambda: transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**plain)
        ),
        "t5": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(vocab_size=96, d_model=32, d_kv=16, d_ff=48, num_layers=1)
        ),
        "roberta": lambda: transformers.RobertaForSequenceClassification(
            transformers.RobertaConfig(**plain)
        ),
        "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**plain)),
        "vectors": lambda: transformers.MistralModel(
            transformers.MistralConfig(**plain, num_key_value_heads=2)
        ),
    }[kind]()
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    out = merged(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")

    found = held(tmp_path / "base", out, tmp_path / "adapter")

    assert found.passed
    assert any(NOT_CAUSAL[kind] in each.message for each in found.findings)


def test_a_heads_bias_that_an_adapter_trains_is_validated(tmp_path):
    """Phi's head has a bias, and with `bias: all` it is the adapter's."""
    import transformers
    from peft import LoraConfig, get_peft_model

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "pad_token_id": 0}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 2}
    model = transformers.PhiForCausalLM(transformers.PhiConfig(**sizes))
    model.save_pretrained(tmp_path / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], bias="all", init_lora_weights=False)
    tuned = get_peft_model(model, config)
    tuned.base_model.model.lm_head.bias.data += 0.5
    tuned.save_pretrained(tmp_path / "adapter")
    out = merged(tmp_path / "out", tmp_path / "base", tmp_path / "adapter")

    found = held(tmp_path / "base", out, tmp_path / "adapter")

    assert found.passed
    assert found.top1_agreement == 1.0


def test_layers_that_the_base_stores_in_one_tensor_are_compared_one_by_one(tmp_path):
    """Of Sarvam's query, key and value, which are one tensor, the adapter changes two."""
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    from tests.unit.merging.oracle import make_base, train

    base = make_base(tmp_path / "base", "sarvam_moe")
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    adapter = train(base, "sarvam_moe", tmp_path / "adapter", config)
    out = merged(tmp_path / "out", base, adapter)

    found = held(base, out, adapter)

    assert found.passed
    assert found.comparison.streamed
    file = out / "model.safetensors"
    tensors = load_file(file)
    fused = "model.layers.1.attention.query_key_value.weight"
    for row, part in ((3, "q_proj"), (35, "k_proj"), (50, "v_proj")):
        wrong = tensors[fused].clone()
        wrong[row, 5] += 0.1
        save_file(tensors | {fused: wrong}, file, {"format": "pt"})

        findings = held(base, out, adapter).findings
        said = [one.message for one in findings if one.check == "elements"]

        assert len(said) == 1
        assert f"self_attn.{part}.weight: 1 element differs" in said[0]


def test_norms_that_peft_exchanges_pass(tmp_path: Path) -> None:
    from peft import LNTuningConfig

    base = make_model(tmp_path / "base")
    config = LNTuningConfig(target_modules=["input_layernorm", "norm"])
    tuned = make_tuned(tmp_path / "tuned", base, config)
    out = merged(tmp_path / "out", base, tuned)

    result = held(base, out, tuned)

    assert result.passed, tell(result)
    assert not held(base, base, tuned).passed


@pytest.mark.grid(2)
@pytest.mark.parametrize("kind", ["OSFConfig", "PsoftConfig", "FrodConfig", "TinyLoraConfig"])
def test_a_kind_that_decomposes_the_base_is_loaded_whole(tmp_path: Path, kind: str) -> None:
    """PEFT needs the weights as it loads the adapter, and here they are read later."""
    import peft

    base = make_model(tmp_path / "base")
    config = getattr(peft, kind)(target_modules=["q_proj", "up_proj"])
    tuned = make_tuned(tmp_path / "tuned", base, config)
    out = merged(tmp_path / "out", base, tuned)

    result = held(base, out, tuned)

    assert result.passed, tell(result)
    assert not result.comparison.streamed
    assert not [f for f in result.findings if f.severity == "warning"]
    assert result.comparison.elements.wrong == 0
    assert not held(base, base, tuned).passed
    edit_tensors(out, lambda t: t["model.layers.2.mlp.up_proj.weight"][3].zero_())
    assert "model.layers.2.mlp.up_proj.weight" in tell(held(base, out, tuned))
