from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.serving import llamacpp_plan
from weightsmith.serving.engine import ServedAdapter, ServedModel, ServeOptions
from weightsmith.serving.llamacpp import command, env
from weightsmith.serving.llamacpp_options import ENVIRONMENT, extra_options
from weightsmith.serving.llamacpp_plan import padded
from weightsmith.serving.memory import GIB, MIB

from tests.fakes.configs import LLAMA_8B, SMOL, config, facts

Q4 = 4_920_000_000
SERVED = ServedModel(path="/models/m.gguf", name="support", startup_seconds=600)


def plan(model, weight_bytes, options):
    return llamacpp_plan.plan(facts(model), weight_bytes, options)


def test_a_wish_that_fits_is_kept_and_its_context_is_the_total_over_slots():
    wish = ServeOptions(max_model_len=1000, max_num_seqs=4, host_memory_bytes=GIB)
    made = plan(SMOL, 105 * MIB, wish)

    assert (made.max_model_len, made.max_num_seqs) == (1000, 4)
    assert made.settings["ctx-size"] == 4096
    assert made.settings["kv-unified"] is False
    # 30 layers x 3 heads x 128 x 2 bytes = 23040 per token, 90 MiB for 4096.
    assert made.kv_bytes_per_token == 23040
    assert made.kv_bytes_total == 90 * MIB
    assert (made.device, made.gpu_layers) == ("cpu", 0)


def test_a_wish_that_does_not_fit_names_the_nearest_that_does():
    wishes = ServeOptions(max_model_len=32768, max_num_seqs=8, host_memory_bytes=24 * GIB)

    with pytest.raises(UsageError, match="max_model_len 32768 x max_num_seqs 8") as caught:
        plan(LLAMA_8B, Q4, wishes)

    hint = caught.value.hint
    assert caught.value.exit_code == 2
    assert "max_num_seqs 4 at 32768" in hint
    assert "cache-type-k" in hint
    # Every way that the hint offers is one.
    shorter = int(hint.split("max_model_len ")[1].split()[0])
    for way in ({"max_model_len": shorter}, {"max_num_seqs": 4}):
        assert plan(LLAMA_8B, Q4, replace(wishes, **way)).fits


