import pytest
from weightsmith.core.errors import CheckFailed, UsageError
from weightsmith.core.values import Score
from weightsmith.evaluating.gate import DropLimit, judge_drop, too_few
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.metrics import check_metric, judge, score_answers


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


def scored(*right):
    rows = tuple(
        {"prompt": f"q{i}", "expected": ["x"], "answer": f"answer {i} {ok}", "ok": ok}
        for i, ok in enumerate(right)
    )
    return Score(score=sum(right) / len(right), n=len(right), metric="contains", per_item=rows)


def gate(image, reference, max_drop, min_score, **more):
    limit = DropLimit(max_drop=max_drop, min_score=min_score, **more)
    verdict = judge_drop("image", image, "adapter", reference, limit)
    verdict.require()
    return verdict


def test_the_gate_lets_an_equal_score_through():
    gate(scored(True, False), scored(True, False), 0.0, 0.5)


def test_a_drop_of_exactly_what_is_allowed_passes():
    gate(scored(*[True] * 7, *[False] * 3), scored(*[True] * 8, *[False] * 2), 0.1, 0.0)


def test_one_question_of_many_beyond_what_is_allowed_fails():
    """Of 1000, ten may be lost, and not eleven."""
    reference = scored(*[True] * 1000)
    gate(scored(*[False] * 10, *[True] * 990), reference, 0.01, 0.0)

    with pytest.raises(CheckFailed, match=r"0\.011 below.*at most 0\.010 is allowed"):
        gate(scored(*[False] * 11, *[True] * 989), reference, 0.01, 0.0)


def test_a_larger_drop_fails_with_the_numbers_and_what_changed():
    image = scored(False, False, False, False, True)
    reference = scored(True, True, True, True, True)

    with pytest.raises(CheckFailed, match=r"scores 0\.200 .*0\.800 below.*1\.000") as caught:
        gate(image, reference, 0.01, 0.0)

    assert caught.value.exit_code == 4
    assert "'answer 0 False', was 'answer 0 True'" in caught.value.hint
    assert caught.value.hint.count("now gives") == 3


def test_a_low_score_fails_even_where_the_reference_is_as_low():
    with pytest.raises(CheckFailed, match="below the minimum"):
        gate(scored(False), scored(False), 1.0, 0.5)
    with pytest.raises(CheckFailed) as caught:
        gate(scored(False, True), None, 1.0, 0.9)

    assert "'q0' now gives" in caught.value.hint


def test_scores_without_answers_fail_with_what_to_do_next():
    """A harness states scores alone."""
    with pytest.raises(CheckFailed) as caught:
        gate(Score(score=0.5, n=0, metric="acc"), Score(score=0.9, n=0, metric="acc"), 0.1, 0.0)

    assert "train the adapter further" in caught.value.hint


def test_a_loss_is_reported_with_its_uncertainty():
    before = scored(*[True] * 30)
    verdict = gate(scored(*[True] * 29, False), before, 0.05, 0.0)

    assert "0.033 below" in verdict.reason
    assert "may be chance (p=1)" in verdict.reason
    assert (verdict.facts["lost"], verdict.facts["won"], verdict.facts["p"]) == (1, 0, 1.0)
    assert verdict.facts["interval"][0] < 1 / 30 < verdict.facts["interval"][1]


def test_too_few_questions_are_reported_with_how_many_would_do():
    few = judge_drop(
        "image", scored(*[True] * 33), "adapter", scored(*[True] * 33), DropLimit(max_drop=0.05)
    )
    enough = judge_drop(
        "image", scored(*[True] * 54), "adapter", scored(*[True] * 54), DropLimit(max_drop=0.05)
    )

    assert "33 questions are too few" in too_few(few, 0.05)
    assert "54 are needed" in too_few(few, 0.05)
    assert too_few(enough, 0.05) == ""


def test_a_choice_is_judged_by_its_text():
    rows = score_answers(
        [{"answer": "Paris", "log_likelihoods": [-1.0, -2.0]}],
        [Item(messages=({"role": "user", "content": "q"},), expected=("Paris",), line=1,
              choices=("Paris", "Rome"))],
        "choice",
    ).per_item  # fmt: skip

    assert rows[0]["ok"] is True
    assert rows[0]["choices"] == ["Paris", "Rome"]
    assert rows[0]["log_likelihoods"] == [-1.0, -2.0]


def test_a_question_without_choices_is_named():
    with pytest.raises(UsageError, match="line 3 has no choices"):
        check_metric("choice", [item("q", "a", line=3)])


SCHEMA = '{"type": "object", "required": ["port"], "properties": {"port": {"type": "integer"}}}'


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('{"port": 7481}', True),
        ('```json\n{"port": 7481}\n```', True),
        (r'{"port": 7481, "note": "cut \ud83d"}', True),
        ('{"port": "7481"}', False),
        ("{}", False),
        ("7481", False),
        ('The answer is {"port": 7481}', False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_an_answer_must_be_json_of_the_schema(answer, right):
    assert judge("json-schema", SCHEMA, answer) is right


def test_a_schema_that_is_none_is_named():
    with pytest.raises(UsageError, match=r"line 2: .*circle"):
        check_metric("json-schema", [item("q", '{"type": "circle"}', line=2)])
    with pytest.raises(UsageError, match=r"line 2: .*JSON schema"):
        check_metric("json-schema", [item("q", "no schema", line=2)])
    with pytest.raises(UsageError, match=r"line 2: .*JSON schema"):
        check_metric("json-schema", [item("q", '{"$schema": 5}', line=2)])


def test_a_schema_fetches_nothing():
    with pytest.raises(UsageError, match="unresolvable reference"):
        judge("json-schema", '{"$ref": "http://127.0.0.1:9/schema.json"}', "{}")
