"""Plans and files of servers for models that do not chat."""

import json
import re
from dataclasses import replace

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from weightsmith.building.targets import all_targets
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.models.facts import ModelFacts
from weightsmith.models.task import Dense, SentenceTransformers
from weightsmith.serving import engines
from weightsmith.serving.engine import ServedAdapter, ServeOptions
from weightsmith.serving.memory import GIB, MIB
from weightsmith.serving.parameters import weights_from_config
from weightsmith.serving.pooling import ASKED, keeps_cache, pooling_of, vllm_settings, width_of
from weightsmith.stages.render import render

from tests.fakes.configs import LLAMA_8B, facts

BERT = {
    "model_type": "bert", "vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 512,
    "architectures": ["BertModel"], "dtype": "float32",
}  # fmt: skip
QWEN = LLAMA_8B | {"architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 32768}
DISTIL = {
    "model_type": "distilbert", "vocab_size": 30522, "dim": 768, "n_layers": 6, "n_heads": 12,
    "hidden_dim": 3072, "max_position_embeddings": 512, "architectures": ["DistilBertModel"],
    "dtype": "float32",
}  # fmt: skip
MACHINE = ServeOptions(host_memory_bytes=32 * GIB)
MEAN = SentenceTransformers(modules=("Transformer", "Pooling", "Normalize"), pooling="mean")


def named(name, **more):
    return BERT | {"architectures": [name], **more}


def rendered(target, config, sentence=SentenceTransformers(), options=MACHINE, size=440 * MIB):  # noqa: B008
    return render(
        target=all_targets()[target],
        name="m",
        version="1",
        model=ModelFacts.of(config, sentence=sentence),
        model_file="m.gguf" if target.startswith("llamacpp") else "",
        weight_bytes=size,
        options=options,
        image="",
        made_from=(),
    )


def test_an_encoder_has_no_cache_and_reads_a_text_in_one_batch():
    plan = rendered("llamacpp-f16", BERT, MEAN).plan

    assert (plan.max_model_len, plan.max_num_seqs, plan.max_concurrency) == (512, 4, 4)
    assert {plan.kv_bytes_total, plan.kv_bytes_per_token, plan.kv_cache_bytes} == {0}
    assert plan.settings["ubatch-size"] == plan.settings["batch-size"] == 512
    assert plan.settings["embedding"] is True
    assert plan.settings["pooling"] == "mean"
    assert not {"cache-type-k", "reranking"} & plan.settings.keys()
    assert 440 * MIB < plan.host_bytes < 600 * MIB


def test_vllm_is_told_how_vectors_are_made():
    config = rendered("vllm", BERT, MEAN)
    plan = config.plan

    assert plan.settings["runner"] == "pooling"
    assert plan.settings["pooler-config"] == {"seq_pooling_type": "MEAN", "use_activation": True}
    assert not {"convert", "block-size", "tool-call-parser"} & plan.settings.keys()
    assert plan.settings["max-num-batched-tokens"] >= plan.max_model_len == 512
    assert plan.settings["dtype"] == "float32", "vectors keep their digits on a CPU"
    assert plan.kv_bytes_total == 0
    assert "runner: " in config.image_files["/etc/weightsmith/vllm.yaml"]

    on_gpu = rendered("vllm", BERT, MEAN, ServeOptions(gpu="nvidia-l4")).plan
    assert on_gpu.settings["dtype"] == "float16"
    assert "kv-cache-memory-bytes" not in on_gpu.settings
    assert on_gpu.fits


def test_a_decoder_that_gives_vectors_keeps_its_cache():
    last = SentenceTransformers(modules=("Transformer", "Pooling"), pooling="lasttoken")
    vllm, llamacpp = (
        rendered(target, QWEN, last, ServeOptions(gpu="nvidia-l40s"), 16 * GIB).plan
        for target in ("vllm", "llamacpp-f16")
    )

    assert vllm.kv_bytes_per_token == llamacpp.kv_bytes_per_token == 131072
    assert vllm.settings["convert"] == "embed"
    assert vllm.settings["pooler-config"] == {"seq_pooling_type": "LAST", "use_activation": False}
    assert llamacpp.settings["pooling"] == "last"
    assert llamacpp.settings["ubatch-size"] == 512, "a text may be in several batches"
    assert any("the length 1" in note for note in llamacpp.notes)


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("BertForSequenceClassification", {"id2label": {"0": "x"}}, {"runner": "pooling"}),
        (
            "BertForTokenClassification", {},
            {"runner": "pooling", "pooler-config": {"task": "token_classify"}},
        ),
        ("Qwen3ForSequenceClassification", {}, {"runner": "pooling", "convert": "classify"}),
        ("Qwen3Model", {}, {"runner": "pooling", "convert": "embed",
         "pooler-config": {"seq_pooling_type": "LAST", "use_activation": True}}),
    ],
)  # fmt: skip
def test_each_kind_has_its_own_settings(name, more, expected):
    settings = rendered("vllm", named(name, **more)).plan.settings

    keys = ("runner", "convert", "pooler-config")
    assert {key: settings[key] for key in keys if key in settings} == expected


