"""Reference vectors, labels and scores, held against PEFT and sentence-transformers' own steps.

The models were trained for these texts, so that what an adapter lost would be seen in the score.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from weightsmith.building.wiring import cache_folder
from weightsmith.core.errors import InputRefused
from weightsmith.core.jobs import Question
from weightsmith.core.vectors import unpacked
from weightsmith.evaluating.items import read_items
from weightsmith.evaluating.ranking import score_labels, score_orders, score_sets, score_vectors
from weightsmith.evaluating.replay_numbers import LABELS, TOKENS, reference_of
from weightsmith.forward.libraries import load_tokenizer
from weightsmith.merging.engine import MergeRequest, merge
from weightsmith.merging.pooled import (
    PooledModel,
    PooledRequest,
    pooled_answers,
    pooled_vectors,
)
from weightsmith.models.task import read_task
from weightsmith.models.templates import pair_prompt

from tests.fakes import pooled_models, token_rerankers

pytestmark = pytest.mark.slow
PROMPTS = ("query: ", "passage: ")


@pytest.fixture(scope="module")
def trained():
    return partial(pooled_models.made, cache=cache_folder() / "trained")


def merged(folder: Path, out: Path) -> Path:
    merge(MergeRequest(base=folder / "base", adapters=((folder / "adapter", 1.0),), out=out))
    return out


def asked(pooled, questions, folder, prompts=("", ""), base=False):
    adapters = {"adapter": ((folder / "adapter", 1.0),), **({"base": ()} if base else {})}
    return {
        name: PooledRequest(
            subject=PooledModel(model=folder / "base", adapters=used, pooled=pooled),
            questions=questions,
            prompts=prompts,
        )
        for name, used in adapters.items()
    }


def own(pooled, questions, model, prompts=("", "")):
    subject = PooledModel(model=model, pooled=pooled)
    return PooledRequest(subject=subject, questions=questions, prompts=prompts)


def peft(folder, network, **more):
    """Return the tokenizer and the model with its adapter, loaded whole by PEFT alone."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    model = network.from_pretrained(folder / "base", dtype=torch.float32, **more)
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    return tokenizer, PeftModel.from_pretrained(model, folder / "adapter").eval()


def text_of(role, text):
    return Question(messages=({"role": role, "content": text},), plain=True)


@torch.inference_mode()
def test_vectors_are_those_of_peft_with_sentence_transformers_steps(trained, tmp_path):
    from transformers import AutoModel

    folder = trained("embed")
    corpus, rows = pooled_models.corpus(), pooled_models.queries(40)
    questions = [text_of("query", row["query"]) for row in rows]
    questions += [text_of("document", row["text"]) for row in corpus]
    requests = asked("vectors", questions, folder, PROMPTS, base=True)
    requests["merged"] = own("vectors", questions, merged(folder, tmp_path / "merged"), PROMPTS)
    kept, done = {}, []
    found = pooled_answers(requests, done.append, kept.__setitem__)
    assert kept == found
    assert sum(done) == 3 * len(questions)

    tokenizer, model = peft(folder, AutoModel)
    for question, row in zip(questions, found["adapter"], strict=True):
        (message,) = question.messages
        prompt = PROMPTS[message["role"] == "document"]
        one = tokenizer(prompt + message["content"], return_tensors="pt")
        mean = model(**one).last_hidden_state[0].mean(0)
        expected = torch.nn.functional.normalize(mean, dim=0)
        torch.testing.assert_close(
            torch.tensor(unpacked(row["answer"])).float(), expected, atol=2e-5, rtol=0
        )
        assert row["prompt_tokens"] == one["input_ids"].shape[1]

    path = pooled_models.write_lines(tmp_path / "queries.jsonl", rows)
    items, ids = read_items(path, "embedding"), [(row["id"], row["text"]) for row in corpus]
    scores = {who: score_vectors(said, items, ids, 10).score for who, said in found.items()}
    assert scores["adapter"] == pytest.approx(scores["merged"], abs=1e-3)
    assert scores["base"] < 0.6 < 0.9 < scores["adapter"]


@torch.inference_mode()
def test_labels_are_those_of_peft_and_the_adapters_head(trained, tmp_path):
    from transformers import AutoModelForSequenceClassification

    folder = trained("classify")
    items = read_items(
        pooled_models.write_lines(tmp_path / "texts.jsonl", pooled_models.labelled(64)), "label"
    )
    questions = [text_of("user", item.prompt) for item in items]
    requests = asked("label", questions, folder)
    requests["merged"] = own("label", questions, merged(folder, tmp_path / "merged"))
    found = pooled_answers(requests)
    tokenizer, model = peft(folder, AutoModelForSequenceClassification, num_labels=8)
    for question, row in zip(questions, found["adapter"], strict=True):
        logits = model(**tokenizer(question.messages[0]["content"], return_tensors="pt")).logits[0]
        first, second = logits.topk(2).values.tolist()
        assert row["answer"] == f"LABEL_{int(logits.argmax())}"
        assert float(row["margins"]) == pytest.approx(first - second, abs=1e-3)
        likely = reference_of(LABELS, row["probabilities"])
        assert likely == pytest.approx(logits.softmax(-1).tolist(), abs=1e-4)
    assert [row["answer"] for row in found["merged"]] == [row["answer"] for row in found["adapter"]]
    assert score_labels(found["adapter"], items).score > 0.9


