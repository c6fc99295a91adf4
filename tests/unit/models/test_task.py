"""What a checkpoint is asked for, as its files say."""

import json

import numpy as np
import pytest
from safetensors.numpy import save_file
from weightsmith.core.errors import InputRefused
from weightsmith.models.facts import read_facts
from weightsmith.models.task import SentenceTransformers, read_task, task_of

BERT = {"architectures": ["BertModel"], "model_type": "bert"}
QWEN = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
OLD = "sentence_transformers.models."
NEW = "sentence_transformers.sentence_transformer.modules."


def write(folder, config, **files):
    """Write a folder's config.json and further JSON files, named with `__` for a slash."""
    for name, value in {"config": config, **files}.items():
        path = folder / f"{name.replace('__', '/')}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    return folder


def modules(*rows, prefix=OLD):
    return [
        {"idx": n, "name": str(n), "path": path, "type": prefix + kind}
        for n, (path, kind) in enumerate(rows)
    ]


PARTS = ("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")
POOLING = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("LlamaForCausalLM", "generate"),
        ("Gemma3ForConditionalGeneration", "generate"),
        ("BertModel", "embed"),
        ("ModernBertModel", "embed"),
        ("Qwen3ForSequenceClassification", "classify"),
        ("BertForTokenClassification", "token-classify"),
        ("BertForMaskedLM", "other"),
        ("BertForQuestionAnswering", "other"),
        ("bert", "embed"),
        ("", "generate"),
    ],
)
def test_a_class_says_what_it_is_for(name, kind):
    found = task_of({"architectures": [name]})

    assert found.kind == kind
    assert bool(found.does) == (kind != "generate")


def test_a_head_with_one_label_scores_pairs():
    one = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    assert (task_of(one).kind, task_of(one).activation) == ("rerank", "sigmoid")

    told = {**one, "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
    assert task_of(told).activation == "identity"
    older = {**one, "sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}
    assert task_of(older).activation == "identity"


def test_labels_are_in_the_order_of_the_outputs():
    named = {"10": "k", "2": "c", "0": "a", "1": "b", **{str(n): str(n) for n in range(3, 10)}}
    config = {"architectures": ["BertForSequenceClassification"], "id2label": named}
    found = task_of(config)

    assert found.labels == ("a", "b", "c", *"3456789", "k")
    assert found.activation == "softmax"
    assert task_of({**config, "problem_type": "multi_label_classification"}).activation == "sigmoid"
    assert task_of({**config, "problem_type": "regression"}).activation == "identity"
    assert task_of({**config, "id2label": {}}).labels == ("LABEL_0", "LABEL_1"), "as transformers"
    for wrong in ({"1": "a"}, {"0": 5}, {"0": "a", "x": "b"}):
        with pytest.raises(InputRefused, match="id2label"):
            task_of({**config, "id2label": wrong})


@pytest.mark.parametrize("prefix", [OLD, NEW])
def test_sentence_transformers_makes_vectors_of_a_decoder_too(tmp_path, prefix):
    said = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}
    folder = write(
        tmp_path,
        QWEN,
        modules=modules(*PARTS, prefix=prefix),
        config_sentence_transformers=said | {"similarity_fn_name": "dot"},
        sentence_bert_config={"max_seq_length": 256, "do_lower_case": True},
        **{"1_Pooling__config": {"pooling_mode_lasttoken": True, "include_prompt": False}},
    )

    assert read_task(folder).kind == "embed"
    assert read_task(folder).sentence == SentenceTransformers(
        modules=("Transformer", "Pooling", "Normalize"),
        pooling="lasttoken",
        includes_prompt=False,
        prompts=(("query", "query: "), ("document", "")),
        default_prompt="query",
        similarity="dot",
        most_tokens=256,
        lower_case=True,
    )
    assert read_task(folder).sentence.normalizes
    assert read_facts(folder).task == read_task(folder)


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        (POOLING, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}, "cls+max"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
        ({"pooling_mode": ["mean", "cls"]}, "mean+cls"),
        ({}, "mean"),
    ],
)
def test_ways_of_pooling(tmp_path, settings, mode):
    write(tmp_path, BERT, modules=modules(*PARTS), **{"1_Pooling__config": settings})

    assert read_task(tmp_path).sentence.pooling == mode


