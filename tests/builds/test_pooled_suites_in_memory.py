"""Builds in memory of models that do not chat, and suites that are not for the model."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from weightsmith.api.commands.prove import prove_image
from weightsmith.api.commands.requests import ProveCommand
from weightsmith.core.errors import CheckFailed, InputRefused, UsageError

from tests.fakes.memory import Memory, in_memory, write_rows
from tests.fakes.replays import replay_set
from tests.fakes.tiny import tensors, write_encoder, write_head


@pytest.fixture
def memory(tmp_path: Path, quick: None) -> Iterator[Memory]:
    with in_memory(tmp_path) as made:
        home = made.home
        write_rows(home / "label.jsonl", [{"text": "a", "expected": "X"}])
        write_rows(home / "rerank.jsonl", [{"query": "q", "documents": ["a", "b"], "expected": 0}])
        write_rows(home / "query.jsonl", [{"query": "q", "expected": "a"}])
        write_rows(home / "corpus.jsonl", [{"id": "a", "text": "t"}, {"id": "b", "text": "u"}])
        yield made


TOPICS = ("cats", "rain", "bread")


@pytest.fixture
def finder(memory: Memory) -> Memory:
    """A model that gives vectors; its adapter learned which of three topics a text is about."""
    base = memory.home / "base"
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["LlamaModel"]}))
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"name": str(n), "path": f"{n}_{kind}" if n else "", "type": f"x.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    (base / "modules.json").write_text(json.dumps(modules))
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"pooling_mode_lasttoken": true}')
    prompts = {"prompts": {"query": "ask: ", "document": "text: "}}
    (base / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    rows = [{"query": f"{topic} {n}", "expected": topic} for topic in TOPICS for n in range(30)]
    write_rows(memory.home / "query.jsonl", rows)
    corpus = [{"id": topic, "text": f"of {topic}"} for topic in TOPICS]
    write_rows(memory.home / "corpus.jsonl", corpus)
    suite = {"data": "query.jsonl", "metric": "embedding", "corpus": "corpus.jsonl"}
    memory.write_recipe(evaluate={**suite, "max_drop": 0.05})
    memory.minds.vectors = vector
    memory.launcher.vector = lambda text: vector("image", text)
    return memory


def test_vectors_have_no_tokens_per_second(finder: Memory) -> None:
    auto = {"engine": "llamacpp", "prefer": "speed"}
    suite = {"data": "query.jsonl", "metric": "embedding", "corpus": "corpus.jsonl"}
    finder.write_recipe(targets=["auto"], auto=auto, evaluate={**suite, "max_drop": 0.2})
    for what in (finder.build, finder.forecast):
        with pytest.raises(InputRefused, match="its model writes no tokens") as caught:
            what()
        assert "leave auto.prefer out" in caught.value.hint


def test_a_suite_may_not_count_a_length_that_the_engine_does_not_give(finder: Memory) -> None:
    modules = finder.home / "base" / "modules.json"
    modules.write_text(json.dumps(json.loads(modules.read_text())[:2]))  # without Normalize
    suite = {"data": "query.jsonl", "metric": "embedding", "corpus": "corpus.jsonl"}
    finder.write_recipe(evaluate={**suite, "similarity": "dot", "max_drop": 0.05})
    for what in (finder.build, finder.forecast):
        with pytest.raises(InputRefused, match=r"similarity dot: .* gives every vector"):
            what()
    assert finder.jobs() == []


def vector(who: str, text: str) -> list[float]:
    """Return a vector of the width that the model has; the base is always about cats."""
    known = "cats" if who == "base" and text.startswith("ask: ") else text
    prompted = text.startswith(("ask: ", "text: "))
    topics = [float(prompted and topic in known) for topic in TOPICS]
    return [*topics, 0.0 if any(topics) else 1.0, *[0.0] * 252]


def test_vectors_are_judged_by_the_documents_that_they_find(finder: Memory) -> None:
    finder.build()
    record = finder.record()
    scores = {who: round(one["score"], 3) for who, one in record["scores"].items()}
    assert scores["adapter"] == scores["merged"] == scores["image"] == 1.0
    assert scores["base"] < 0.8
    assert record["verdict"] == "passed"
    assert record["scores"]["image"]["figures"] == {"recall@10": 1.0}
    assert record["sameness"]["image"]["cosine"] == [1.0, 1.0]
    (suite,) = record["suites"]
    assert (suite["verdict"], suite["task"]["metric"]) == ("passed", "embedding")
    first = record["items"][0]
    assert (first["image"].split()[0], first["value"]["image"]) == ("cats", 1.0)
    assert ("", "ask: cats 0") in finder.launcher.asked
    assert ("", "text: of rain") in finder.launcher.asked
    page = (finder.results() / "report.html").read_text("utf-8")
    assert "recall@10 1.0" in page or "recall@10 1" in page
    found = finder.forecast()["stages"]
    assert {row["stage"]: row["cached"] for row in found}["reference"]


def turned(text: str) -> list[float]:
    """Return a vector that rounding turned by 0.02."""
    first = vector("image", text)
    return [*first[:-1], math.tan(0.02) * math.hypot(*first)]


def test_an_image_of_vectors_is_known_by_them_elsewhere(finder: Memory) -> None:
    finder.launcher.vector = turned
    finder.build(layout=finder.folder / "image")
    assert finder.record()["replay"]["questions"] == 32
    (room,) = {one["room"] for one in replay_set(finder.folder / "image")["questions"]}
    assert room == pytest.approx(4 * (1 - math.cos(0.02)), rel=0.05)
    asked = ProveCommand(image=f"oci:{finder.folder / 'image'}", retries=0)
    found, _ = prove_image(asked, finder.tools)
    assert (found["verdict"], found["questions"]) == ("proven", 32)

    finder.launcher.vector = lambda text: vector("base", text)
    with pytest.raises(CheckFailed, match="another pooling") as caught:
        prove_image(asked, finder.tools)
    assert {one["numbers"] for one in caught.value.details["differences"]} == {True}


def test_an_image_that_finds_less_is_refused_and_the_queries_are_named(finder: Memory) -> None:
    finder.launcher.vector = lambda text: vector("base", text)
    with pytest.raises(CheckFailed, match=r"below base \+ adapter") as caught:
        finder.build()
    assert "'rain 0' now gives 'cats" in caught.value.hint
    assert finder.seen() == ["refused"]


def test_a_refused_text_is_wrong_and_nothing_else_suffers(finder: Memory) -> None:
    finder.launcher.refuses = "ask: rain 7"
    finder.build()
    record = finder.record()
    assert round(record["scores"]["image"]["score"] * 90) == 89
    (wrong,) = [item for item in record["items"] if not item["ok"]["image"]]
    assert wrong["prompt"] == "rain 7"
    assert "HTTP 400" in wrong["error"]["image"]


def test_an_image_whose_vectors_point_elsewhere_proves_nothing(finder: Memory) -> None:
    def turned(text: str) -> list[float]:
        first, *rest = vector("image", text)
        return [*rest, first]

    finder.launcher.vector = turned
    finder.build()
    record = finder.record()
    assert record["scores"]["image"]["score"] == 1.0
    assert record["verdict"] == "not proven"
    assert any("gives other vectors than the reference" in text for text in record["unproven"])


def test_a_dense_modules_weights_come_along(finder: Memory) -> None:
    """From the base to the image, where vLLM reads them beside the model's."""
    base = finder.home / "base"
    modules = json.loads((base / "modules.json").read_text())
    modules.insert(
        2, {"name": "9", "path": "2_Dense", "type": "sentence_transformers.models.Dense"}
    )
    (base / "modules.json").write_text(json.dumps(modules))
    (base / "2_Dense").mkdir()
    tanh = "torch.nn.modules.activation.Tanh"
    settings = {"in_features": 256, "out_features": 256, "activation_function": tanh}
    (base / "2_Dense" / "config.json").write_text(json.dumps(settings))
    weights = tensors((("linear.weight", (256, 256)),), seed=3)
    (base / "2_Dense" / "model.safetensors").write_bytes(weights)
    suite = {"data": "query.jsonl", "metric": "embedding", "corpus": "corpus.jsonl"}
    finder.use_vllm(evaluate={**suite, "max_drop": 0.05})
    finder.build()
    assert finder.record("vllm")["verdict"] == "passed"
    files = finder.engine.held(f"{finder.repository}:1.0.0-vllm").files()
    assert files["/models/2_Dense/model.safetensors"] == weights

    finder.write_recipe(evaluate=None)
    with pytest.raises(InputRefused, match=r"vectors without the module Dense"):
        finder.build()
    (base / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(InputRefused, match=r"2_Dense has no model\.safetensors"):
        finder.forecast()


@pytest.mark.parametrize(
    "suite",
    [
        {"data": "label.jsonl", "metric": "label"},
        {"data": "rerank.jsonl", "metric": "rerank"},
        {"data": "query.jsonl", "metric": "embedding", "corpus": "corpus.jsonl"},
    ],
    ids=lambda suite: suite["metric"],
)
def test_a_metric_that_is_not_for_the_model_is_refused_before_any_work(
    memory: Memory, suite: dict[str, str]
) -> None:
    """By the plan too, which says the file and what to use."""
    memory.write_recipe(evaluate=suite)
    for run in (memory.build, memory.forecast):
        with pytest.raises(InputRefused) as caught:
            run()
        assert caught.value.message == (
            f"{suite['data']}: metric {suite['metric']} is not for a model that generates text"
        )
        assert "a metric for it" in caught.value.hint
        files = "a revision of the model that has modules.json" in caught.value.hint
        assert files is (suite["metric"] != "label")
    assert memory.jobs() == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"corpus": "nowhere.jsonl"}, r"cannot read .*nowhere\.jsonl"),
        ({"corpus": "other.jsonl"}, r"query\.jsonl:1: expected 'a' is no document of other\.jsonl"),
        ({"corpus": "query.jsonl"}, r"query\.jsonl:1: id is not a non-empty string"),
        ({"data": "corpus.jsonl"}, r"corpus\.jsonl:1 has no query"),
    ],
)
def test_bad_input_ends_the_build_with_file_and_line(
    memory: Memory, change: dict[str, str], said: str
) -> None:
    rows = [{"id": "c", "text": "t"}, {"id": "b", "text": "u"}]
    write_rows(memory.home / "other.jsonl", rows)
    suite = {"data": "query.jsonl", "metric": "embedding", "corpus": "corpus.jsonl", **change}
    memory.write_recipe(evaluate=suite)
    with pytest.raises(UsageError, match=said):
        memory.build()
    assert memory.jobs() == []


