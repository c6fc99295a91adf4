"""Metrics of models that do not chat: labels, and the order of documents by vectors or scores.

What such a model says of a text is one text in an answer's row: a label, numbers with blanks
between them, or a vector as float32 in base64.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from weightsmith.core.jobs import words_labels
from weightsmith.core.safe_parse import parse
from weightsmith.core.values import Json, JsonValue, Score
from weightsmith.core.vectors import unpacked
from weightsmith.evaluating.items import Item

Answer = Mapping[str, Json]
_TOP = 10
"""Documents that nDCG and the reciprocal rank count, and that are shown."""
_LIKELY = 20
_DISCOUNTS = [1 / math.log2(place + 2) for place in range(_TOP)]
Gains = Mapping[int, float]
"""The relevant documents, by their places -> their grades, above 0."""


def weighted_sum(scores: np.ndarray, gains: Gains, weights: Sequence[float]) -> float:
    """Return the sum of gains, each times the weight of its place in descending order of scores.

    Of equal scores no order is known: each gets the mean weight of their places, which is the mean
    over all orders. McSherry and Najork, "Computing information retrieval performance measures
    efficiently in the presence of tied scores", 2008; scikit-learn's `ndcg_score` does the same.
    """
    total = 0.0
    for place, gain in gains.items():
        before, tied = (scores > scores[place]).sum(), (scores == scores[place]).sum()
        total += gain * sum(weights[before : before + tied]) / float(tied)
    return total


def ndcg(scores: np.ndarray, gains: Gains) -> float:
    """Return the normalized discounted cumulative gain of the first ten, from 0 to 1.

    Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", 2002, with the
    discount 1 / log2(place + 1) and the grade itself as gain, as in trec_eval.
    """
    ideal = zip(sorted(gains.values(), reverse=True), _DISCOUNTS, strict=False)
    return weighted_sum(scores, gains, _DISCOUNTS) / sum(gain * weight for gain, weight in ideal)


def recall(scores: np.ndarray, gains: Gains, top: int) -> float:
    """Return the share of the relevant ones that are among the first `top`."""
    return weighted_sum(scores, dict.fromkeys(gains, 1 / len(gains)), [1.0] * top)


def reciprocal_rank(scores: np.ndarray, gains: Gains) -> float:
    """Return 1 / the place of the first relevant one, 0 if it is not among the first ten.

    Others with its score are before it.
    """
    relevant = np.array(list(gains))
    best = scores[relevant].max()
    place = 1 + (scores >= best).sum() - (scores[relevant] >= best).sum()
    return 1 / float(place) if place <= _TOP else 0.0


def macro_f1(pairs: Sequence[tuple[str, str]]) -> float:
    """Return the mean of the F1 scores of all labels that occur, of (expected, given) pairs."""
    right = Counter(want for want, got in pairs if want == got)
    wanted, given = Counter(want for want, _ in pairs), Counter(got for _, got in pairs)
    labels = sorted(label for label in wanted.keys() | given.keys() if label)
    return sum(2 * right[one] / (wanted[one] + given[one]) for one in labels) / max(1, len(labels))


def score_labels(answers: Sequence[Answer], items: Sequence[Item]) -> Score:
    """Return the accuracy by text, or the mean share of right words; with macro-F1 beside it.

    Of several expected labels of a text, each is right.
    """
    wanted = [item.expected if item.parts else item.expected[:1] for item in items]
    often = Counter(label for labels in wanted for label in labels)
    guess = min(often, key=lambda label: (-often[label], label))
    rows: list[dict[str, JsonValue]] = []
    pairs: list[tuple[str, str]] = []
    for item, answer in zip(items, answers, strict=True):
        said, failed = str(answer["answer"]), "error" in answer
        row: dict[str, JsonValue] = {**_question(item), **answer}
        if item.parts:
            given = [] if failed else words_labels(said)
            given += [""] * (len(item.parts) - len(given))
            words = list(zip(item.expected, given, strict=True))
            pairs += words
            row["value"] = sum(want == got for want, got in words) / len(words)
            row["guess"] = sum(label == guess for label in item.expected) / len(words)
            row["ok"] = row["value"] == 1
        else:
            row["ok"] = not failed and said in item.expected
            row["guess"] = guess in item.expected
            pairs.append((said if row["ok"] else item.expected[0], "" if failed else said))
        rows.append(row)
    return _score("label", rows, {"macro_f1": macro_f1(pairs)})


def score_sets(answers: Sequence[Answer], items: Sequence[Item]) -> Score:
    """Return the mean F1 of the texts' sets of labels, with micro- and macro-F1 beside it.

    Of two empty sets it is 1, as of scikit-learn's `f1_score` with `average="samples"` and
    `zero_division=1`.
    """
    guess = _likely_set([item.expected for item in items])
    hits, sizes = Counter[str](), Counter[str]()
    rows: list[dict[str, JsonValue]] = []
    for item, answer in zip(items, answers, strict=True):
        failed, wanted = "error" in answer, set(item.expected)
        given = set() if failed else set(parse(str(answer["answer"])))
        row: dict[str, JsonValue] = {**_question(item), **answer}
        _grade(row, 0.0 if failed else _f1(wanted, given), _f1(wanted, guess))
        hits.update(wanted & given)
        sizes.update([*wanted, *given])
        rows.append(row)
    each = [2 * hits[label] / sizes[label] for label in sorted(sizes)]
    figures = {
        "micro_f1": 2 * hits.total() / max(1, sizes.total()),
        "macro_f1": sum(each) / max(1, len(each)),
    }
    return _score("label", rows, figures)


def _f1(wanted: set[str], given: set[str]) -> float:
    both = len(wanted) + len(given)
    return 2 * len(wanted & given) / both if both else 1.0


def _likely_set(sets: Sequence[Sequence[str]]) -> set[str]:
    """Return the set that scores best for all texts, of the first few of the commonest labels."""
    often = Counter(label for labels in sets for label in labels)
    order = sorted(often, key=lambda label: (-often[label], label))[:_LIKELY]
    tried = [set(order[:count]) for count in range(len(order) + 1)]
    return max(tried, key=lambda guess: sum(_f1(set(labels), guess) for labels in sets))


def score_vectors(
    answers: Sequence[Answer],
    items: Sequence[Item],
    corpus: Sequence[tuple[str, str]],
    recall_at: int,
    similarity: str = "",
) -> Score:
    """Return the mean nDCG@10 of documents in the order of their similarity to each query.

    It is sentence-transformers' (6.2, util/similarity.py): `dot`, `euclidean` or `manhattan`, else
    the cosine. `answers` are the vectors of all queries, then of all documents. A document without
    a vector is the last one, and the queries that it is relevant for get nothing.
    """
    answers = list(_of_one_length(answers))
    queries, documents = answers[: len(items)], answers[len(items) :]
    places = {key: place for place, (key, _) in enumerate(corpus)}
    lost = {
        key: str(answer["error"])
        for (key, _), answer in zip(corpus, documents, strict=True)
        if "error" in answer
    }
    rows: list[dict[str, JsonValue]] = []
    found: list[float] = []
    alike = np.zeros(len(corpus))
    for item, answer, near in zip(
        items, queries, _similarities(queries, documents, similarity), strict=True
    ):
        gains = {places[key]: grade for key, grade in item.grades}
        why = answer.get("error") or next(
            (f"document {key}: {lost[key]}" for key, _ in item.grades if key in lost), None
        )
        first = np.argsort(-near, kind="stable")[:_TOP]
        row: dict[str, JsonValue] = {
            **_question(item),
            **{key: value for key, value in answer.items() if key != "answer"},
            "answer": "" if why else "\n".join(corpus[place][0] for place in first),
            **({"error": why} if why else {}),
        }
        _grade(row, 0.0 if why else ndcg(near, gains), ndcg(alike, gains))
        found.append(0.0 if why else recall(near, gains, recall_at))
        rows.append(row)
    figures = {f"recall@{recall_at}": sum(found) / len(found)}
    score = _score("embedding", rows, figures)
    vectors = tuple("" if "error" in one else str(one["answer"]) for one in answers)
    return Score(
        score=score.score,
        n=score.n,
        metric=score.metric,
        per_item=score.per_item,
        figures=score.figures,
        vectors=vectors,
    )


def _of_one_length(answers: Sequence[Answer]) -> Iterator[Answer]:
    """Yield the answers; a vector of another length than most is an error."""
    lengths = [0 if "error" in one else len(unpacked(str(one["answer"]))) for one in answers]
    usual = Counter(filter(None, lengths)).most_common(1)
    for one, length in zip(answers, lengths, strict=True):
        if length and length != usual[0][0]:
            yield {"answer": "", "error": f"{length} numbers, where others have {usual[0][0]}"}
        else:
            yield one


def _similarities(
    queries: Sequence[Answer], documents: Sequence[Answer], kind: str
) -> Iterator[np.ndarray]:
    """Yield each query's similarity to all documents, in float64; the least for no vector.

    They are rounded to 9 digits, so that equal texts are equally similar.
    """
    rows = _matrix([*queries, *documents], unit=kind in {"", "cosine"})
    corpus = rows[len(queries) :]
    for query in rows[: len(queries)]:
        match kind:
            case "euclidean":
                found = -np.sqrt(((corpus - query) ** 2).sum(1))
            case "manhattan":
                found = -np.abs(corpus - query).sum(1)
            case _:
                found = corpus @ query
        yield np.where(np.isnan(found), -np.inf, np.round(found, 9))


def _matrix(answers: Sequence[Answer], *, unit: bool) -> np.ndarray:
    """Return vectors as rows, of length 1 if `unit`; NaN for those that there are not."""
    vectors = [None if "error" in one else unpacked(str(one["answer"])) for one in answers]
    width = next((len(vector) for vector in vectors if vector is not None), 0)
    rows = np.full((len(vectors), width), np.nan)
    for row, vector in zip(rows, vectors, strict=True):
        if vector is not None:
            row[:] = vector / np.linalg.norm(vector) if unit else vector
    return rows


def score_orders(answers: Sequence[Answer], items: Sequence[Item]) -> Score:
    """Return the mean nDCG@10 of each query's documents in order of their scores, and MRR@10."""
    rows: list[dict[str, JsonValue]] = []
    ranks: list[float] = []
    for item, answer in zip(items, answers, strict=True):
        gains = {int(index): grade for index, grade in item.grades}
        failed, scores = "error" in answer, np.zeros(len(item.parts))
        guess = ndcg(scores, gains)
        if not failed:
            scores = np.array([float(number) for number in str(answer["answer"]).split()])
        order = np.argsort(-scores, kind="stable").tolist()
        row: dict[str, JsonValue] = {
            **_question(item),
            **answer,
            "answer": "" if failed else " ".join(map(str, order)),
            **({} if failed else {"scores": answer["answer"]}),
        }
        _grade(row, 0.0 if failed else ndcg(scores, gains), guess)
        ranks.append(0.0 if failed else reciprocal_rank(scores, gains))
        rows.append(row)
    return _score("rerank", rows, {f"mrr@{_TOP}": sum(ranks) / len(ranks)})


