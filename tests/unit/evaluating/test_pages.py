import base64
import copy
import hashlib
import html
import json
import re
from xml.etree import ElementTree as ET

import pytest
from weightsmith.core.errors import EnvironmentFailure, InputRefused, UsageError
from weightsmith.evaluating.build_record import BuildRecord
from weightsmith.evaluating.pages import (
    build_view,
    junit,
    render_view,
    write_comparison,
    write_report,
)
from weightsmith.evaluating.views import answer_rows, asked

from tests.fakes.records import BUILD, DIGEST, SMALLEST, failing, many


def render_report(build, template):
    record = BuildRecord.from_json(build)
    return render_view(build_view(record, (record,), None), template)


@pytest.mark.parametrize("template", ["report.html.j2", "report.md.j2"])
def test_every_fact_is_shown(template):
    text = html.unescape(render_report(BUILD, template)).replace("\\", "")
    facts = (
        "support-smol", "llamacpp-q4_k_m", DIGEST, "1.000", "./adapter", "Passed",
        "sequential", "60 merged", "6.1", "2048", "100.6 MiB", "12.5 s", "was there",
        "unpinned source", "a note", "one tensor is tied", "invoke push", "not published",
        "image vs adapter", "health", "0.57 to 1.00",
    )  # fmt: skip

    assert [fact for fact in facts if fact not in text] == []
    # Without scores or image, too.
    text = render_report(SMALLEST, template).replace("\\", "")
    assert "support-smol" in text
    assert "Built, not proven" in text


def test_the_page_is_self_contained_and_escapes_what_models_say():
    page = render_report(BUILD, "report.html.j2")

    assert page.count("<script") == 1
    assert "&lt;script&gt;" in page
    assert not re.search(r'(src|href)="(?!#)', page)
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page
    # The memory bar is whole.
    widths = [float(width) for width in re.findall(r'class="c-\w+" style="width: ([\d.]+)%', page)]
    assert widths == [40.0, 20.0, 10.0, 30.0]


def test_markdown_tables_keep_their_columns():
    text = render_report(failing(), "report.md.j2")
    rows = [line for line in text.splitlines() if "port?" in line]

    assert len(rows) == 1
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 4


@pytest.mark.parametrize("template", ["report.html.j2", "report.md.j2"])
def test_a_stopped_build_says_so_first(template):
    text = render_report(failing(), template)
    body = text.partition("<body>")[2] or text

    assert body.index("Stopped: not published") < body.index("The image lost too much") < 1500


@pytest.mark.parametrize("template", ["report.html.j2", "report.md.j2"])
def test_what_is_not_proven_is_said_first_and_other_words_are_counted(template):
    parts = [
        {"question": n, "token": "x", "margin": m} for n, m in ((1, 0.25), (2, None), (4, 3.0))
    ]
    same = {"image": {"share": 0.4, "same": 2, "n": 5, "differences": parts}}
    doubts = {"verdict": "not proven", "unproven": ["5 questions are too few"], "sameness": same}
    text = html.unescape(render_report({**BUILD, **doubts}, template))
    body = text.partition("<body>")[2] or text

    assert body.index("Published, but not proven") < body.index("5 questions are too few") < 1500
    assert "Image: 2 of 5 answers are the reference's to the letter." in text
    assert "preferred by 0.25 to 3 nats" in text
    same["image"]["differences"] = [{"question": 1, "token": "x", "margin": 0.4411}]
    text = html.unescape(render_report({**BUILD, **doubts}, template))
    assert "preferred by 0.44 nats" in text


@pytest.mark.parametrize("template", ["report.html.j2", "report.md.j2"])
@pytest.mark.parametrize("unproven", [["the image was not asked"], []])
def test_an_image_that_was_tried_without_a_picture_says_so(template, unproven):
    def banner(**image):
        scores = {"adapter": BUILD["scores"]["adapter"]}
        image = {**BUILD["image"], **image}
        parts = {"image": image, "scores": scores, "verdicts": [], "unproven": unproven}
        text = html.unescape(render_report({**BUILD, **parts}, template))
        return (text.partition("<body>")[2] or text)[:1500].lower()

    said = "no picture was tried, because the image was not started"
    assert said in banner(takes_pictures=True)
    assert said not in banner(takes_pictures=False)
    assert said not in banner(takes_pictures=True, started="linux/amd64")


