import html
import re

import pytest

from toolchain.errors import EnvironmentFailure, UsageError
from toolchain.stages.report import render_report, write_report

DIGEST = "sha256:" + "ab" * 32
SOURCE = {"source": "./base", "pin": "./base@" + DIGEST, "digest": DIGEST}
BUILD = {
    "name": "support-smol",
    "version": "1.2.0",
    "target": "llamacpp-q4_k_m",
    "created": "2026-11-25T12:00:00Z",
    "base": SOURCE,
    "adapters": [
        {**SOURCE, "source": "./adapter", "version": "v3", "run_id": "w/1", "weight": 0.5}
    ],
    "merge": {
        "method": "sequential",
        "precision": "exact",
        "tensors": {"merged": 60, "copied": 212},
        "findings": ["one tensor is tied"],
    },
    "artifact": {
        "format": "q4_k_m",
        "size": 105454016,
        "bits_per_weight": 6.165,
        "file": "support-smol.gguf",
        "digest": DIGEST,
        "details": {"types": {"Q4_K": 16}},
    },
    "plan": {
        "device": "cpu",
        "max_num_seqs": 4,
        "max_model_len": 2048,
        "weight_bytes": 100,
        "kv_bytes_total": 50,
        "overhead_bytes": 25,
        "usable_bytes": 250,
        "notes": ["a note"],
    },
    "image": {
        "reference": "",
        "digest": DIGEST,
        "layers": [{"digest": DIGEST, "size": 105454016, "file": "support-smol.gguf"}],
    },
    "scores": {
        "base": {"score": 0.0, "n": 5, "metric": "contains"},
        "image": {"score": 1.0, "n": 5, "metric": "contains"},
    },
    "items": [
        {
            "prompt": "<script>alert(1)</script> | port?",
            "expected": ["7481"],
            "base": "no | idea",
            "image": "7481",
            "ok": {"base": False, "image": True},
        }
    ],
    "stages": {"merge": {"cached": False, "seconds": 12.5}, "bake": {"cached": True, "seconds": 0}},
    "warnings": ["unpinned source"],
    "next": ["invoke push dist/x --to registry.example.com/x"],
}
SMALLEST = {key: BUILD[key] for key in ("name", "version", "target", "created", "base")}


def test_both_reports_are_written(tmp_path):
    written = write_report(BUILD, tmp_path / "new")

    assert (written.html.name, written.markdown.name) == ("report.html", "report.md")
    assert "support-smol" in written.html.read_text("utf-8")


@pytest.mark.parametrize("template", ["report.html.j2", "report.md.j2"])
@pytest.mark.parametrize(
    "says",
    [
        "support-smol", "llamacpp-q4_k_m", DIGEST, "0.000", "1.000", "7481", "./adapter",
        "sequential", "60 merged", "6.165", "2048", "100.6 MiB", "12.5 s", "was there",
        "unpinned source", "a note", "one tensor is tied", "invoke push", "not pushed",
    ],
)  # fmt: skip
def test_every_fact_is_shown(template, says):
    text = html.unescape(render_report(BUILD, template)).replace("\\", "")

    assert says in text


@pytest.mark.parametrize("template", ["report.html.j2", "report.md.j2"])
def test_a_build_without_scores_or_image_has_a_report(template):
    assert "support-smol" in render_report(SMALLEST, template).replace("\\", "")


def test_the_page_is_self_contained_and_escapes_what_models_say():
    page = render_report(BUILD, "report.html.j2")

    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r'(src|href)="', page)
    assert "prefers-color-scheme: dark" in page


def test_markdown_tables_keep_their_columns():
    text = render_report(BUILD, "report.md.j2")
    rows = [line for line in text.splitlines() if "port?" in line]

    assert len(rows) == 1
    assert len(re.findall(r"(?<!\\)\|", rows[0])) == 5


def test_the_memory_bar_is_whole():
    page = render_report(BUILD, "report.html.j2")
    widths = [float(width) for width in re.findall(r'style="width: ([\d.]+)%', page)]

    assert widths == [40.0, 20.0, 10.0, 30.0]


def test_missing_facts_are_named():
    with pytest.raises(UsageError, match="source"):
        render_report({**SMALLEST, "base": {}}, "report.html.j2")


def test_a_folder_that_cannot_be_is_told(tmp_path):
    (tmp_path / "file").write_text("")

    with pytest.raises(EnvironmentFailure, match="cannot write"):
        write_report(BUILD, tmp_path / "file")
