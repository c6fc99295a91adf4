"""Traps of TGI 3.3: launcher/src/main.rs and backends/v3/src/main.rs."""

import pytest
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.serving import engines
from weightsmith.serving.memory import GIB

from tests.fakes.configs import LLAMA_8B
from tests.fakes.rendering import L40S, rendered


def test_tgi_has_larger_blocks_where_flashinfer_has_no_kernel():
    narrow = {**LLAMA_8B, "head_dim": 96}

    assert rendered("tgi", **L40S).plan.kv_bytes_per_request == 8192 * 131072
    odd = rendered("tgi", config=narrow, **{**L40S, "max_model_len": 8000}).plan
    assert odd.kv_bytes_per_request == 8192 * 32 * 8 * 2 * 96 * 2


def test_tgi_takes_gemma_3s_prompts_whole():
    gemma = {
        **LLAMA_8B,
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
    }
    config = rendered("tgi", config=gemma, **L40S)

    # "`max_batch_prefill_tokens` must be >= `max_input_tokens`", where prompts are not divided.
    assert int(config.env["MAX_BATCH_PREFILL_TOKENS"]) >= int(config.env["MAX_INPUT_TOKENS"])


def test_tgi_says_that_it_is_over():
    config = rendered("tgi", **L40S)

    assert any("archived" in note for note in config.plan.notes)
    assert engines()["tgi"].legacy


def test_tgi_needs_no_root_for_its_port_and_no_arguments():
    config = rendered("tgi", **L40S, extra={"max-best-of": 1, "json_output": True})

    assert int(config.env["PORT"]) == config.port >= 1024
    assert config.command == ()
    assert (config.env["MAX_BEST_OF"], config.env["JSON_OUTPUT"]) == ("1", "true")
    assert config.env.get("KV_CACHE_DTYPE", True)


def test_tgi_names_its_eight_bit_type_in_full():
    config = rendered("tgi", **L40S, kv_cache_dtype="fp8")

    assert config.env["KV_CACHE_DTYPE"] == "fp8_e4m3fn"


@pytest.mark.parametrize("gpu", ["nvidia-b200", "nvidia-rtx-5090", "nvidia-t4", "amd-mi300x"])
def test_tgi_has_kernels_for_some_gpus_only(gpu):
    with pytest.raises(UsageError, match="no kernels"):
        rendered("tgi", weights=4 * GIB, gpu=gpu, max_model_len=1024, max_num_seqs=1)


def test_tgi_cannot_read_later_tokenizers():
    config = {**LLAMA_8B, "tokenizer": {"tokenizer_class": "TokenizersBackend"}}

    with pytest.raises(InputRefused, match="transformers 5"):
        rendered("tgi", config=config, **L40S)


@pytest.mark.parametrize(
    ("rope", "told", "refused"),
    [
        ({"rope_type": "default", "rope_theta": 500000.0}, {}, True),
        ({"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}, {}, True),
        ({"full_attention": {"rope_theta": 10000.0}}, {}, True),
        ({"rope_type": "default", "rope_theta": 10000.0}, {}, False),
        ({"rope_type": "default", "rope_theta": 500000.0}, {"rope_theta": 500000.0}, False),
    ],
)
def test_tgi_does_not_read_later_rotations(rope, told, refused):
    plain = {k: v for k, v in LLAMA_8B.items() if k not in ("rope_theta", "rope_scaling")}
    config = {**plain, "rope_parameters": rope, **told}

    if refused:
        with pytest.raises(InputRefused, match="rope_parameters"):
            rendered("tgi", config=config, **L40S)
    else:
        assert rendered("tgi", config=config, **L40S)


def test_tgi_knows_no_later_models():
    with pytest.raises(InputRefused, match="qwen3"):
        rendered("tgi", config={**LLAMA_8B, "model_type": "qwen3"}, **L40S)