@pytest.mark.parametrize("length", [40, 4000])
def test_a_thousand_questions_fit_in_a_megabyte(length):
    page = render_report(many(1000, length), "report.html.j2")

    assert len(page.encode()) <= 1_000_000
    assert "question 999 why" in page
    # Where there is room, long answers are whole.
    assert "because " * 100 in render_report(many(20, 800), "report.html.j2")


def test_other_targets_of_the_version_are_shown(tmp_path):
    for target, size in (("llamacpp-f16", 200), ("llamacpp-q8_0", 100)):
        other = copy.deepcopy(BUILD)
        other["target"] = target
        other["artifact"]["size"] = size
        write_json(tmp_path / target, other)
    write_json(tmp_path / "llamacpp-bad", "{")
    other = copy.deepcopy(BUILD) | {"version": "9", "target": "llamacpp-other"}
    write_json(tmp_path / "llamacpp-other", other)

    page = write_report(BuildRecord.from_json(BUILD), tmp_path / "llamacpp-q4_k_m").html.read_text(
        "utf-8"
    )

    assert "Size and quality by target" in page
    assert "llamacpp-f16" in page
    assert "llamacpp-q8_0" in page
    assert "llamacpp-other" not in page
    assert "Size and quality" not in render_report(BUILD, "report.html.j2")


def write_json(folder, value):
    folder.mkdir(parents=True)
    (folder / "build.json").write_text(value if isinstance(value, str) else json.dumps(value))


RUN = {
    "concurrency": 4, "requests": 8, "requests_per_s": 12.34, "tokens_per_s": 99.0,
    "ttft_ms": {"p50": 10.0, "p95": 20.0}, "itl_ms": {"p50": None, "p95": None}, "errors": 0,
}  # fmt: skip


def test_a_load_test_beside_the_build_is_shown(tmp_path):
    bench = {"max_tokens": 64, "cpus": 2, "created": BUILD["created"], "runs": [RUN]}
    tmp_path.joinpath("bench.json").write_text(json.dumps(bench))
    written = write_report(BuildRecord.from_json(BUILD), tmp_path)

    for path in (written.html, written.markdown):
        assert "12.34" in path.read_text("utf-8")
        assert "10.0 / 20.0" in path.read_text("utf-8")


def test_differences_per_layer_are_drawn():
    build = copy.deepcopy(BUILD)
    build["validation"] = {
        "max_abs_logit_diff": 0.5, "kl_mean": 1e-6, "kl_max": 1e-5, "top1_agreement": 0.75,
        "findings": [{"severity": "error", "check": "logits", "message": "layer 1 differs"}],
        "passed": False,
        "layers": [
            {"layer": 0, "difference": 0.0, "rounding": 1e-8, "parted": False},
            {"layer": 1, "difference": 0.5, "rounding": 1e-4, "parted": True},
        ],
    }  # fmt: skip
    page = render_report(build, "report.html.j2")

    assert "75.00 %" in page
    assert 'class="over" style="height:100.0%" title="layer 1: 0.5, rounding 0.0001"' in page
    assert 'style="height:0.0%" title="layer 0: 0, rounding 1e-08"' in page
    assert "Stopped: not published" in page
    assert "failed its validation: layer 1 differs" in page


def test_two_builds_beside_each_other(tmp_path):
    other = failing() | {"target": "llamacpp-q8_0"}
    write_json(tmp_path / "a", BUILD)
    write_json(tmp_path / "b", other)

    written = write_comparison(tmp_path / "a", tmp_path / "b", tmp_path / "out")

    for path in (written.html, written.markdown):
        text = html.unescape(path.read_text("utf-8")).replace("\\", "")
        assert "1 are right in A and wrong in B" in text
        assert "llamacpp-q8_0" in text
        assert "B has 1.00 of A" not in text
    assert written.html.read_text("utf-8").count("<script") == 1