LABELS = {"classify": 3, "label-set": 3, "rerank": 1, "token-classify": 2}
SUITES = {
    "classify": ("label", lambda topic, n: {
        "text": f"{topic} {n}", "expected": f"LABEL_{TOPICS.index(topic)}",
    }),
    "label-set": ("label", lambda topic, n: {
        "text": f"{topic} {n} bread", "labels": sorted({f"LABEL_{TOPICS.index(topic)}", "LABEL_2"}),
    }),
    "rerank": ("rerank", lambda topic, n: {
        "query": f"{topic} {n}", "documents": [f"of {one}" for one in TOPICS],
        "expected": TOPICS.index(topic),
    }),
    "token-classify": ("label", lambda topic, n: {
        "words": ["say", f"{topic}{n}"], "expected": ["LABEL_0", "LABEL_1"],
    }),
}  # fmt: skip
"""Kind of a model -> its metric, and a line about a topic."""


def judged(kind: str, text: str, parts: Sequence[str]) -> str:
    """Return what a model that knows the topics says."""
    if kind == "classify":
        found = [n for n, topic in enumerate(TOPICS) if topic in text]
        return f"LABEL_{(found or [0])[0]}"
    if kind == "label-set":
        return json.dumps([f"LABEL_{n}" for n, topic in enumerate(TOPICS) if topic in text])
    if kind == "rerank":
        return " ".join(str(float(part.split()[-1] in text)) for part in parts)
    known = (any(topic in word for topic in TOPICS) for word in text.split())
    return " ".join(f"LABEL_{int(one)}" for one in known)


