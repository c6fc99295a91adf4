"""Servers that give vectors, labels and scores, and what else a server may say."""

import json
import math
from dataclasses import replace

import pytest
from weightsmith.core.errors import CheckFailed
from weightsmith.core.ports import Silent
from weightsmith.evaluating.client import KeptAnswers, Served
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.session import ServerSession, SessionLimits
from weightsmith.evaluating.task import Task, ask_server, score_task
from weightsmith.models.task import ModelTask, SentenceTransformers

from tests.fakes.openai_server import flood, servers

PROMPTED = SentenceTransformers(
    modules=("Transformer",), prompts=(("query", "query: "), ("passage", "passage: "))
)
MODEL = ModelTask(kind="embed", sentence=PROMPTED, labels=("A", "W"))
DOCUMENTS = (("a", "cats purr"), ("b", "rain falls"), ("c", "bread rises"))
VECTORS = {"query: cats": [1, 0], "query: rain": [0, 1], "passage: cats purr": [2, 0],
           "passage: rain falls": [0, 3], "passage: bread rises": [1, 1]}  # fmt: skip


def item(text, expected, parts=(), grades=()):
    return Item(
        messages=({"role": "user", "content": text},), expected=tuple(expected), line=1,
        parts=tuple(parts), grades=tuple(grades), plain=True,
    )  # fmt: skip


EMBEDDING = Task(
    items=(item("cats", "a", grades=[("a", 1.0)]), item("rain", "b", grades=[("b", 1.0)])),
    metric="embedding",
    corpus=DOCUMENTS,
)
RERANK = Task(
    items=(
        item("cats", "1", ["rain falls", "cats purr"], [("1", 1.0)]),
        item("rain", "0", ["rain falls", "cats purr"], [("0", 1.0)]),
    ),
    metric="rerank",
)
SETS = Task(
    items=tuple(replace(one, is_set=True) for one in (item("cats purr", ["A"]), item("rain", []))),
    metric="label",
)
LABEL = Task(items=(item("cats purr", ["ANIMAL"]), item("rain falls", ["WEATHER"])), metric="label")


def reply(handler, body):
    """Answer as vLLM does."""
    if handler.path == "/v1/embeddings":
        row = {"embedding": VECTORS[body["input"]]}
        return {"model": "support", "data": [row], "usage": {"prompt_tokens": 4}}
    if handler.path == "/v1/rerank":
        scores = [float(body["query"] in text) for text in body["documents"]]
        rows = [{"index": n, "relevance_score": score} for n, score in enumerate(scores)]
        return {"results": sorted(rows, key=lambda row: -row["relevance_score"])}
    label = "ANIMAL" if "cats" in body["input"] else "WEATHER"
    return {"data": [{"label": label, "probs": [0.9 if label == "ANIMAL" else 0.5, 0.1]}]}


@pytest.fixture
def serve():
    with servers() as start:
        yield start


def asked(server, task, kept=None):
    limits = SessionLimits(tries=2, pause_seconds=0.01)
    with ServerSession(server.endpoint, limits) as session:
        served = Served(name="support")
        answers = ask_server(session, served, task, Silent(), kept=kept, model=MODEL)
    return score_task(task, answers, lambda *_: "")


@pytest.mark.parametrize("task", [EMBEDDING, RERANK, LABEL, SETS], ids=lambda task: task.pooled)
def test_a_server_is_asked_by_its_api(serve, task):
    found = asked(serve(lambda handler, body: handler.send(200, reply(handler, body))), task)
    assert (found.score, found.n, found.metric) == (1.0, 2, task.metric)


def test_queries_and_documents_get_the_models_prompts(serve):
    server = serve(lambda handler, body: handler.send(200, reply(handler, body)))
    found = asked(server, EMBEDDING)
    assert [body["input"] for body in server.asked] == [*VECTORS]
    assert found.per_item[0]["prompt_tokens"] == 4
    own = Task(items=EMBEDDING.items, metric="embedding", query_prompt="ask ", document_prompt="")
    assert own.prompts(MODEL) == ("ask ", "")
    default = SentenceTransformers(prompts=(("web", "search: "),), default_prompt="web")
    assert EMBEDDING.prompts(ModelTask(kind="embed", sentence=default)) == ("search: ",) * 2
    assert EMBEDDING.prompts() == ("", "")


def nested(value, *keys):
    for key in reversed(keys):
        value = [value] if key == 0 else {key: value}
    return value