@pytest.mark.parametrize("family", ["Roberta", "XLMRoberta", "ModernBert"])
def test_llamacpp_scores_pairs_of_these_alone(family):
    one = {"id2label": {"0": "x"}}
    plan = rendered("llamacpp-f16", named(f"{family}ForSequenceClassification", **one)).plan

    assert plan.settings["reranking"] is True
    assert "pooling" not in plan.settings
    with pytest.raises(InputRefused, match="first label's score alone"):
        rendered("llamacpp-f16", named(f"{family}ForSequenceClassification"))


def test_positions_that_no_token_has_are_not_planned():
    roberta = named("RobertaModel", model_type="roberta", pad_token_id=1)
    roberta["max_position_embeddings"] = 514
    assert rendered("vllm", roberta, MEAN).plan.max_model_len == 512
    cut = SentenceTransformers(modules=("Transformer", "Pooling"), pooling="mean", most_tokens=128)
    assert rendered("vllm", BERT, cut).plan.max_model_len == 128
    longer = ServeOptions(host_memory_bytes=32 * GIB, max_model_len=513)
    with pytest.raises(UsageError, match="longer than the model's"):
        rendered("llamacpp-f16", roberta, MEAN, longer)


@pytest.mark.parametrize(
    ("config", "sentence", "says"),
    [
        (BERT, {"odd": "LayerNorm"}, "without the module LayerNorm"),
        (BERT, {"pooling": "max"}, "no pooling max; it has mean, cls, lasttoken"),
        (BERT, {"pooling": "mean+cls"}, r"no pooling mean\+cls"),
        (BERT, {"includes_prompt": False}, "pools a prompt's tokens too"),
        (named("AlbertModel"), {}, "no target serves it"),
        (named("DebertaV2ForSequenceClassification"), {}, "no target serves it"),
    ],
)
@pytest.mark.parametrize("target", ["vllm", "llamacpp-f16"])
def test_what_an_engine_would_compute_otherwise_is_refused(target, config, sentence, says):
    with pytest.raises(InputRefused) as caught:
        rendered(target, config, SentenceTransformers(**sentence))

    assert re.search(says, f"{caught.value.message} {caught.value.hint}")


TOKENS = {"modules": ("Transformer", "LogitScore"), "model_type": "CrossEncoder"}


