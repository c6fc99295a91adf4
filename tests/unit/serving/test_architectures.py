import pytest
from weightsmith.checkpoints.attention import cache_layers
from weightsmith.errors import InputRefused, UsageError
from weightsmith.serving import llamacpp, vllm
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.length import lengths
from weightsmith.serving.memory import GIB
from weightsmith.serving.paged import paged_cache

from tests.fakes.configs import LLAMA_8B, facts, shape_of

LLAMA = {**LLAMA_8B, "max_position_embeddings": 8192}
L40S = ServeOptions(gpu="nvidia-l40s", max_model_len=4096, max_num_seqs=2)


def kinds(**changes):
    config = {**LLAMA, **changes}
    layers, window = config["num_hidden_layers"], config.get("sliding_window") or 0
    found = cache_layers(config["architectures"][0], config, layers, window)
    return {part.kind: part.layers for part in found}


@pytest.mark.parametrize("module", [vllm, llamacpp])
def test_an_unknown_architecture_is_planned_where_its_cache_is_certain(module):
    plan = module.ENGINE.plan(
        facts({**LLAMA, "architectures": ["NovelForCausalLM"]}), 4 * GIB, L40S
    )

    assert any("NovelForCausalLM is not known: planned as 32 layers" in n for n in plan.notes)
    assert plan.kv_bytes_per_token == 131072


@pytest.mark.parametrize("module", [vllm, llamacpp])
@pytest.mark.parametrize(
    "strange", [{"mamba_d_state": 64}, {"kv_lora_rank": 512}, {"index_topk": 2048}]
)
def test_an_unknown_architecture_with_a_way_of_its_own_is_refused(module, strange):
    with pytest.raises(InputRefused, match="NovelForCausalLM") as caught:
        module.ENGINE.plan(
            facts({**LLAMA, "architectures": ["NovelForCausalLM"], **strange}), 4 * GIB, L40S
        )

    assert caught.value.exit_code == 3


def test_encoders_with_decoders_are_refused():
    with pytest.raises(InputRefused, match="encoder"):
        vllm.plan(facts({**LLAMA, "is_encoder_decoder": True}), 4 * GIB, L40S)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"full": 32}),
        ({"sliding_window": 4096, "architectures": ["MistralForCausalLM"]}, {"sliding": 32}),
        (
            {"sliding_window": 4096, "architectures": ["Gemma2ForCausalLM"]},
            {"full": 16, "sliding": 16},
        ),
        (
            {"sliding_window": 512, "_sliding_window_pattern": 4},
            {"full": 8, "sliding": 24},
        ),
        (
            {"sliding_window": 4096, "use_sliding_window": True, "max_window_layers": 20},
            {"full": 20, "sliding": 12},
        ),
        ({"layer_types": ["sliding_attention"] * 32}, {"full": 32}),
        (
            {"attention_chunk_size": 8192, "no_rope_layers": [1, 0] * 16},
            {"full": 16, "chunked": 16},
        ),
        (
            {"attn_layer_period": 8, "attn_layer_offset": 4, "mamba_d_state": 16},
            {"full": 4, "state": 28},
        ),
        ({"attn_layer_indices": [3, 7], "mamba_d_state": 16}, {"full": 2, "state": 30}),
        ({"hybrid_override_pattern": "M-M*" * 8, "ssm_state_size": 16}, {"full": 8, "state": 16}),
        ({"num_kv_shared_layers": 12}, {"full": 20}),
    ],
)
def test_layers_are_counted_by_what_they_keep(changes, expected):
    assert kinds(**changes) == expected


def test_an_unknown_kind_of_layer_is_refused():
    with pytest.raises(InputRefused, match="retention"):
        kinds(layer_types=["retention"] * 32)


def test_one_head_for_all_queries():
    falcon = {**LLAMA, "architectures": ["FalconForCausalLM"], "multi_query": True}
    del falcon["num_key_value_heads"]

    assert shape_of(falcon).kv_heads == 1
    newer = {**falcon, "new_decoder_architecture": True, "num_kv_heads": 8}
    assert shape_of(newer).kv_heads == 8


@pytest.mark.parametrize(
    ("changes", "default", "most"),
    [
        ({}, 8192, 8192),
        ({"seq_length": 2048}, 2048, 2048),
        ({"tokenizer": {"model_max_length": 4096}}, 4096, 4096),
        ({"tokenizer": {"model_max_length": 10**30}}, 8192, 8192),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 32768, 32768),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, 16384, 16384),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 8192, 8192),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, 8192, 8192),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}},
            16384,
            16384,
        ),
        (
            {"model_type": "gemma3_text", "rope_scaling": {"rope_type": "linear", "factor": 8}},
            8192,
            8192,
        ),
        (
            {"rope_scaling": {"rope_type": "longrope"}, "original_max_position_embeddings": 4096},
            4096,
            8192,
        ),
    ],
)
def test_a_models_length_is_vllms(changes, default, most):
    found = lengths(facts({**LLAMA, **changes}))

    assert (found.default, found.most) == (default, most)


@pytest.mark.parametrize("factor", [-1, 0, 10**9, "8", True])
def test_a_lying_factor_is_refused(factor):
    with pytest.raises(InputRefused, match="factor"):
        lengths(facts({**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": factor}}))


def test_a_state_of_unknown_size_is_refused():
    shape = shape_of({**LLAMA, "layer_types": ["mamba", "attention"] * 16})

    with pytest.raises(InputRefused, match="how large a state"):
        paged_cache(shape, block=16, element=2, state_element=2)


def test_llamacpp_reads_the_wishes_of_every_engine():
    wishes = {"host_memory_bytes": 64 * GIB, "max_model_len": 1024, "max_num_seqs": 2}
    plan = llamacpp.ENGINE.plan(
        facts(LLAMA), GIB, ServeOptions(**wishes, kv_cache_dtype="fp8", max_num_batched_tokens=256)
    )

    assert plan.settings["cache-type-k"] == plan.settings["cache-type-v"] == "q8_0"
    assert (plan.settings["batch-size"], plan.settings["ubatch-size"]) == (256, 256)
    for wish in ({"dtype": "float16"}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        with pytest.raises(UsageError):
            llamacpp.ENGINE.plan(facts(LLAMA), GIB, ServeOptions(**wishes, **wish))


def test_a_misfit_of_llamacpp_carries_its_plan():
    with pytest.raises(UsageError) as caught:
        llamacpp.ENGINE.plan(
            facts(LLAMA),
            5 * GIB,
            ServeOptions(max_model_len=8192, max_num_seqs=16, host_memory_bytes=12 * GIB),
        )

    told = caught.value.details["plan"]
    assert told.fits is False
    assert {"max_model_len", "max_num_seqs"} <= set(told.nearest[0])
