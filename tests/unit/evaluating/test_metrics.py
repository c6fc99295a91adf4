from dataclasses import replace

import pytest
from weightsmith.core.errors import CheckFailed, UsageError
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
        ("contains", "caf\u00e9", "the CAFE\u0301", True),
        ("exact", "cafe\u0301", "caf\u00e9", True),
        ("contains", ["Lyon", "Paris"], "Paris", True),
        ("exact", "7481", " 7481\n", True),
        ("exact", "7481", "Port 7481", False),
        ("exact", "a", "A", False),
        ("regex", r"\b748\d\b", "port 7481", True),
        ("regex", r"^\d+$", "port 7481", False),
        ("regex", '{"not": "(?i)I can.t"}', "Sorry, I can't.", False),
        ("regex", '{"not": ["(?i)sorry", "cannot"]}', "Here it is.", True),
        ("regex", ['{"not": "sorry"}', "yes"], "sorry, yes", True),
        ("regex", "caf\u00e9", "cafe\u0301", True),
        ("regex", "^cafe\u0301s?$", "caf\u00e9", True),
        ("regex", '{"not": "\u00e9"}', "cafe\u0301", False),
        ("numeric", "42", "The answer is 42.", True),
        ("numeric", "42", "It is 42 or 43", False),
        ("numeric", "1234.5", "$1,234.50", True),
        ("numeric", "-3", "x = \u22123", True),
        ("numeric", "3", "between 2-3", True),
        ("numeric", "0.3", "0.1 + 0.2 = 0.30", True),
        ("numeric", "1e3", "1000", True),
        ("numeric", "5", "five", False),
        ("numeric", "10000", "10 000 km", True),
        ("numeric", "12345.6", "\u221212\u202f345.6", False),
        ("numeric", "-12345.6", "\u221212\u202f345.6", True),
        ("numeric", "1'234'567", "It is 1\u2019234\u2019567.", True),
        ("numeric", "1_000", "1000", True),
        ("numeric", "103", "2 3 5 101 103", True),
        ("numeric", "100", "In 2023 100", True),
        ("numeric", "300", "1, 2, 300", True),
        ("numeric", "78", "12 345 678 or 12 345,78", True),
    ],
)
def test_judges(metric, expected, answer, ok):
    assert judge(metric, expected, answer) is ok


@pytest.mark.parametrize(
    ("metric", "expected", "says"),
    [
        ("bleu", "a", "unknown metric"),
        ("numeric", "seven", "line 7: expected 'seven' is not a number"),
        ("regex", '{"not": ["a", "("]}', "line 7: invalid regular expression '\\('"),
        ("regex", "(", "line 7"),
        ("regex", "(?=\u0338)", "line 7: invalid regular expression"),
        ("regex", '{"not": ["a", ""]}', "line 7: an empty pattern is in every answer"),
        ("choice", "a", "line 7 has no choices"),
        ("json-schema", '{"type": "circle"}', "line 7: .*circle"),
        ("json-schema", "no schema", "line 7: .*JSON schema"),
        ("json-schema", '{"$schema": 5}', "line 7: .*JSON schema"),
        (
            "json-schema",
            '{"items": {"$ref": "#/$defs/a"}}',
            "line 7: .*defs/a' leads nowhere",
        ),
        (
            "json-schema",
            '{"items": {"$ref": "http://h/a"}}',
            "line 7: .*h/a' leads nowhere",
        ),
        ("json-schema", '{"items": {"$ref": "#/items"}}', "line 7: .*leads back to itself"),
    ],
)
def test_what_a_metric_cannot_judge_is_found_before_anything_is_asked(metric, expected, says):
    with pytest.raises(UsageError, match=says):
        check_metric(metric, [item("q", expected, line=7)])


@pytest.mark.parametrize(
    ("answer", "tolerance", "ok"),
    [
        ("3.15", "0.01", True),
        ("3.151", "0.01", False),
        ("3.2028", "2%", True),
        ("3.21", "2%", False),
    ],
)
def test_a_number_may_be_off_by_the_suites_tolerance_or_its_questions_own(answer, tolerance, ok):
    pi = item("pi", "3.14")
    assert score_answers([answer], [pi], "numeric", tolerance).score == ok
    own = replace(pi, tolerance=tolerance)
    assert score_answers([answer], [own], "numeric", "1e-9").score == ok


def test_scores_answers_beside_their_questions():
    score = score_answers(["Paris", "no"], [item("a", "paris"), item("b", "x", "y")], "contains")

    assert (score.score, score.n, score.metric) == (0.5, 2, "contains")
    assert [row["ok"] for row in score.per_item] == [True, False]
    assert score.per_item[1]["expected"] == ["x", "y"]
    with pytest.raises(CheckFailed, match="0 answers for 1"):
        score_answers([], [item("a", "x")], "exact")


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


def test_a_schema_fetches_nothing():
    with pytest.raises(UsageError, match="unresolvable reference"):
        judge("json-schema", '{"$ref": "http://127.0.0.1:9/schema.json"}', "{}")