def test_a_reranker_by_two_tokens_is_served_with_its_own_prompt():
    """llama.cpp's is in the GGUF file; vLLM puts one around the texts only if it is told."""
    sentence = SentenceTransformers(
        **TOKENS, tokens=(9693, 2152), token_names=("yes", "no"), begins_answer=True,
        prompts=(("web", 'Say "é".\n'),), default_prompt="web",
    )  # fmt: skip
    plan = rendered("llamacpp-f16", QWEN, sentence).plan
    assert plan.settings["reranking"] is True
    own = "\n{{ messages | map(attribute='content') | join('|') }}{% if add_generation_prompt %}A"
    facts = replace(ModelFacts.of(QWEN, sentence=sentence), chat_template=own + "{% endif %}")
    settings = vllm_settings(facts)

    assert settings["hf-overrides"] == {
        "architectures": ["Qwen3ForSequenceClassification"],
        "classifier_from_token": ["no", "yes"],
        "is_original_qwen3_reranker": True,
    }
    asked = [{"role": "query", "content": "q"}, {"role": "document", "content": "d"}]
    # As transformers renders templates.
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = jinja.from_string(settings["chat-template"])
    assert template.render(messages=asked) == '\nSay "é".\n|q|dA'


def test_a_reranker_by_two_tokens_that_an_engine_does_not_know_is_refused():
    sentence = SentenceTransformers(**TOKENS, tokens=(9693, 2152))
    llama = named("LlamaForCausalLM") | {"model_type": "llama"}
    for target in ("vllm", "llamacpp-f16"):
        with pytest.raises(InputRefused, match="by two tokens of Qwen3ForCausalLM alone"):
            rendered(target, llama, sentence)
    with pytest.raises(InputRefused, match="two tokens of a tokenizer") as caught:
        rendered("vllm", QWEN, sentence)
    assert "target llamacpp serves it" in caught.value.hint


@pytest.mark.parametrize("target", ["vllm", "llamacpp-f16"])
def test_a_reranker_by_one_token_is_refused_and_the_way_to_serve_it_named(target):
    with pytest.raises(InputRefused, match="the logits of two tokens") as caught:
        rendered(target, QWEN, SentenceTransformers(**TOKENS))
    assert "ForSequenceClassification with one label" in caught.value.hint


@pytest.mark.parametrize("kind", ["dot", "euclidean", "manhattan"])
def test_vectors_whose_length_counts_are_not_served_with_another_length(kind):
    own = SentenceTransformers(modules=("Transformer", "Pooling"), pooling="mean", similarity=kind)
    assert rendered("vllm", BERT, own).plan.settings["pooler-config"]["use_activation"] is False
    with pytest.raises(InputRefused, match=f"length 1, and they are compared by {kind}"):
        rendered("llamacpp-f16", BERT, own)
    unit = replace(own, modules=("Transformer", "Pooling", "Normalize"))
    assert rendered("llamacpp-f16", BERT, unit).plan.settings["pooling"] == "mean"


def test_distilbert_gives_vectors_on_llamacpp_alone():
    plan = rendered("llamacpp-f16", DISTIL, MEAN).plan
    assert (plan.max_model_len, plan.settings["pooling"]) == (512, "mean")
    with pytest.raises(InputRefused, match="has no class for it") as caught:
        rendered("vllm", DISTIL, MEAN)
    assert "llamacpp" in caught.value.hint
    head = DISTIL | {"architectures": ["DistilBertForSequenceClassification"]}
    pairs = head | {"id2label": {"0": "score"}}
    for target, config, why in (
        ("vllm", head, "has no class for it"),
        ("vllm", pairs, "has no class for it"),
        ("llamacpp-f16", head, "no endpoint for labels"),
        ("llamacpp-f16", pairs, "where DistilBERT has ReLU"),
    ):
        with pytest.raises(InputRefused, match=why) as caught:
            rendered(target, config)
        assert "no target serves it: train the adapter on a base" in caught.value.hint
        assert "(Bert, ModernBert, Roberta, XLMRoberta)" in caught.value.hint


