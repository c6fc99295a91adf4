import json
import re

import pytest
from weightsmith.building.targets import all_targets
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.models.shape import cache_layers
from weightsmith.models.task import of_class
from weightsmith.serving import llamacpp, vllm
from weightsmith.serving.architectures import check_served
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.memory import GIB
from weightsmith.serving.paged_capacity import lengths, paged_cache
from weightsmith.stages.render import render

from tests.fakes.configs import LLAMA_8B, facts, shape_of
from tests.paths import ROOT

LLAMA = {**LLAMA_8B, "max_position_embeddings": 8192}
L40S = ServeOptions(gpu="nvidia-l40s", max_model_len=4096, max_num_seqs=2)


def kinds(**changes):
    config = {**LLAMA, **changes}
    layers, window = config["num_hidden_layers"], config.get("sliding_window") or 0
    found = cache_layers(config["architectures"][0], config, layers, window)
    return {part.kind: part.layers for part in found}


@pytest.mark.parametrize("module", [vllm, llamacpp])
def test_an_unknown_architecture_is_planned_where_its_cache_is_certain(module):
    novel = facts({**LLAMA, "architectures": ["NovelForCausalLM"]})
    plan = module.ENGINE.plan(novel, 4 * GIB, L40S)

    assert any("NovelForCausalLM is not known: planned as 32 layers" in n for n in plan.notes)
    assert plan.kv_bytes_per_token == 131072


@pytest.mark.parametrize("module", [vllm, llamacpp])
@pytest.mark.parametrize(
    "strange", [{"mamba_d_state": 64}, {"kv_lora_rank": 512}, {"index_topk": 2048}]
)
def test_an_unknown_architecture_with_a_way_of_its_own_is_refused(module, strange):
    novel = facts({**LLAMA, "architectures": ["NovelForCausalLM"], **strange})
    with pytest.raises(InputRefused, match="NovelForCausalLM"):
        module.ENGINE.plan(novel, 4 * GIB, L40S)


def test_what_no_target_serves_is_refused_by_its_kind_whatever_else_is_wrong():
    """Not by the keys that its config.json lacks or has: it is no error of the checkpoint."""
    cases = {
        "an encoder with a decoder": {"architectures": ["T5ForConditionalGeneration"]}
        | {"is_encoder_decoder": True, "d_model": 512, "num_layers": 6},
        "marks an answer": {**LLAMA, "architectures": ["LlamaForQuestionAnswering"]},
        "fills gaps in texts": {**LLAMA, "architectures": ["BertForMaskedLM"]},
        "keeps states alone": {"architectures": ["RWKV7ForCausalLM"], "model_type": "rwkv7"},
        "t5 is an encoder with a decoder": {"model_type": "t5", "is_encoder_decoder": True},
        "keeps an index": {**LLAMA, "architectures": ["DeepseekV32ForCausalLM"]},
    }
    for what, config in cases.items():
        with pytest.raises(InputRefused, match=what) as caught:
            check_served(facts(config))

        assert "`merge` and `validate` take it" in caught.value.hint
    assert check_served(facts(LLAMA)) is None


DECODERS = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM")


def of_transformers(*tables):
    """The classes in tables of transformers, and the kind of configuration of each."""
    from transformers.models.auto import modeling_auto as auto

    return {
        name: kind
        for table in reversed(tables)
        for kind, row in reversed(getattr(auto, f"MODEL_FOR_{table}_MAPPING_NAMES").items())
        for name in ([row] if isinstance(row, str) else row)
    }


@pytest.mark.slow
def test_classes_are_told_apart_as_transformers_does():
    continue_texts = set(of_transformers(*DECODERS))
    continue_texts -= {"EvollaForProteinText2Text", "IdeficsForVisionText2Text"}
    others = set(of_transformers(
        *("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING"),
        *("MULTIPLE_CHOICE", "NEXT_SENTENCE_PREDICTION", "TEXT_ENCODING", "MASKED_LM", "BACKBONE"),
        *("IMAGE_CLASSIFICATION", "OBJECT_DETECTION", "AUDIO_CLASSIFICATION", "RETRIEVAL"),
    ))  # fmt: skip
    # Of which some are made into encoders with decoders, and one is named like a decoder.
    others -= {*of_transformers("SEQ_TO_SEQ_CAUSAL_LM"), "FlaubertWithLMHeadModel"}

    def task(name):
        return of_class(name)[1]

    assert {name for name in continue_texts if task(name)} == set()
    assert {name for name in others - continue_texts if not task(name)} == set()


