"""Whatever a config.json says: a plan that adds up, or an error that explains; no traceback.

Real configurations of known models, with fields taken away, added and replaced by what is absurd.
"""

import copy
import json
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from weightsmith.api.commands.render import foresee_model
from weightsmith.building.targets import all_targets
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.parameters import weights_from_config
from weightsmith.stages.render import render

from tests.fakes.configs import facts
from tests.golden.cases import MODELS, model

ENGINES = ["vllm", "vllm-awq", "sglang", "trtllm", "tgi", "llamacpp-q4_k_m"]
FIELDS = """
architectures attention_chunk_size attn_layer_indices attn_layer_period attn_layer_offset
decoder_sparse_step dtype first_k_dense_replace full_attention_interval head_dim
hybrid_override_pattern index_topk intermediate_size is_encoder_decoder kv_lora_rank layer_types
layers_block_type linear_key_head_dim linear_num_key_heads linear_num_value_heads
linear_value_head_dim mamba_d_state mamba_n_heads max_window_layers mlp_only_layers model_type
moe_layer_end_index moe_num_experts
multi_query no_rope_layers num_key_value_heads num_kv_shared_layers num_local_experts
original_max_position_embeddings qk_rope_head_dim quantization_config rope_parameters rope_scaling
sliding_window sliding_window_pattern state_size text_config tie_word_embeddings tokenizer
torch_dtype use_sliding_window v_head_dim vision_config vocab_size
""".split()  # noqa: SIM905
absurd = (
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 1, 3, 7, 128, 10**12, 2**70, 1.5, float("nan"), float("inf")])
    | st.sampled_from(["", "x", "sliding_attention", {}, {"a": 1}, {"factor": -1}, [], [1], ["a"]])
    | st.sampled_from([[{}], [None] * 62, ["sliding_attention"] * 62, {"rope_type": "yarn"}])
)


@st.composite
def lies(draw):
    """A known model's configuration, with up to three fields that are not true."""
    config = copy.deepcopy(model(draw(st.sampled_from(MODELS)))["config"])
    for _ in range(draw(st.integers(1, 3))):
        inner = config.get("text_config")
        place = inner if isinstance(inner, dict) and draw(st.booleans()) else config
        field = draw(st.sampled_from([*sorted(place), *FIELDS]))
        nested = place.get(field)
        if isinstance(nested, dict) and nested and draw(st.booleans()):
            nested[draw(st.sampled_from(sorted(nested)))] = draw(absurd)
        elif draw(st.integers(0, 5)):
            place[field] = draw(absurd)
        else:
            place.pop(field, None)
    return config


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lies(), st.sampled_from(ENGINES), st.sampled_from(["", "nvidia-l40s", "nvidia-h100-80gb"]))
def test_a_lie_is_planned_soundly_or_refused(config, target, gpu):
    options = ServeOptions(gpu=gpu, host_memory_bytes=64 << 30)
    try:
        plan = render(
            target=all_targets()[target],
            name="lie",
            version="1",
            model=facts(config),
            model_file="",
            weight_bytes=16_000_000_000,
            options=options,
            image="",
            made_from=(),
        ).plan
    except (UsageError, InputRefused):
        return
    assert json.dumps(plan.to_json(), allow_nan=False)
    assert min(plan.max_model_len, plan.max_num_seqs, plan.kv_bytes_per_request) > 0
    assert plan.kv_bytes_total <= plan.kv_cache_bytes * max(1, plan.gpus) or not plan.fits


@settings(max_examples=300, deadline=None)
@given(lies())
def test_a_lie_is_weighed_or_refused(config):
    with suppress(InputRefused):
        assert weights_from_config(facts(config)) > 0


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", '{"architectures": NaN}', "\x00", ""])
def test_a_file_that_is_no_configuration(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputRefused):
        foresee_model(tmp_path)