def test_a_dense_module_is_vllms_alone():
    dense = Dense(path="2_Dense", outputs=128, activation="Tanh")
    sentence = SentenceTransformers(
        modules=("Transformer", "Pooling", "Dense"), pooling="cls", dense=(dense,)
    )
    plan = rendered("vllm", BERT, sentence).plan
    assert plan.settings["pooler-config"] == {"seq_pooling_type": "CLS", "use_activation": False}
    assert width_of(ModelFacts.of(BERT, sentence=sentence)) == 128
    assert width_of(ModelFacts.of(BERT)) == 768
    with pytest.raises(InputRefused, match="without the module Dense") as caught:
        rendered("llamacpp-f16", BERT, sentence)
    assert "target vllm serves it" in caught.value.hint


def test_every_engine_says_what_it_lacks():
    for engine in engines().values():
        lacking = {kind for kind in ASKED if kind != "generate" and engine.lacks(of_kind(kind))}
        served = {"vllm": set(), "llamacpp": {"rerank", "classify", "token-classify"}}

        assert lacking == served.get(engine.name, set(ASKED) - {"generate"}), engine.name


def of_kind(kind):
    name = {
        "embed": "BertModel",
        "token-classify": "BertForTokenClassification",
    }.get(kind, "BertForSequenceClassification")
    found = facts(named(name, id2label={"0": "x"} if kind == "rerank" else {}))
    assert found.task.kind == kind
    return found


def test_options_that_have_no_sense_are_refused():
    for target in ("vllm", "llamacpp-f16"):
        with pytest.raises(UsageError, match="keeps no keys and values"):
            rendered(target, BERT, MEAN, ServeOptions(kv_cache_dtype="fp8"))
    with pytest.raises(UsageError, match="computed in one batch"):
        rendered("llamacpp-f16", BERT, MEAN, ServeOptions(extra={"ubatch-size": 64}))
    beside = (ServedAdapter(name="", folder="adapters/a", rank=4),)
    with pytest.raises(UsageError, match="adapters beside it"):
        rendered("vllm", BERT, MEAN, ServeOptions(adapters=beside))
    for option in ("runner", "convert"):
        with pytest.raises(UsageError, match=option):
            rendered("vllm", BERT, MEAN, ServeOptions(extra={option: "generate"}))


def test_without_a_file_that_says_it_the_way_of_pooling_is_said():
    plan = rendered("llamacpp-f16", BERT).plan

    assert plan.settings["pooling"] == "mean"
    assert any("planned with mean" in note for note in plan.notes)
    assert pooling_of(facts(named("Qwen3Model"))) == "lasttoken"
    assert keeps_cache(facts(LLAMA_8B))


@pytest.mark.parametrize(
    ("name", "more", "path", "key"),
    [
        ("BertModel", {}, "/v1/embeddings", "input"),
        ("BertForSequenceClassification", {"id2label": {"0": "x"}}, "/v1/rerank", "documents"),
        ("BertForSequenceClassification", {"id2label": {"0": "no", "1": "yes"}}, "/classify", "no"),
        ("BertForTokenClassification", {}, "/pooling", "LABEL_1"),
    ],
)
def test_the_readme_asks_what_the_server_answers(name, more, path, key):
    prompts = (("query", "query: "), ("document", ""))
    sentence = SentenceTransformers(modules=("Transformer", "Pooling"), prompts=prompts)
    sentence = sentence if name == "BertModel" else SentenceTransformers()
    files = rendered("vllm", named(name, **more), sentence).files
    text = files["README.md"]

    assert f"curl http://127.0.0.1:8000{path} " in text
    assert key in text
    assert "chat" not in text
    assert ("| query | `query: ` |" in text) == (name == "BertModel")
    assert "LLMInferenceService" not in files["kserve.yaml"]
    assert json.loads(files["plan.json"])["settings"]["runner"] == "pooling"


def test_the_size_of_an_encoder_is_known_before_a_download():
    size = weights_from_config(facts(BERT))
    assert 0.98 < size / (4 * 109_482_240) < 1.0, "BERT base, without its norms and biases"