def test_questions_are_compared_by_all_that_was_asked(tmp_path):
    """Chats may end with the same words."""
    build = copy.deepcopy(BUILD)
    (item,) = build["items"]
    build["items"] = [
        {**item, "prompt": "And its port?", "messages": [{"role": "user", "content": about}],
         "ok": {**item["ok"], "image": right}}
        for about, right in [("Lantern?", True), ("Harbor?", False)]
    ]  # fmt: skip
    write_json(tmp_path / "a", build)

    written = write_comparison(tmp_path / "a", tmp_path / "a", tmp_path / "out")

    assert "Over 2 questions, 0 are right in A and wrong in B, 0 the other way" in (
        written.html.read_text("utf-8")
    )


def test_builds_that_cannot_be_read_are_reported(tmp_path):
    with pytest.raises(UsageError, match="none"):
        write_comparison(tmp_path / "none", tmp_path, tmp_path)
    write_json(tmp_path / "a", "[1")
    with pytest.raises(InputRefused, match=r"build\.json"):
        write_comparison(tmp_path / "a", tmp_path / "a", tmp_path)
    write_json(tmp_path / "b", "[]")
    with pytest.raises(InputRefused, match=r"build\.json"):
        write_comparison(tmp_path / "b", tmp_path / "b", tmp_path)

    with pytest.raises(ValueError, match=r"base\.source"):
        render_report({**SMALLEST, "base": {}}, "report.html.j2")
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFailure, match="file"):
        write_report(BuildRecord.from_json(BUILD), tmp_path / "file")


def read_junit(build):
    return ET.fromstring(junit(BuildRecord.from_json(build)))


def test_junit_has_gates_checks_and_questions():
    good, bad = read_junit(BUILD), read_junit(failing())

    assert [s.get("name") for s in good] == ["checks", "questions"]
    assert [s.get("failures") for s in good] == ["0", "0"]
    assert [s.get("failures") for s in bad] == ["1", "1"]
    assert [s.get("tests") for s in good] == ["2", "1"]
    assert bad.find(".//testcase[@name='image against adapter']/failure").get("message") == (
        "the image lost too much"
    )
    assert "no | idea" in bad.find(".//testcase[@classname='weightsmith.question']/failure").text
    doubtful = read_junit({**BUILD, "unproven": ["8 questions are too few"]})
    case = doubtful.find(".//testcase[@name='proven 1']/skipped")
    assert case.get("message") == "not proven: 8 questions are too few"
    assert doubtful[0].get("failures") == "0"


def test_junit_skips_what_was_lost_as_is_allowed_and_survives_what_xml_cannot_hold():
    build = failing()
    build["verdicts"][0]["passed"] = True
    tree = read_junit(build)
    assert [suite.get("skipped") for suite in tree] == ["0", "1"]
    assert tree.find(".//failure") is None
    build["items"][0]["prompt"] = "bell \x07 and half a pair \ud800 \ufffe ]]></testcase>"

    assert read_junit(build).find(".//testcase[@classname='weightsmith.question']") is not None


def test_equal_answers_stand_together():
    build = copy.deepcopy(BUILD)
    build["items"][0]["image"] = build["items"][0]["adapter"]
    (row,) = answer_rows(asked(build["items"]))
    (lost,) = answer_rows(asked(failing()["items"]))

    assert [said.who for said in row.answers] == [["base"], ["adapter", "image"]]
    assert not any((row.changed, row.worded, row.wrong, row.lost))
    assert all((lost.changed, lost.worded, lost.wrong, lost.lost))


def test_what_dequantized_weights_lost_is_lost_too():
    build = failing()
    (item,) = build["items"]
    for found in (item, item["ok"]):
        found["dequantized"] = found.pop("image")

    (row,) = answer_rows(asked(build["items"]))
    assert (row.wrong, row.lost) == (True, True)
    item["ok"]["dequantized"] = True
    (row,) = answer_rows(asked(build["items"]))
    assert (row.wrong, row.lost) == (False, False)
