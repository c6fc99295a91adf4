"""Lines of data files for models that do not chat."""

import json

import pytest
from weightsmith.core.errors import UsageError
from weightsmith.evaluating.items import check_documents, read_corpus, read_items
from weightsmith.recipe.file import check_recipe


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_what_lines_say(tmp_path):
    data = tmp_path / "data.jsonl"
    (one,) = read_items(lines(data, {"text": "a", "expected": "X"}), "label")
    assert (one.prompt, one.expected, one.parts) == ("a", ("X",), ())
    (one,) = read_items(lines(data, {"words": ["b", "c"], "expected": ["O", "X"]}), "label")
    assert (one.prompt, one.expected, one.parts) == ("b c", ("O", "X"), ("b", "c"))
    sets = lines(data, {"text": "a", "labels": ["X", "O"]}, {"text": "b", "labels": []})
    (one, two) = read_items(sets, "label")
    assert (one.expected, two.expected, one.is_set) == (("X", "O"), (), True)
    (one, two) = read_items(
        lines(data, {"query": "q", "expected": "7"}, {"prompt": "r", "expected": {"a": 1, "b": 3}}),
        "embedding",
    )
    assert (one.grades, two.grades) == ((("7", 1.0),), (("b", 3.0), ("a", 1.0)))
    row = {"query": "q", "documents": ["a", "b", "c"], "expected": [2, 0]}
    (one,) = read_items(lines(data, row), "rerank")
    assert (one.parts, one.expected) == (("a", "b", "c"), ("0", "2"))
    corpus = read_corpus(
        lines(data, {"id": 7, "text": "t"}, {"_id": "x", "title": "T", "text": "u"})
    )
    assert corpus == (("7", "t"), ("x", "T u"))


TEXTS = {"query": "q", "documents": ["a", "b"]}


@pytest.mark.parametrize(
    ("metric", "row", "said"),
    [
        ("label", {"expected": "X"}, "has no text"),
        ("label", {"text": "a", "prompt": "a", "expected": "X"}, "has text and prompt"),
        ("label", {"text": "a"}, "a label of expected is not a non-empty string"),
        ("label", {"text": "a", "expected": []}, "expected has no label"),
        ("label", {"text": "a", "expected": [""]}, "a label of expected is not a non-empty"),
        ("label", {"text": 5, "expected": "X"}, "text is not a non-empty string"),
        ("label", {"text": "a", "labels": "X"}, "labels is no list"),
        ("label", {"text": "a", "labels": ["X"], "expected": "X"}, "is beside words or expected"),
        ("label", {"words": ["a"], "labels": ["X"]}, "is beside words or expected"),
        ("label", {"text": "a", "labels": ["X", "X"]}, "has one of them twice"),
        ("label", {"text": "a", "labels": [1]}, "a label of labels is not a non-empty string"),
        ("label", {"text": "a", "labels": []}, "has another form than the lines before"),
        ("label", {"words": ["a"], "expected": ["X"]}, "has another form than the lines before"),
        ("label", {"words": [], "expected": []}, "words is not a list of 1 to 1000"),
        ("label", {"words": "ab", "expected": ["X"]}, "words is not a list"),
        ("label", {"words": ["a b"], "expected": ["X"]}, "has white space in it"),
        ("label", {"words": ["a", "b"], "expected": ["X"]}, "has 2 words and 1 labels"),
        ("embedding", {"query": "q"}, "expected does not name documents"),
        ("embedding", {"query": "q", "expected": []}, "names no relevant document"),
        ("embedding", {"query": "q", "expected": ["a", "a"]}, "each once"),
        ("embedding", {"query": "q", "expected": [True]}, "does not name documents"),
        ("embedding", {"query": "q", "expected": {"a": 0}}, "names no relevant document"),
        ("embedding", {"query": "q", "expected": {"a": -1}}, "'-1' is no grade"),
        ("embedding", {"query": "q", "expected": {"a": "x"}}, "'x' is no grade"),
        ("embedding", {"query": "q", "expected": {"a": [1]}}, "is no grade"),
        ("rerank", {"query": "q", "expected": 0}, "documents is not a list"),
        ("rerank", {**TEXTS, "documents": ["a"], "expected": 0}, "fewer than two documents"),
        ("rerank", {**TEXTS, "documents": ["a", "a"], "expected": 0}, "or duplicates"),
        ("rerank", {**TEXTS, "expected": 2}, "'2' is not the index of a document"),
        ("rerank", {**TEXTS, "expected": -1}, "'-1' is not the index of a document"),
        ("rerank", {**TEXTS, "expected": {"1": 2, "01": 3}}, "'01' is not the index of a document"),
        ("rerank", {**TEXTS, "expected": "9" * 5000}, "is not the index of a document"),
        ("rerank", {**TEXTS, "expected": None}, "does not name documents"),
    ],
)
def test_a_bad_line_is_refused_with_its_place_and_the_shape(tmp_path, metric, row, said):
    good = {
        "label": {"text": "good", "expected": "X"},
        "embedding": {"query": "good", "expected": "x"},
        "rerank": {"query": "good", "documents": ["a", "b"], "expected": 0},
    }[metric]
    path = lines(tmp_path / "data.jsonl", good, row)
    with pytest.raises(UsageError, match=r"data\.jsonl:2") as caught:
        read_items(path, metric)
    assert said in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"text": "t"}], "id is not a non-empty string"),
        ([{"id": "a", "text": ""}], "text is not a non-empty string"),
        ([{"id": True, "text": "t"}], "id is not a non-empty string"),
        ([{"id": 1, "text": "t"}, {"id": "1", "text": "u"}], "another document has the id '1'"),
        ([{"id": "a", "text": "t"}], "fewer than two documents"),
        ([["a"]], "not a JSON object but a list"),
    ],
)
def test_a_bad_corpus_is_refused(tmp_path, rows, said):
    with pytest.raises(UsageError, match=r"corpus\.jsonl") as caught:
        read_corpus(lines(tmp_path / "corpus.jsonl", *rows))
    assert said in caught.value.message


def test_a_missing_corpus_and_an_unknown_document_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*nowhere"):
        read_corpus(tmp_path / "nowhere.jsonl")
    row = {"query": "q", "expected": ["a", "b"]}
    items = read_items(lines(tmp_path / "q.jsonl", row), "embedding")
    with pytest.raises(UsageError, match=r"q\.jsonl:1: expected 'b' is no document of docs\.jsonl"):
        check_documents(items, (("a", "…"), ("c", "…")), "q.jsonl", "docs.jsonl")


@pytest.mark.parametrize("suite", [{"metric": "embedding"}, {"metric": "label", "corpus": "x"}])
def test_a_corpus_belongs_to_metric_embedding_alone(suite):
    recipe = {"name": "n", "base": {"source": "b"}, "evaluate": {"data": "d", **suite}}
    with pytest.raises(UsageError, match="metric `embedding` needs a `corpus`"):
        check_recipe(recipe, "recipe.yaml")
