"""Labels and orders, held against scikit-learn."""

import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from weightsmith.core.jobs import words_text
from weightsmith.core.vectors import packed, unpacked
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.ranking import (
    cosines_of,
    macro_f1,
    ndcg,
    recall,
    reciprocal_rank,
    score_labels,
    score_orders,
    score_sets,
    score_vectors,
)
from weightsmith.evaluating.task import Task, score_task


def item(text, expected=(), parts=(), grades=()):
    message = {"role": "user", "content": text}
    return Item(
        messages=(message,), expected=tuple(expected), line=1, parts=tuple(parts),
        grades=tuple(grades),
    )  # fmt: skip


@pytest.mark.slow
def test_ndcg_is_that_of_scikit_learn_also_where_scores_are_equal():
    from sklearn.metrics import ndcg_score

    draw = np.random.default_rng(0)
    for _ in range(200):
        scores = np.round(draw.normal(size=draw.integers(2, 30)), draw.integers(0, 3))
        grades = draw.integers(0, 4, len(scores))
        grades[0] = 1
        gains = {n: float(grade) for n, grade in enumerate(grades) if grade}
        assert ndcg(scores, gains) == pytest.approx(ndcg_score([grades], [scores], k=10))


@pytest.mark.slow
def test_macro_f1_is_that_of_scikit_learn():
    from sklearn.metrics import f1_score

    draw = np.random.default_rng(1)
    for _ in range(50):
        pairs = [tuple(map(str, draw.integers(0, 5, 2))) for _ in range(20)]
        wanted, given = zip(*pairs, strict=True)
        assert macro_f1(pairs) == pytest.approx(f1_score(wanted, given, average="macro"))


def test_recall_and_rank_by_hand():
    scores = np.array([0.9, 0.8, 0.7, 0.7, 0.1])
    gains = {1: 1.0, 2: 2.0, 4: 1.0}
    assert recall(scores, gains, 2) == pytest.approx(1 / 3)
    # The third place is shared by two, of which one is relevant.
    assert recall(scores, gains, 3) == pytest.approx((1 + 0.5) / 3)
    assert recall(scores, gains, 99) == 1
    assert reciprocal_rank(scores, gains) == 0.5
    assert reciprocal_rank(scores, {3: 1.0}) == 0.25, "another one with its score is before it"
    assert reciprocal_rank(np.arange(20.0), {0: 1.0}) == 0, "not among the first ten"


def test_a_text_is_right_by_its_label_and_words_by_share():
    texts = [item("a", ["X"]), item("b", ["Y", "Z"]), item("c", ["X"])]
    found = score_labels(
        [{"answer": "X"}, {"answer": "Z"}, {"answer": "", "error": "HTTP 400"}], texts
    )
    assert [row["ok"] for row in found.per_item] == [True, True, False]
    assert (found.score, found.graded) == (pytest.approx(2 / 3), False)
    assert [row["guess"] for row in found.per_item] == [True, False, True], "X is commonest"
    assert found.figures == {"macro_f1": pytest.approx((2 / 3 + 1) / 2)}

    words = [item("a b", ["O", "X"], "ab"), item("c d", ["O", "O"], "cd")]
    found = score_labels([{"answer": "O O"}, {"answer": "O"}], words)
    assert found.values == [0.5, 0.5], "a word without a label is wrong"
    assert found.graded
    assert [row["guess"] for row in found.per_item] == [0.5, 1.0]

    named = [item("Ann Lee", ["first name", "last  name"], ("Ann", "Lee"))]
    found = score_labels([{"answer": words_text(["first name", "O"])}], named)
    assert found.values == [0.5], "labels may have blanks"


@pytest.mark.slow
def test_sets_of_labels_are_scored_as_by_scikit_learn():
    from sklearn.metrics import f1_score

    draw, names = random.Random(5), ["A", "B", "C", "D"]
    wanted = [[name for name in names if draw.random() < 0.4] for _ in range(60)]
    given = [[name for name in names if (name in one) != (draw.random() < 0.2)] for one in wanted]
    items = [replace(item(str(n), one), is_set=True) for n, one in enumerate(wanted)]
    found = score_sets([{"answer": json.dumps(one)} for one in given], items)
    true, said = (
        np.array([[name in one for name in names] for one in sets]) for sets in (wanted, given)
    )

    def f1(said, kind="samples"):
        return f1_score(true, said, average=kind, zero_division=1)

    assert found.score == pytest.approx(f1(said))
    figures = {"micro_f1": f1(said, "micro"), "macro_f1": f1(said, "macro")}
    assert found.figures == pytest.approx(figures)
    assert [row["ok"] for row in found.per_item] == (true == said).all(1).tolist()
    guesses = [f1(np.tile(one, (60, 1))) for one in (*np.eye(4), np.zeros(4), np.ones(4))]
    assert np.mean([row["guess"] for row in found.per_item]) >= max(guesses) - 1e-9

    lost = score_sets([{"answer": "", "error": "HTTP 400"}], [replace(item("a", []), is_set=True)])
    assert lost.values == [0.0], "no answer is no empty set"