@pytest.mark.parametrize(
    ("vocab", "hidden", "intermediate", "layers", "heads", "tokens", "slots", "held"),
    [
        (50257, 256, 768, 4, 4, 512, 4, 28.3),
        (50257, 256, 768, 4, 4, 256, 16, 38.8),
        (50257, 256, 768, 4, 4, 8192, 2, 36.8),
        (128256, 1024, 4096, 8, 16, 512, 4, 93.2),
        (128256, 2048, 8192, 16, 32, 256, 2, 115.5),
        (262144, 256, 768, 4, 4, 2048, 8, 132.4),
    ],
)
def test_what_a_cpu_holds_beside_weights_and_cache(
    vocab, hidden, intermediate, layers, heads, tokens, slots, held
):
    """Against the peak of RssAnon, less the cache, in MiB, with every slot full.

    Of llama-server 0c1e57098 with float16 weights drawn at random and the vocabularies of GPT-2,
    Llama 3 and Gemma 4, on two CPUs.
    """
    sizes = {"intermediate_size": intermediate, "vocab_size": vocab}
    model = config("LlamaForCausalLM", layers, hidden, heads, max(2, heads // 4), **sizes)
    wishes = {"max_model_len": tokens, "max_num_seqs": slots, "host_memory_bytes": 8 * GIB}
    made = plan(model, GIB, ServeOptions(**wishes))

    assert held * MIB <= made.overhead_bytes <= 2.3 * held * MIB


def test_a_wish_beyond_all_machines_is_answered_at_once():
    with pytest.raises(UsageError, match="max_num_seqs 1000000000000000000000") as caught:
        plan(SMOL, 105 * MIB, ServeOptions(max_num_seqs=10**21, host_memory_bytes=GIB))

    nearest = caught.value.details["plan"].nearest
    way = next(way for way in nearest if "max_num_seqs" in way["text"])
    fits, length = way["max_num_seqs"], way["max_model_len"]
    again = ServeOptions(max_model_len=length, max_num_seqs=fits, host_memory_bytes=GIB)
    assert plan(SMOL, 105 * MIB, again).fits
    with pytest.raises(UsageError):
        plan(SMOL, 105 * MIB, replace(again, max_num_seqs=fits + 1))


def test_a_length_beyond_the_model_is_refused_unless_positions_are_stretched():
    wishes = ServeOptions(max_model_len=16384, max_num_seqs=1, host_memory_bytes=64 * GIB)

    with pytest.raises(UsageError, match="8192"):
        plan(SMOL, 105 * MIB, wishes)

    stretched = replace(wishes, extra={"rope-scale": 2})
    assert plan(SMOL, 105 * MIB, stretched).max_model_len == 16384


def test_a_small_gpu_takes_the_layers_that_fit_and_says_so():
    made = plan(LLAMA_8B, Q4, ServeOptions(gpu_memory_bytes=4 * GIB))

    assert 0 < made.gpu_layers < 32
    assert any("layers fit" in note for note in made.notes)
    on_gpu = made.gpu_layers * (made.weight_bytes + made.kv_bytes_total) // 32
    assert on_gpu + made.overhead_bytes <= made.usable_bytes


@pytest.mark.parametrize(
    ("model", "wish", "says"),
    [
        (LLAMA_8B, {"gpu_memory_bytes": 768 * MIB}, "usable on gpu"),
        (LLAMA_8B, {"gpu": "mi300x"}, "NVIDIA"),
        (SMOL, {"extra": {"cache-type-v": "q8_0", "flash-attn": "off"}}, "flash attention"),
        (SMOL, {"extra": {"cache-ram": -1}}, "cache-ram"),
    ],
)
def test_wishes_that_cannot_be(model, wish, says):
    with pytest.raises(UsageError, match=says):
        plan(model, Q4, ServeOptions(**wish))


GEMMA_3 = config(
    "Gemma3ForCausalLM", 4, 576, 9, 3,
    head_dim=32, sliding_window=64, layer_types=["sliding_attention"] * 4,
)  # fmt: skip


def test_a_model_that_only_slides_says_why_it_does_not_grow():
    wish = ServeOptions(max_model_len=2048, max_num_seqs=1, host_memory_bytes=GIB)
    made = plan(GEMMA_3, MIB, wish)

    # llama-server's own log for this shape: 768 cells in 4 layers, and 0 layers that grow.
    assert made.kv_bytes_total == 768 * 4 * 3 * 2 * 32 * 2
    assert made.kv_bytes_per_token == 0
    assert any("every layer slides" in note for note in made.notes)


def test_layers_that_slide_otherwise_than_llamacpp_computes_are_refused():
    # Of a file of six sliding layers llama-server makes the sixth a full one: another model.
    five, machine = ["sliding_attention"] * 5, ServeOptions(host_memory_bytes=GIB)
    six = {**GEMMA_3, "num_hidden_layers": 6}

    made = plan({**six, "layer_types": [*five, "full_attention"]}, MIB, machine)
    assert made.kv_bytes_per_token == 3 * 2 * 32 * 2
    with pytest.raises(InputRefused, match="5 sliding and one full in turn"):
        plan({**six, "layer_types": [*five, "sliding_attention"]}, MIB, machine)


def test_a_packed_cache_takes_less():
    packed = {"cache-type-k": "q8_0", "cache_type_v": "q8_0"}
    base = ServeOptions(max_model_len=8192, max_num_seqs=1, host_memory_bytes=64 * GIB)
    made = plan(LLAMA_8B, Q4, replace(base, extra=packed))

    assert made.kv_bytes_total * 32 == plan(LLAMA_8B, Q4, base).kv_bytes_total * 17
    assert env(made, SERVED)["LLAMA_ARG_CACHE_TYPE_V"] == "q8_0"


def test_a_prompt_cache_is_counted():
    wish = ServeOptions(max_model_len=256, max_num_seqs=1, host_memory_bytes=GIB)
    plain = plan(SMOL, MIB, wish)
    cached = plan(SMOL, MIB, replace(wish, extra={"cache-ram": 100}))

    assert cached.overhead_bytes - plain.overhead_bytes == 100 * MIB


def test_a_model_without_attention_is_refused():
    with pytest.raises(InputRefused, match="no attention"):
        plan({**SMOL, "layer_types": ["mamba"] * 30}, MIB, ServeOptions())


memory = st.integers(min_value=GIB // 8, max_value=256 * GIB)


@settings(max_examples=60, deadline=None)
@given(memory, memory, st.booleans())
def test_more_memory_never_gives_a_shorter_context(one, other, on_gpu):
    less, more = sorted((one, other))
    field = "gpu_memory_bytes" if on_gpu else "host_memory_bytes"
    try:
        small = plan(LLAMA_8B, Q4, ServeOptions(**{field: less}))
    except UsageError:
        return
    large = plan(LLAMA_8B, Q4, ServeOptions(**{field: more}))

    assert large.max_model_len >= small.max_model_len
    if large.max_model_len == small.max_model_len:
        assert large.max_num_seqs >= small.max_num_seqs


@settings(max_examples=60, deadline=None)
@given(
    memory,
    st.none() | st.integers(min_value=1, max_value=131072),
    st.none() | st.integers(min_value=1, max_value=64),
)
def test_a_plan_never_takes_more_than_is_usable(size, tokens, slots):
    wishes = ServeOptions(host_memory_bytes=size, max_model_len=tokens, max_num_seqs=slots)
    try:
        made = plan(LLAMA_8B, Q4, wishes)
    except UsageError:
        return

    assert made.weight_bytes + made.kv_bytes_total + made.overhead_bytes <= made.usable_bytes < size
    assert made.settings["ctx-size"] == padded(made.max_model_len) * made.max_num_seqs
    assert tokens in {None, made.max_model_len}
    assert slots in {None, made.max_num_seqs}


TOWERS = {
    "siglip": ({"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27,
                "image_size": 896, "patch_size": 14}, 4096, 121.25),
    "siglip at half the size": ({"hidden_size": 1152, "intermediate_size": 4304,
                                 "num_hidden_layers": 27, "image_size": 448, "patch_size": 14},
                                4096, 30.31),
    "Qwen2.5-VL": ({"hidden_size": 1280, "intermediate_size": 3420, "depth": 32,
                    "window_size": 112}, 512, 704.79),
    "Qwen3-VL": ({"hidden_size": 1152, "intermediate_size": 4304, "depth": 27}, 512, 285.29),
}  # fmt: skip
"""vision_config, a request's tokens, and the MiB that llama-server 0c1e57098 reserved with these
widths (clip.cpp's "compute buffer size"); the number of layers changes nothing."""


@pytest.mark.parametrize("name", TOWERS)
def test_what_a_picture_takes_is_never_below_what_the_server_reserves(name):
    tower, tokens, reserved = TOWERS[name]
    model = {**LLAMA_8B, "vision_config": tower}
    wish = ServeOptions(host_memory_bytes=64 * GIB, max_model_len=tokens, max_num_seqs=1)
    blind = plan(model, Q4, wish)
    seeing = plan(model, Q4 + GIB, replace(wish, projector_bytes=GIB))

    more = seeing.overhead_bytes - blind.overhead_bytes
    assert reserved * MIB <= more <= 2.5 * reserved * MIB + 200 * MIB
    assert seeing.weight_bytes == blind.weight_bytes + GIB
    assert any("reads pictures" in note for note in seeing.notes)
    assert any("reads text only" in note for note in blind.notes)


TINY = config("LlamaForCausalLM", 4, 256, 4, 2, intermediate_size=768, head_dim=128,
              vocab_size=512, max_position_embeddings=512)  # fmt: skip
ALLOCATED = {1: 5.0, 10: 43.8, 30: 129.9, 60: 259.2, 200: 863.8, 300: 1299.0}
"""Adapters of rank 8 on all 28 matrices -> the MiB of private memory (VmData) that llama-server
0c1e57098 had more than without them, after it had been asked by all."""


ADAPTER = ServedAdapter(name="a", folder="a", rank=8, matrices=28, weight_bytes=720_896)


@pytest.mark.parametrize("count", ALLOCATED)
def test_adapters_never_take_more_than_planned_nor_much_less(count):
    wish = ServeOptions(host_memory_bytes=64 * GIB, max_num_seqs=4)
    own = count * ADAPTER.weight_bytes
    alone = plan(TINY, 8 * MIB, wish)
    made = plan(TINY, 8 * MIB + own, replace(wish, adapters=(ADAPTER,) * count))

    more = made.host_bytes - alone.host_bytes
    assert ALLOCATED[count] * MIB <= more <= 1.09 * ALLOCATED[count] * MIB + MIB
    assert any(f"{count} adapter(s) are loaded" in note for note in made.notes)


def test_on_a_gpu_adapters_take_their_weights_and_what_they_add():
    wish = ServeOptions(gpu="nvidia-l4", max_model_len=512, max_num_seqs=4)
    alone = plan(TINY, 8 * MIB, wish)
    made = plan(TINY, 8 * MIB + ADAPTER.weight_bytes, replace(wish, adapters=(ADAPTER,)))

    assert made.overhead_bytes - alone.overhead_bytes == 4 * 768 * 512


def test_a_longer_request_may_hold_a_larger_picture_up_to_the_servers_largest():
    tower, *_ = TOWERS["Qwen3-VL"]
    model = {**LLAMA_8B, "vision_config": tower}
    wish = ServeOptions(host_memory_bytes=640 * GIB, projector_bytes=GIB, max_num_seqs=1)
    blind = replace(wish, projector_bytes=0)
    more = [
        plan(model, Q4, replace(wish, max_model_len=tokens)).overhead_bytes
        - plan(model, Q4, replace(blind, max_model_len=tokens)).overhead_bytes
        for tokens in (2048, 3072, 4096, 131072)
    ]

    assert more[0] < more[1] < more[2] == more[3]


def test_a_projector_is_no_layer_of_a_split_model():
    model = {**LLAMA_8B, "vision_config": TOWERS["siglip"][0]}
    wish = ServeOptions(gpu_memory_bytes=4 * GIB, max_model_len=4096, max_num_seqs=1)
    blind = plan(model, Q4, wish)
    seeing = plan(model, Q4 + GIB, replace(wish, projector_bytes=GIB))
    as_layers = plan(model, Q4 + GIB, wish)

    # It takes room on the GPU that layers would have, and makes none of them larger.
    assert 0 < seeing.gpu_layers < as_layers.gpu_layers < blind.gpu_layers


def test_the_environment_is_explicit_and_known_to_the_server():
    made = plan(SMOL, MIB, ServeOptions(max_model_len=512, max_num_seqs=2, host_memory_bytes=GIB))
    found = env(made, replace(SERVED, projector="/models/mmproj-m.gguf"))
    wanted = {"CTX_SIZE": "1024", "N_PARALLEL": "2", "KV_UNIFIED": "0", "FIT": "off", "UI": "0",
              "ALIAS": "support", "MMPROJ": "/models/mmproj-m.gguf"}  # fmt: skip

    assert set(found) <= set(ENVIRONMENT.values())
    assert {f"LLAMA_ARG_{name}": text for name, text in wanted.items()}.items() <= found.items()
    assert "LLAMA_ARG_MMPROJ" not in env(made, SERVED)


def test_options_without_a_variable_become_arguments():
    extra = {"seed": 3, "warmup": False, "--escape": True, "LLAMA_ARG_TOP_K": 5}
    made = plan(SMOL, MIB, ServeOptions(extra=extra))

    assert command(made, SERVED) == ("--seed", "3", "--no-warmup", "--escape")
    assert env(made, SERVED)["LLAMA_ARG_TOP_K"] == "5"
    thinking = extra_options({"chat_template_kwargs": {"enable_thinking": False}})
    assert thinking == {"chat-template-kwargs": '{"enable_thinking": false}'}


@pytest.mark.parametrize(
    ("extra", "says", "hints"),
    [
        ({"cache_typ_k": "q8_0"}, "no such option", "cache-type-k"),
        ({"LLAMA_ARG_TOPK": 1}, "no such option", "LLAMA_ARG_TOP_K"),
        ({"ctx-size": 4096}, "cannot be set", "max_model_len"),
        ({"gpu-layers": 3}, "cannot be set", "serve.gpu"),
        ({"LLAMA_API_KEY": "secret"}, "cannot be set", "where it runs"),
        ({"tools": "all"}, "cannot be set", "run programs"),
        ({"ssl-key-file": "/tls/key.pem"}, "cannot be set", "probes speak HTTP"),
        ({"LLAMA_ARG_API_PREFIX": "/bot"}, "cannot be set", "/health"),
        ({"temp": 1, "temperature": 2}, "twice", "remove"),
    ],
)
def test_extra_options_that_cannot_be(extra, says, hints):
    with pytest.raises(UsageError, match=says) as caught:
        extra_options(extra)

    assert hints in caught.value.hint
    assert "secret" not in caught.value.message + caught.value.hint