@pytest.mark.parametrize(
    ("model_type", "last", "kind"),
    [
        ("CrossEncoder", "Transformer", "rerank"),
        ("SparseEncoder", "SpladePooling", "other"),
        ("SentenceTransformer", "Dropout", "embed"),
    ],
)
def test_other_models_of_sentence_transformers(tmp_path, model_type, last, kind):
    one = {"architectures": ["BertForSequenceClassification"], "id2label": {"0": "x"}}
    said = {"model_type": model_type, "activation_fn": "torch.nn.modules.linear.Identity"}
    rows = modules(("", "Transformer"), ("1_X", last))
    write(tmp_path, one, modules=rows, config_sentence_transformers=said)
    found = read_task(tmp_path)

    assert found.kind == kind
    assert kind != "rerank" or (found.labels, found.activation) == (("x",), "identity")


@pytest.mark.parametrize(
    ("scored", "tokens"),
    [
        ({"true_token_id": 9693, "false_token_id": 2152}, (9693, 2152)),
        ({"true_token_id": 9454, "false_token_id": None}, None),
        ({"true_token_id": 7, "false_token_id": 7}, None),
        ({"true_token_id": True, "false_token_id": 0}, None),
        ({"true_token_id": -1, "false_token_id": 0}, None),
    ],
)
def test_rerankers_by_two_tokens(tmp_path, scored, tokens):
    """As sentence-transformers 6.2 saves them; one with a single token is not served."""
    said = {
        "model_type": "CrossEncoder", "prompts": {"web": "Find."}, "default_prompt_name": "web",
    }  # fmt: skip
    begins = {"processing_kwargs": {"chat_template": {"add_generation_prompt": True}}}
    write(
        tmp_path,
        {"architectures": ["Qwen3ForCausalLM"]},
        modules=modules(("", "Transformer"), ("1_LogitScore", "LogitScore")),
        config_sentence_transformers=said,
        sentence_bert_config=begins,
        **{"1_LogitScore__config": scored},
    )
    found = read_task(tmp_path)

    assert (found.kind, found.tokens) == ("rerank" if tokens else "other", tokens)
    assert found.sentence.begins_answer
    assert found.sentence.pair("a", "b") == (
        {"role": "system", "content": "Find."},
        {"role": "query", "content": "a"},
        {"role": "document", "content": "b"},
    )


@pytest.mark.parametrize(
    ("tokenizer", "names"),
    [
        ({"model": {"vocab": {"yes": 5, "no": 3}}}, ("yes", "no")),
        ({"model": {"vocab": {"no": 3}}, "added_tokens": [{"id": 5, "content": "<y>"}]},
         ("<y>", "no")),
        ({"model": {"vocab": {"yes": 5}}}, None),
        ({"model": {"vocab": [["yes", 0.1]]}, "added_tokens": [3, {"id": [5]}]}, None),
    ],
)  # fmt: skip
def test_the_names_of_two_tokens(tmp_path, tokenizer, names):
    write(
        tmp_path,
        {"architectures": ["Qwen3ForCausalLM"]},
        modules=modules(("", "Transformer"), ("1_LogitScore", "LogitScore")),
        config_sentence_transformers={"model_type": "CrossEncoder"},
        tokenizer=tokenizer,
        **{"1_LogitScore__config": {"true_token_id": 5, "false_token_id": 3}},
    )
    assert read_task(tmp_path).sentence.token_names == names


TANH = "torch.nn.modules.activation.Tanh"


def dense(**changes):
    """A Dense module of LaBSE's kind, but for what a test changes."""
    return {
        "in_features": 8,
        "out_features": 4,
        "bias": True,
        "activation_function": TANH,
    } | changes