@pytest.mark.full
@torch.inference_mode()
def test_sets_of_labels_are_those_of_transformers_own_sigmoid(trained, tmp_path):
    from transformers import AutoModelForSequenceClassification, pipeline

    folder = trained("label-set")
    path = pooled_models.write_lines(tmp_path / "sets.jsonl", pooled_models.labelled_sets(40))
    items = read_items(path, "label")
    requests = asked("label-set", [text_of("user", item.prompt) for item in items], folder)
    requests["merged"] = own(
        "label-set", requests["adapter"].questions, merged(folder, tmp_path / "m")
    )
    found = pooled_answers(requests)
    tokenizer, model = peft(folder, AutoModelForSequenceClassification, num_labels=8)
    judge = pipeline(
        "text-classification", model.merge_and_unload(), tokenizer=tokenizer, top_k=None
    )
    for item, row in zip(items, found["adapter"], strict=True):
        said = {one["label"]: one["score"] for one in judge([item.prompt])[0]}
        assert set(json.loads(row["answer"])) == {name for name, one in said.items() if one > 0.5}
        odds = [said[f"LABEL_{n}"] for n in range(8)]
        assert reference_of(LABELS, row["probabilities"]) == pytest.approx(odds, abs=1e-4)
    assert [row["answer"] for row in found["merged"]] == [row["answer"] for row in found["adapter"]]
    assert score_sets(found["adapter"], items).score > 0.9


@pytest.mark.full
@torch.inference_mode()
def test_pairs_are_scored_as_by_peft(trained, tmp_path):
    from transformers import AutoModelForSequenceClassification

    folder = trained("rerank")
    path = pooled_models.write_lines(tmp_path / "pairs.jsonl", pooled_models.candidates(40))
    items = read_items(path, "rerank")
    questions = [
        Question(messages=({"role": "user", "content": item.prompt},), parts=item.parts)
        for item in items
    ]
    requests = asked("relevance", questions, folder)
    requests["merged"] = own("relevance", questions, merged(folder, tmp_path / "merged"))
    found = pooled_answers(requests)
    tokenizer, model = peft(folder, AutoModelForSequenceClassification, num_labels=1)
    for item, row in zip(items, found["adapter"], strict=True):
        logits = [
            float(model(**tokenizer(item.prompt, part, return_tensors="pt")).logits[0, 0])
            for part in item.parts
        ]
        assert [float(n) for n in row["answer"].split()] == pytest.approx(logits, abs=1e-3)
    scores = {who: score_orders(said, items).score for who, said in found.items()}
    assert scores["adapter"] == pytest.approx(scores["merged"], abs=1e-3)
    assert scores["adapter"] > 0.85


@pytest.mark.full
@torch.inference_mode()
def test_words_get_the_label_of_their_first_token(trained, tmp_path):
    from transformers import AutoModelForTokenClassification

    folder = trained("token-classify")
    path = pooled_models.write_lines(tmp_path / "words.jsonl", pooled_models.worded(24))
    items = read_items(path, "label")
    questions = [
        Question(messages=({"role": "user", "content": item.prompt},), parts=item.parts)
        for item in items
    ]
    requests = asked("word-labels", questions, folder)
    requests["merged"] = own("word-labels", questions, merged(folder, tmp_path / "merged"))
    found = pooled_answers(requests)
    tokenizer, model = peft(folder, AutoModelForTokenClassification, num_labels=2)
    for item, row in zip(items, found["adapter"], strict=True):
        one = tokenizer(list(item.parts), is_split_into_words=True, return_tensors="pt")
        best, words = model(**one).logits[0].argmax(-1).tolist(), one.word_ids()
        expected = [f"LABEL_{best[words.index(n)]}" for n in range(len(item.parts))]
        assert row["answer"].split() == expected
        odds = model(**one).logits[0].softmax(-1).flatten().tolist()
        assert reference_of(TOKENS, row["probabilities"]) == pytest.approx(odds, abs=1e-4)
    assert [row["answer"] for row in found["merged"]] == [row["answer"] for row in found["adapter"]]
    assert score_labels(found["adapter"], items).score > 0.9


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("mean", [2.0, 3.0]),
        ("cls", [1.0, 2.0]),
        ("lasttoken", [3.0, 4.0]),
        ("max", [3.0, 4.0]),
        ("weightedmean", [7 / 3, 10 / 3]),
        ("mean_sqrt_len_tokens", [4 / 2**0.5, 6 / 2**0.5]),
        ("cls+max", [1.0, 2.0, 3.0, 4.0]),
    ],
)
def test_tokens_are_pooled_without_padding(mode, expected):
    states = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]]])
    found = pooled_vectors(states, torch.tensor([[1, 1, 0]]), mode)
    assert found[0].tolist() == pytest.approx(expected)


