"""JUnit XML of a build, which CI systems show beside other tests.

The format is the one that Jenkins and GitLab read: testsuites, testsuite, testcase with failure
or skipped. There is no standard; Jenkins' schema is at
https://github.com/jenkinsci/xunit-plugin (junit-10.xsd).
"""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from weightsmith.evaluating.answers import rows
from weightsmith.evaluating.build_record import AnsweredTask, BuildRecord

_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""What XML 1.0 has no place for, in section 2.2."""


def junit(build: BuildRecord) -> str:
    """Return the XML: one suite of gates and checks, and one of questions per task.

    A question that the image lost is a failure where the build was stopped, and skipped with the
    answers where the loss was within what the recipe allows.
    """
    root = ET.Element("testsuites", name=_clean(build.title))
    _gates(root, build)
    stopped = any(not v.passed and v.binding for task in build.tasks for v in task.verdicts)
    for task in build.tasks:
        _questions(root, task, stopped=stopped)
    for suite in root:
        kinds = [child.tag for case in suite for child in case]
        suite.set("tests", str(len(suite)))
        suite.set("failures", str(kinds.count("failure")))
        suite.set("skipped", str(kinds.count("skipped")))
        suite.set("errors", "0")
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def _gates(root: ET.Element, build: BuildRecord) -> None:
    suite = ET.SubElement(root, "testsuite", name="checks", timestamp=_clean(build.created[:19]))
    for task in build.tasks:
        for verdict in task.verdicts:
            if not verdict.binding:
                continue
            who = f"{verdict.subject} against {verdict.against or 'min_score'}"
            case = _case(suite, "gate", f"{task.name}: {who}" if task.name else who)
            if not verdict.passed:
                _child(case, "failure", verdict.reason, "")
    if build.refused and not suite.findall("testcase/failure"):
        _child(_case(suite, "gate", "published"), "failure", build.refused, "")
    for number, reason in enumerate(build.unproven, start=1):
        _child(_case(suite, "gate", f"proven {number}"), "skipped", f"not proven: {reason}", "")
    for check in build.checks:
        case = _case(suite, "image", check.name)
        case.set("time", f"{check.seconds:.3f}")
        ET.SubElement(case, "system-out").text = _clean(check.seen)


def _questions(root: ET.Element, task: AnsweredTask, *, stopped: bool) -> None:
    suite = ET.SubElement(root, "testsuite", name=_clean(f"questions {task.name}".strip()))
    for row in rows(task.items):
        case = _case(suite, "question", f"{row['number']}. {row['prompt']}"[:200])
        if row["lost"]:
            text = "\n".join(
                f"{'right' if a['ok'] else 'wrong'} {', '.join(a['who'])}: {a['text']}"
                for a in row["answers"]
            )
            message = f"expected {' or '.join(row['expected'])}"
            _child(case, "failure" if stopped else "skipped", message, text)


def _case(suite: ET.Element, group: str, name: str) -> ET.Element:
    return ET.SubElement(suite, "testcase", classname=f"weightsmith.{group}", name=_clean(name))


def _child(case: ET.Element, kind: str, message: str, text: str) -> None:
    element = ET.SubElement(case, kind, message=_clean(message))
    element.text = _clean(text)


def _clean(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