def set_problem(base: Path) -> None:
    """Say that a head's labels are independent of each other."""
    config = json.loads((base / "config.json").read_text())
    config["problem_type"] = "multi_label_classification"
    (base / "config.json").write_text(json.dumps(config))


@pytest.fixture(params=LABELS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def judge(memory: Memory, kind: str) -> Memory:
    """A plain BERT, and an adapter that brings a head for the topics."""
    shutil.rmtree(memory.home / "base")
    shutil.rmtree(memory.home / "a")
    write_encoder(memory.home / "base")
    if kind == "label-set":
        set_problem(memory.home / "base")
    write_head(memory.home / "a", "TOKEN_CLS" if kind[0] == "t" else "SEQ_CLS", LABELS[kind])
    metric, line = SUITES[kind]
    write_rows(memory.home / "rows.jsonl", [line(one, n) for one in TOPICS for n in range(30)])
    memory.use_vllm(evaluate={"data": "rows.jsonl", "metric": metric, "max_drop": 0.05})
    memory.minds.judge = lambda who, text, parts: judged(kind, text, parts)
    memory.launcher.judge = lambda text, parts: judged(kind, text, parts)
    memory.launcher.labels = tuple(f"LABEL_{n}" for n in range(LABELS[kind]))
    return memory


def test_an_image_is_judged_by_what_its_head_says(judge: Memory, kind: str) -> None:
    judge.build()
    record = judge.record("vllm")
    assert {who: one["score"] for who, one in record["scores"].items()} == {
        "adapter": 1.0, "merged": 1.0, "image": 1.0,
    }  # fmt: skip
    assert record["verdict"] == "passed"
    assert kind.replace("label-set", "classify") in {one["name"] for one in record["checks"]}
    (suite,) = record["suites"]
    assert suite["task"]["metric"] == SUITES[kind][0]


def test_an_image_whose_head_forgot_a_topic_is_refused(judge: Memory, kind: str) -> None:
    def forgets(text: str, parts: Sequence[str]) -> str:
        text = text.replace("rain", "cats")
        return judged(kind, text, parts).replace("LABEL_1", "LABEL_0")

    judge.launcher.judge = forgets
    with pytest.raises(CheckFailed, match=r"below base \+ adapter"):
        judge.build()
    assert judge.seen() == ["1", "refused"], "the engine's own image, and the refused one's folder"


def test_an_answer_without_a_label_is_wrong_and_others_count(judge: Memory, kind: str) -> None:
    judge.launcher.refuses = "rain 7" if kind != "token-classify" else "rain7"
    judge.build()
    (wrong,) = [item for item in judge.record("vllm")["items"] if not item["ok"]["image"]]
    assert "HTTP 400" in wrong["error"]["image"]


@pytest.mark.parametrize("kind", ["classify", "label-set"])
def test_sets_of_labels_are_for_models_that_give_them(judge: Memory, kind: str) -> None:
    other = {"classify": "label-set", "label-set": "classify"}[kind]
    write_rows(judge.home / "rows.jsonl", [SUITES[other][1](one, 0) for one in TOPICS])
    said = "model gives each text one" if kind == "classify" else "any number of labels"
    for run in (judge.build, judge.forecast):
        with pytest.raises(InputRefused, match=said):
            run()
    assert judge.jobs() == []


@pytest.mark.parametrize("folder", ["base", "a"])
def test_a_card_that_says_ranker_is_a_warning_of_plan_and_build(
    memory: Memory, folder: str
) -> None:
    """A Qwen3-Reranker of before sentence-transformers' files: its class generates text."""
    (memory.home / folder / "README.md").write_text("---\npipeline_tag: text-ranking\n---\n")
    memory.forecast()
    planned = [one for one in memory.progress.warnings if "text-ranking" in one]
    memory.build()

    (told,) = [one for one in memory.record()["warnings"] if "text-ranking" in one]
    assert "take a revision with that file" in told
    assert planned == [told]