BROKEN = {
    "no JSON": (EMBEDDING, "<html>"),
    "a list": (EMBEDDING, [1]),
    "no data": (EMBEDDING, {"data": []}),
    "data is a number": (EMBEDDING, {"data": 5}),
    "two vectors": (EMBEDDING, {"data": [{"embedding": [1, 2]}, {"embedding": [1, 2]}]}),
    "a text": (EMBEDDING, nested("AAAA", "data", 0, "embedding")),
    "not a number": (EMBEDDING, nested([1, math.nan], "data", 0, "embedding")),
    "endless": (EMBEDDING, nested([1, math.inf], "data", 0, "embedding")),
    "null": (EMBEDDING, nested([None], "data", 0, "embedding")),
    "zeros": (EMBEDDING, nested([0, 0], "data", 0, "embedding")),
    "an empty vector": (EMBEDDING, nested([], "data", 0, "embedding")),
    "a document twice": (RERANK, {"results": [{"index": 0, "relevance_score": 1}] * 2}),
    "a document too many": (RERANK, nested({"index": 2, "relevance_score": 1}, "results", 0)),
    "a score that is none": (RERANK, nested({"index": 0, "relevance_score": "x"}, "results", 0)),
    "results are text": (RERANK, {"results": "none"}),
    "no index": (RERANK, nested({"index": [0], "relevance_score": 1}, "results", 0)),
    "no label": (LABEL, nested({"label": None, "probs": [1]}, "data", 0)),
    "a probability too few": (SETS, nested({"label": "W", "probs": [0.2]}, "data", 0)),
    "no probabilities": (LABEL, nested({"label": "ANIMAL"}, "data", 0)),
}  # fmt: skip


@pytest.mark.parametrize(("task", "said"), BROKEN.values(), ids=BROKEN)
def test_what_is_no_answer_is_a_wrong_row_and_nothing_else_suffers(serve, task, said):
    def behave(handler, body):
        if "rain" not in json.dumps({**body, "documents": ""}):
            handler.send(200, reply(handler, body))
        else:
            text = said if isinstance(said, str) else json.dumps(said)
            handler.reply(200, text.encode(), {"Content-Length": str(len(text))})

    found = asked(serve(behave), task)
    right, wrong = found.per_item
    assert found.values == [1.0, 0.0]
    assert wrong["error"]
    assert "error" not in right


@pytest.mark.parametrize("behave", [flood, lambda handler, body: handler.send(400, {"e": 1})])
@pytest.mark.parametrize("task", [EMBEDDING, RERANK, LABEL], ids=lambda task: task.metric)
def test_so_is_a_refusal_and_an_answer_of_many_megabytes(serve, task, behave):
    def first_only(handler, body):
        if "rain" in json.dumps({**body, "documents": ""}):
            behave(handler, body)
        else:
            handler.send(200, reply(handler, body))

    found = asked(serve(first_only), task)
    assert found.values == [1.0, 0.0]
    assert "HTTP 400" in found.per_item[1]["error"] or "larger than" in found.per_item[1]["error"]


def test_a_vector_of_another_length_is_none(serve):
    def behave(handler, body):
        said = reply(handler, body)
        if "purr" in body["input"]:
            said["data"][0]["embedding"] = [1, 0, 0]
        handler.send(200, said)

    found = asked(serve(behave), EMBEDDING)
    assert found.values == [0.0, 1.0]
    assert found.per_item[0]["error"] == "document a: 3 numbers, where others have 2"


@pytest.mark.parametrize("status", [404, 500])
def test_a_server_that_answers_nothing_ends_it(serve, status):
    many = tuple(item(f"text {n}", ["X"]) for n in range(12))
    with pytest.raises(CheckFailed, match=f"HTTP {status}"):
        asked(
            serve(lambda handler, body: handler.send(status, {})), Task(items=many, metric="label")
        )


def test_another_models_vectors_are_not_taken(serve):
    server = serve(
        lambda handler, body: handler.send(200, {**reply(handler, body), "model": "other"})
    )
    with pytest.raises(CheckFailed, match="'other' answered"):
        asked(server, EMBEDDING)


def test_answers_are_kept_and_not_asked_again(serve, tmp_path):
    server = serve(lambda handler, body: handler.send(200, reply(handler, body)))
    first = asked(server, EMBEDDING, KeptAnswers(tmp_path / "kept.jsonl"))
    count = len(server.asked)
    again = asked(server, EMBEDDING, KeptAnswers(tmp_path / "kept.jsonl"))
    assert (count, len(server.asked)) == (5, 5)
    assert again.values == first.values
