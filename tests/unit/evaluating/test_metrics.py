import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolchain.errors import CheckFailed, UsageError
from toolchain.evaluating.items import Item
from toolchain.evaluating.metrics import check_metric, gate, judge, score_answers, wilson
from toolchain.values import Score


def item(prompt, *expected, line=1):
    return Item(messages=({"role": "user", "content": prompt},), expected=expected, line=line)


@pytest.mark.parametrize(
    ("metric", "expected", "answer", "ok"),
    [
        ("contains", "Paris", "It is PARIS.", True),
        ("contains", "new  york", "in New\nYork", True),
        ("contains", "Paris", "Lyon", False),
        ("contains", ["Lyon", "Paris"], "Paris", True),
        ("exact", "7481", " 7481\n", True),
        ("exact", "7481", "Port 7481", False),
        ("exact", "a", "A", False),
        ("regex", r"\b748\d\b", "port 7481", True),
        ("regex", r"^\d+$", "port 7481", False),
    ],
)
def test_judges(metric, expected, answer, ok):
    assert judge(metric, expected, answer) is ok


def test_an_unknown_metric_and_a_broken_pattern_are_found_before_anything_is_asked():
    with pytest.raises(UsageError, match="unknown metric"):
        check_metric("bleu", ())
    with pytest.raises(UsageError, match="line 7"):
        check_metric("regex", [item("q", "(", line=7)])


def test_scores_answers_beside_their_questions():
    score = score_answers(["Paris", "no"], [item("a", "paris"), item("b", "x", "y")], "contains")

    assert (score.score, score.n, score.metric) == (0.5, 2, "contains")
    assert [row["ok"] for row in score.per_item] == [True, False]
    assert score.per_item[1]["expected"] == ["x", "y"]


def test_an_answer_may_carry_facts():
    (row,) = score_answers(
        [{"answer": "x", "finish_reason": "length"}], [item("a", "x")], "exact"
    ).per_item

    assert (row["ok"], row["finish_reason"]) == (True, "length")


def test_answers_must_be_as_many_as_questions():
    with pytest.raises(CheckFailed, match="0 answers for 1"):
        score_answers([], [item("a", "x")], "exact")


def test_wilson_by_hand():
    # p = 0.8, n = 10, z = 1.96: (0.8 + 0.19208) / 1.38416 -+ 1.96 / 1.38416 * sqrt(0.025604)
    low, high = wilson(8, 10)

    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(min_value=1, max_value=10**6), st.data())
def test_wilson_holds_the_share(n, data):
    right = data.draw(st.integers(min_value=0, max_value=n))
    low, high = wilson(right, n)

    assert 0 <= low <= right / n + 1e-12
    assert right / n - 1e-12 <= high <= 1


def scored(*right):
    rows = tuple(
        {"prompt": f"q{i}", "expected": ["x"], "answer": f"answer {i} {ok}", "ok": ok}
        for i, ok in enumerate(right)
    )
    return Score(score=sum(right) / len(right), n=len(right), metric="contains", per_item=rows)


def test_the_gate_lets_an_equal_score_through():
    gate(scored(True, False), scored(True, False), 0.0, 0.5)


def test_a_drop_of_exactly_what_is_allowed_passes():
    gate(scored(*[True] * 7, *[False] * 3), scored(*[True] * 8, *[False] * 2), 0.1, 0.0)


def test_a_larger_drop_fails_with_the_numbers_and_what_changed():
    image = scored(False, False, False, False, True)
    reference = scored(True, True, True, True, True)

    with pytest.raises(CheckFailed, match=r"scores 0\.200 .*0\.800 below.*1\.000") as caught:
        gate(image, reference, 0.01, 0.0)

    assert caught.value.exit_code == 4
    assert "'answer 0 False', was 'answer 0 True'" in caught.value.hint
    assert caught.value.hint.count("now gives") == 3


def test_a_low_score_fails_even_where_the_reference_is_as_low():
    with pytest.raises(CheckFailed, match="below the lowest that passes"):
        gate(scored(False), scored(False), 1.0, 0.5)
    with pytest.raises(CheckFailed) as caught:
        gate(scored(False, True), None, 1.0, 0.9)

    assert "'q0' now gives" in caught.value.hint
