"""junit.xml for CI systems: gates, checks and questions as test cases."""

from xml.etree import ElementTree as ET

from weightsmith.evaluating.build_record import BuildRecord
from weightsmith.evaluating.pages import junit

from tests.fakes.records import BUILD, failing


def read(build):
    return ET.fromstring(junit(BuildRecord.from_json(build)))


def test_junit_has_gates_checks_and_questions():
    good, bad = read(BUILD), read(failing())

    assert [s.get("name") for s in good] == ["checks", "questions"]
    assert [s.get("failures") for s in good] == ["0", "0"]
    assert [s.get("failures") for s in bad] == ["1", "1"]
    assert [s.get("tests") for s in good] == ["2", "1"]
    assert bad.find(".//testcase[@name='image against adapter']/failure").get("message") == (
        "the image lost too much"
    )
    assert "no | idea" in bad.find(".//testcase[@classname='weightsmith.question']/failure").text


def test_what_is_not_proven_is_a_skipped_gate():
    doubtful = read({**BUILD, "verdict": "not proven", "unproven": ["8 questions are too few"]})

    case = doubtful.find(".//testcase[@name='proven 1']/skipped")
    assert case.get("message") == "not proven: 8 questions are too few"
    assert doubtful[0].get("failures") == "0"


def test_a_question_lost_within_what_is_allowed_is_no_failure():
    build = failing()
    build["verdicts"][0]["passed"] = True
    tree = read(build)

    assert [suite.get("skipped") for suite in tree] == ["0", "1"]
    assert tree.find(".//failure") is None


def test_junit_survives_what_xml_cannot_hold():
    build = failing()
    build["items"][0]["prompt"] = "bell \x07 and half a pair \ud800 \ufffe ]]></testcase>"

    assert read(build).find(".//testcase[@classname='weightsmith.question']") is not None