CORPUS = (("x", "…"), ("y", "…"), ("z", "…"))
VECTORS = [{"answer": packed(row)} for row in ([1, 0], [0, 1], [2, 0.1], [0.1, 3], [1, 1])]


def test_documents_are_ordered_by_cosine_whatever_their_length():
    queries = [item("1", ["x"], grades=[("x", 1.0)]), item("2", ["x"], grades=[("x", 1.0)])]
    found = score_vectors(VECTORS, queries, CORPUS, recall_at=1)
    assert [row["answer"].split() for row in found.per_item] == [["x", "z", "y"], ["y", "z", "x"]]
    assert found.values == [1.0, pytest.approx(1 / math.log2(4))]
    assert found.figures == {"recall@1": 0.5}
    guess = (1 + 1 / math.log2(3) + 0.5) / 3
    assert [row["guess"] for row in found.per_item] == [pytest.approx(guess)] * 2


@pytest.mark.parametrize("kind", ["", "cosine", "dot", "euclidean", "manhattan"])
def test_documents_are_ordered_by_the_models_own_similarity(kind):
    """Held against SciPy; sentence-transformers 6.2 has the same formulas."""
    from scipy.spatial.distance import cdist

    draw = np.random.default_rng(5)
    rows = (draw.normal(size=(12, 3)) * draw.uniform(0.2, 5, (12, 1))).astype(np.float32)
    vectors = [{"answer": packed(row)} for row in rows.tolist()]
    corpus, queries = rows[2:].astype(float), rows[:2].astype(float)
    wanted = {
        "dot": queries @ corpus.T,
        "euclidean": -cdist(queries, corpus, "euclidean"),
        "manhattan": -cdist(queries, corpus, "cityblock"),
    }.get(kind, 1 - cdist(queries, corpus, "cosine"))
    items = [item(str(n), ["0"], grades=[("0", 1.0)]) for n in range(2)]

    found = score_vectors(vectors, items, [(str(n), "…") for n in range(10)], 1, kind)

    orders = [[int(place) for place in row["answer"].split()] for row in found.per_item]
    assert orders == np.argsort(-wanted, kind="stable").tolist()
    lost = [*vectors[:2], {"answer": "", "error": "HTTP 400"}, *vectors[3:]]
    again = score_vectors(lost, items[:1] * 2, [(str(n), "…") for n in range(10)], 1, kind)
    assert again.values == [0.0, 0.0]


def test_a_document_without_a_vector_costs_its_own_queries_alone():
    queries = [item("1", ["x"], grades=[("x", 1.0)]), item("2", ["y"], grades=[("y", 1.0)])]
    lost = [*VECTORS[:2], {"answer": "", "error": "HTTP 400"}, *VECTORS[3:]]
    found = score_vectors(lost, queries, CORPUS, recall_at=1)
    assert found.values == [0.0, 1.0]
    assert found.per_item[0]["error"] == "document x: HTTP 400"
    assert "error" not in found.per_item[1]
    none = [{"answer": "", "error": "HTTP 400"}] * 5
    assert score_vectors(none, queries, CORPUS, recall_at=1).values == [0.0, 0.0]


def test_documents_of_a_query_are_ordered_by_their_scores():
    asked = [item("q", ["1"], "abc", [("1", 2.0)]), item("r", ["0"], "ab", [("0", 1.0)])]
    found = score_orders([{"answer": "-1.5 2e1 3"}, {"answer": "1 1"}], asked)
    assert [row["answer"] for row in found.per_item] == ["1 2 0", "0 1"]
    assert found.values == [1.0, pytest.approx((1 + 1 / math.log2(3)) / 2)]
    assert found.figures == {"mrr@10": 0.75}


def test_vectors_are_read_back_and_compared():
    assert unpacked(packed([1.5, -2])).tolist() == [1.5, -2]
    with pytest.raises(ValueError, match="base64"):
        unpacked("x")
    one, other = packed([1, 0]), packed([1, 1])
    assert cosines_of([one, one, ""], [one, other, one]) == pytest.approx([1, math.sqrt(0.5)])


@pytest.mark.parametrize(
    ("named", "files", "order"),
    [
        ("", "", ["z", "x", "y"]),
        ("cosine", "dot", ["z", "x", "y"]),
        ("dot", "", ["x", "z", "y"]),
        ("euclidean", "dot", ["z", "y", "x"]),
        ("", "dot", ["x", "z", "y"]),
    ],
)
def test_a_suites_similarity_comes_before_that_of_the_models_files(named, files, order):
    """A server does not say how its model's vectors are compared."""
    task = Task(
        items=(item("1", ["x"], grades=[("x", 1.0)]),),
        metric="embedding",
        corpus=CORPUS,
        similarity=named,
    )
    rows = [[1, 0], [9, 9], [0, 1], [1.5, 0.5]]
    vectors = tuple({"answer": packed(row)} for row in rows)

    found = score_task(task, vectors, no_program, similarity=files)

    assert found.per_item[0]["answer"].split() == order


def no_program(*_: object) -> str:
    raise AssertionError("no program judges vectors")