def _question(item: Item) -> dict[str, JsonValue]:
    return {
        "prompt": item.prompt,
        "expected": list(item.expected),
        **({"parts": list(item.parts)} if item.parts else {}),
        **({"grades": dict(item.grades)} if item.grades else {}),
        **({"is_set": True} if item.is_set else {}),
    }


def _grade(row: dict[str, JsonValue], value: float, guess: float) -> None:
    row["value"], row["guess"] = round(value, 9), round(guess, 9)
    row["ok"] = row["value"] == 1


def _score(
    metric: str, rows: Sequence[Mapping[str, JsonValue]], figures: Mapping[str, float]
) -> Score:
    whole = Score(score=0.0, n=len(rows), metric=metric, per_item=tuple(rows))
    return Score(
        score=sum(whole.values) / len(rows),
        n=len(rows),
        metric=metric,
        per_item=tuple(rows),
        figures={name: round(value, 9) for name, value in figures.items()},
    )


def cosines_of(one: Sequence[str], other: Sequence[str]) -> list[float]:
    """Return the cosine of each pair of vectors; pairs that lack one are left out."""
    found = []
    for first, second in zip(one, other, strict=True):
        if not first or not second:
            continue
        a, b = unpacked(first), unpacked(second)
        if len(a) == len(b) and (length := float(np.linalg.norm(a) * np.linalg.norm(b))):
            found.append(float(a @ b) / length)
    return found