@pytest.mark.parametrize(
    ("parts", "settings", "odd"),
    [
        (("Pooling", "Dense", "Normalize"), {}, ""),
        (("Pooling", "Dense", "Dropout", "Dense"), {}, ""),
        (("Pooling", "Normalize", "Dense"), {}, "Dense"),
        (("Dense", "Pooling"), {}, "Pooling"),
        (("Dense",), {}, "Dense"),
        (("Pooling", "Normalize", "Normalize"), {}, "Normalize"),
        (("Pooling", "LayerNorm"), {}, "LayerNorm"),
        (("Pooling", "Dense"), {"activation_function": "mine.Own"}, "Dense"),
        (("Pooling", "Dense"), {"activation_function": ["x"]}, "Dense"),
        (("Pooling", "Dense"), {"out_features": "4"}, "Dense"),
        (("Pooling", "Dense"), {"module_input_name": "token_embeddings"}, "Dense"),
        (("Pooling", "Dense"), {"module_output_name": {"a": 1}}, "Dense"),
    ],
)
def test_modules_that_are_not_computed_are_named(tmp_path, parts, settings, odd):
    rows = modules(("", "Transformer"), *((f"{n}_{kind}", kind) for n, kind in enumerate(parts, 1)))
    files = {f"{n}_{kind}__config": dense(**settings) for n, kind in enumerate(parts, 1)}
    write(tmp_path, BERT, modules=rows, **files)
    found = read_task(tmp_path).sentence

    assert found.odd == odd
    assert odd or {(one.outputs, one.activation) for one in found.dense} == {(4, "Tanh")}


def test_a_dense_module_without_its_weights_is_refused(tmp_path):
    rows = modules(*PARTS, ("2_Dense", "Dense"))
    write(tmp_path, BERT, modules=rows, **{"1_Pooling__config": {}, "2_Dense__config": dense()})
    assert read_task(tmp_path).sentence.dense, "of its small files alone, nothing is missing"
    save_file({"x": np.zeros(1, "f4")}, tmp_path / "model.safetensors")

    with pytest.raises(InputRefused, match=r"2_Dense has no model\.safetensors"):
        read_task(tmp_path)


@pytest.mark.parametrize(
    ("task_type", "key", "outputs", "kind", "labels"),
    [
        ("SEQ_CLS", "base_model.model.score.weight", 3, "classify", 3),
        ("SEQ_CLS", "base_model.model.score.weight", 1, "rerank", 1),
        ("TOKEN_CLS", "base_model.model.classifier.weight", 5, "token-classify", 5),
        ("SEQ_CLS", "base_model.model.layers.0.q_proj.lora_A.weight", 4, "classify", 2),
        ("FEATURE_EXTRACTION", "base_model.model.layers.0.q_proj.lora_A.weight", 4, "embed", 0),
        ("CAUSAL_LM", "base_model.model.layers.0.q_proj.lora_A.weight", 4, "generate", 0),
    ],
)
@pytest.mark.parametrize("config", [BERT, QWEN])
def test_an_adapter_says_it_by_its_head(tmp_path, config, task_type, key, outputs, kind, labels):
    base = write(tmp_path / "base", config)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"task_type": task_type}))
    save_file({key: np.zeros((outputs, 8), "f4")}, adapter / "adapter_model.safetensors")
    kind = "embed" if (config, kind) == (BERT, "generate") else kind
    found = read_task(base, adapter)

    assert (found.kind, len(found.labels)) == (kind, labels)


@pytest.mark.parametrize(
    "listed",
    [
        [], {}, "x", [1], [None], [{"path": "../x", "type": "a.Pooling"}],
        [{"path": "/etc", "type": "a.Pooling"}], [{"path": 1, "type": "a.Pooling"}],
        [{"path": "", "type": ["a"]}],
    ],
)  # fmt: skip
def test_a_damaged_list_of_modules_is_refused_when_it_is_asked_for(tmp_path, listed):
    write(tmp_path, BERT, modules=listed)
    facts = read_facts(tmp_path)

    with pytest.raises(InputRefused, match=r"modules\.json"):
        read_task(tmp_path)
    with pytest.raises(InputRefused, match=r"modules\.json"):
        getattr(facts, "task")  # noqa: B009
    (tmp_path / "modules.json").write_text("[{")
    with pytest.raises(InputRefused, match=r"modules\.json holds no valid JSON"):
        read_task(tmp_path)