def with_dense(folder, base, place, weight, bias):
    """Copy a base, with a Dense module as sentence-transformers saves one."""
    shutil.copytree(base, folder)
    listed = json.loads((folder / "modules.json").read_text())
    kind = "sentence_transformers.models.Dense"
    listed.insert(place, {"idx": 9, "name": "dense", "path": "2_Dense", "type": kind})
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "2_Dense").mkdir()
    settings = {
        "in_features": weight.shape[1], "out_features": len(weight), "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
    }  # fmt: skip
    (folder / "2_Dense" / "config.json").write_text(json.dumps(settings))
    tensors = {"linear.weight": weight, "linear.bias": bias}
    save_file(tensors, folder / "2_Dense" / "model.safetensors")
    return folder


@torch.inference_mode()
def test_a_dense_module_is_merged_along_and_computed(trained, tmp_path):
    from transformers import AutoModel

    folder, weight, bias = trained("embed"), torch.randn(16, 256), torch.randn(16)
    shutil.copytree(folder / "adapter", tmp_path / "adapter")
    with_dense(tmp_path / "base", folder / "base", 2, weight, bias)
    questions = [text_of("query", row["query"]) for row in pooled_models.queries(4)]
    requests = asked("vectors", questions, tmp_path)
    requests["merged"] = own("vectors", questions, merged(tmp_path, tmp_path / "merged"))
    found = pooled_answers(requests)
    assert (tmp_path / "merged" / "2_Dense" / "model.safetensors").read_bytes() == (
        tmp_path / "base" / "2_Dense" / "model.safetensors"
    ).read_bytes()
    tokenizer, model = peft(folder, AutoModel)
    for question, one, other in zip(questions, found["adapter"], found["merged"], strict=True):
        batch = tokenizer(question.messages[0]["content"], return_tensors="pt")
        mean = model(**batch).last_hidden_state[0].mean(0)
        expected = torch.nn.functional.normalize(torch.tanh(weight @ mean + bias), dim=0)
        for row in (one, other):
            vector = torch.tensor(unpacked(row["answer"])).float()
            torch.testing.assert_close(vector, expected, atol=2e-5, rtol=0)


def test_what_is_not_computed_is_refused(trained, tmp_path):
    base = trained("embed") / "base"
    cases = {
        "has the module Dense": (3, torch.zeros(4, 256), torch.zeros(4)),
        "takes 8 numbers, and vectors have 256": (2, torch.zeros(4, 8), torch.zeros(4)),
        r"no linear\.weight with 4 rows": (2, torch.zeros(4, 256), torch.zeros(5)),
    }
    for number, (said, case) in enumerate(cases.items()):
        folder = with_dense(tmp_path / str(number), base, *case)
        request = own("vectors", [text_of("query", "cat")], folder)
        with pytest.raises(InputRefused, match=said):
            pooled_answers({"base": request})
    with pytest.raises(InputRefused, match="pools by 'median'"):
        pooled_vectors(torch.zeros(1, 1, 1), torch.ones(1, 1), "median")


def test_a_base_without_the_head_is_refused_by_itself(trained):
    request = own("label", [text_of("user", "cat")], trained("classify") / "base")
    with pytest.raises(InputRefused, match=r"has no tensor classifier\."):
        pooled_answers({"base": request})


DOCUMENTS = (
    "It rains in Rome.",
    "A cat sleeps on the mat, and snores.",
    "Snow.",
    "{query} {document}",
)


def test_scores_by_two_tokens_are_those_of_peft(tmp_path):
    """With the prompt in plain words; sentence-transformers 6.2 gave the same by hand."""
    base = tmp_path / "base"
    token_rerankers.written(base)
    unmerged = token_rerankers.adapted(base, tmp_path / "adapter")
    question = Question(
        messages=({"role": "user", "content": "Who sleeps?"},), plain=True, parts=DOCUMENTS
    )
    rows = pooled_answers(asked("relevance", [question], tmp_path, base=True))

    expected = token_rerankers.scores(unmerged, base, "Who sleeps?", DOCUMENTS)
    found = [float(one) for one in rows["adapter"][0]["answer"].split()]
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 0.1
    assert rows["base"][0]["answer"] != rows["adapter"][0]["answer"]

    sentence, tokenizer = read_task(base).sentence, load_tokenizer(base)
    assert pair_prompt(tokenizer, sentence) == token_rerankers.worded("{query}", "{document}")
    tokenizer.chat_template = tokenizer.chat_template.replace("first }}", "first | trim }}")
    with pytest.raises(InputRefused, match="once each, as they are"):
        pair_prompt(tokenizer, sentence)
    long = Question(messages=question.messages, plain=True, parts=("snow " * 600,))
    with pytest.raises(InputRefused, match="the end of its prompt would be cut off"):
        pooled_answers(asked("relevance", [long], tmp_path))