PAGE = ROOT / "docs" / "reference" / "architectures.md"
PUBLISHED = {
    "Glm4MoeForCausalLM": {"head_dim": 128},
    "Glm4vMoeForConditionalGeneration": {"head_dim": 128},
}
"""What published models have, and transformers' defaults lack."""


def config_of(architecture):
    """The configuration of a class with transformers' defaults, as it is written."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = of_transformers(*DECODERS)[architecture]
    config = json.loads(CONFIG_MAPPING[kind]().to_json_string(use_diff=False))
    inner = config.get("text_config", config)
    inner.update(PUBLISHED.get(architecture, {}))
    return {**config, "architectures": [architecture]}


def sections():
    """The classes of the page: in its table, in its two lists, and those that it says are not."""
    text = PAGE.read_text("utf-8")
    table, rest = text.split("\n## Models that see")
    lists, refused = rest.split("\n## What no target serves")
    cells = " ".join(re.findall(r"^\| (.*) \| `", table, re.MULTILINE))
    unplanned = " ".join(re.findall(r"^\| .* \| (.*) \|$", refused, re.MULTILINE)[1:])
    return (
        re.findall(r"\w{10,}", cells),
        re.findall(r"^Also as GGUF: (.*)\.$", lists, re.MULTILINE)[0].split(", "),
        re.findall(r"^Not as GGUF: (.*)\.$", lists, re.MULTILINE)[0].split(", "),
        re.findall(r"\w{10,}", unplanned),
    )


def plan_of(architecture, target):
    """Plan a class of transformers' default size, for the largest GPU."""
    chosen = all_targets()[target]
    options = ServeOptions(gpu="nvidia-b200", max_model_len=1024)
    return render(
        target=chosen,
        name="x",
        version="1",
        model=facts(config_of(architecture)),
        model_file="x.gguf" if target.startswith("llamacpp") else "",
        weight_bytes=4 * GIB,
        options=options,
        image="",
        made_from=(),
    ).plan


@pytest.mark.slow
def test_the_page_and_the_planner_agree():
    packed, as_gguf, not_as_gguf, refused = sections()
    assert min(map(len, (packed, as_gguf, not_as_gguf, refused))) > 10
    for name in (*packed, *as_gguf, *not_as_gguf):
        for target in ("vllm", *(["llamacpp-q8_0"] if name in as_gguf else [])):
            plan = plan_of(name.rstrip("*"), target)

            assert plan.fits, name
            assert not any("is not known" in note for note in plan.notes), (name, plan.notes)
    for name in refused:
        with pytest.raises(InputRefused, match="no target serves"):
            plan_of(name, "vllm")


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


def test_layers_of_an_unknown_kind_or_state_are_refused():
    with pytest.raises(InputRefused, match="retention"):
        kinds(layer_types=["retention"] * 32)
    shape = shape_of({**LLAMA, "layer_types": ["mamba", "attention"] * 16})
    with pytest.raises(InputRefused, match="how large a state"):
        paged_cache(shape, block=16, element=2, state_element=2)


def test_llamacpp_reads_the_wishes_of_every_engine():
    wishes = {"host_memory_bytes": 64 * GIB, "max_model_len": 1024, "max_num_seqs": 2}
    own = ServeOptions(**wishes, kv_cache_dtype="fp8", max_num_batched_tokens=256)
    plan = llamacpp.ENGINE.plan(facts(LLAMA), GIB, own)

    assert plan.settings["cache-type-k"] == plan.settings["cache-type-v"] == "q8_0"
    assert (plan.settings["batch-size"], plan.settings["ubatch-size"]) == (256, 256)
    for wish in ({"dtype": "float16"}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}):
        with pytest.raises(UsageError):
            llamacpp.ENGINE.plan(facts(LLAMA), GIB, ServeOptions(**wishes, **wish))
