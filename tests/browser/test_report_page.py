"""The report in a real browser: any width, both colour schemes, keyboard, filter, print."""

import copy
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from weightsmith.evaluating.build_record import BuildRecord
from weightsmith.evaluating.pages import write_comparison, write_report

from tests.conftest import chromium_path
from tests.fakes.jobs import QUALITY, VALID
from tests.fakes.records import BUILD

pytestmark = pytest.mark.browser
PATIENCE = 300_000
"""Milliseconds in which a browser must have done a thing, however busy the machine is."""

LONG = "a-very-long-word-without-any-place-to-break-" * 6


def build(count: int = 40) -> dict[str, Any]:
    """Everything that a report can show, with long words in it."""
    items = [
        {
            "prompt": f"Question {i}: what about {LONG if i == 2 else 'this'}?",
            "expected": [f"answer {i}"],
            "base": f"I do not know {i}.",
            "adapter": f"It is answer {i}.",
            "merged": f"It is answer {i}.",
            "image": f"It may be {LONG}." if i % 10 == 3 else f"It is answer {i}.",
            "ok": {"base": False, "adapter": True, "merged": True, "image": i % 10 != 3},
        }
        for i in range(count)
    ]
    lost = sum(not item["ok"]["image"] for item in items)
    scores = {
        who: {"score": right / count, "n": count, "metric": "contains", "interval": [low, high]}
        for who, right, low, high in (
            ("base", 0, 0.0, 0.1), ("adapter", count, 0.9, 1.0), ("merged", count, 0.9, 1.0),
            ("image", count - lost, 0.75, 0.96),
        )
    }  # fmt: skip
    verdict = {
        **BUILD["verdicts"][0], "passed": False, "reason": "the image lost more than is allowed",
        "drop": lost / count, "interval": [0.01, 0.2], "lost": lost, "n": count, "p": 0.125,
    }  # fmt: skip
    validation = {
        **VALID, "passed": False,
        "greedy": [{"after": "Which port? " + LONG, "reference": "7481.", "merged": "7481.",
                    "tokens": 4, "same": 4},
                   {"after": "And why?", "reference": "Be", "merged": f"As {LONG}",
                    "tokens": 16, "same": 0}],
        "findings": [{"severity": "warning", "check": "layers", "message": "29 is far off"},
                     {"severity": "error", "check": "elements", "message": "x is missing"}],
        "layers": [{"layer": i, "difference": 10 ** (i / 10 - 5), "rounding": 1e-4,
                    "parted": i > 29} for i in range(34)],
    }  # fmt: skip
    return {
        **BUILD, "scores": scores, "verdicts": [verdict], "items": items, "validation": validation,
        "quality": {**QUALITY, "limits": {"kl_mean": 0.05}, "exceeded": []},
        "checks": [{"name": "health", "seen": f"ready; {LONG}", "seconds": 0.1}],
        "reproduce": ["invoke build --recipe recipe.yaml"],
    }  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report and the comparison, with another target and a load test beside."""
    version = tmp_path_factory.mktemp("version")
    other = build() | {"target": "llamacpp-f16"}
    other["artifact"] = {**other["artifact"], "size": 269000000}
    for found in (build(), other):
        folder = version / found["target"]
        folder.mkdir()
        (folder / "build.json").write_text(json.dumps(found))
    run = {
        "concurrency": 4, "requests": 8, "requests_per_s": 4.2, "tokens_per_s": 99.0, "errors": 1,
        "ttft_ms": {"p50": 10.0, "p95": 20.0}, "itl_ms": {"p50": 8.0, "p95": 9.0},
    }  # fmt: skip
    folder = version / "llamacpp-q4_k_m"
    bench = {"max_tokens": 64, "cpus": 2, "created": "2026-11-25T12:00:00+00:00", "runs": [run]}
    (folder / "bench.json").write_text(json.dumps(bench))
    return {
        "report": write_report(BuildRecord.from_json(build()), folder).html,
        "compare": write_comparison(folder, version / "llamacpp-f16", version / "both").html,
    }


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    # /dev/shm is small in many containers, and a page that does not fit there dies.
    arguments = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=chromium_path(), args=arguments, timeout=PATIENCE
        )
        yield started
        started.close()


@pytest.fixture
def opened(browser: Any, pages: dict[str, Path]) -> Iterator[Any]:
    """Open a page by name; at the end, nothing was written to the console."""
    contexts, said = [], []

    def open_(name: str = "report", width: int = 1280, scheme: str = "light") -> Any:
        context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True
        )
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url)
                if not request.url.startswith("file:") else None)  # fmt: skip
        page.goto(pages[name].as_uri())
        return page

    yield open_
    for context in contexts:
        context.close()
    assert said == []


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize("width", [320, 768, 1280])
def test_nothing_is_wider_than_the_window(opened: Any, name: str, width: int) -> None:
    page = opened(name, width)

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    cut = page.evaluate("""() => [...document.querySelectorAll('main *, header *')]
        .filter(e => !e.closest('.wide, nav, .skip, .bar, .track, .plane')
            && e.getBoundingClientRect().right > innerWidth + 1)
        .map(e => e.outerHTML.slice(0, 80))""")
    assert cut == []


@pytest.mark.parametrize("name", ["report", "compare"])
@pytest.mark.parametrize(("scheme", "width"), [("light", 375), ("dark", 1280)])
def test_axe_finds_nothing(opened: Any, name: str, scheme: str, width: int) -> None:
    """Contrast, names, roles, landmarks, headings: axe-core's rules, best practices included."""
    from axe_playwright_python.sync_playwright import Axe

    page = opened(name, width, scheme)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = Axe().run(page).response["violations"]

    assert {v["id"]: [n["html"][:90] for n in v["nodes"][:3]] for v in found} == {}


def shown(page: Any) -> list[str]:
    return page.locator("[data-questions] .items > li:visible .q").all_inner_texts()


def test_the_filter_shows_what_it_says(opened: Any) -> None:
    page = opened()
    status = page.get_by_role("status")

    assert len(shown(page)) == 40
    page.get_by_label("right or wrong changed").check()
    assert [text.split(":")[0].split()[-1] for text in shown(page)] == ["3", "13", "23", "33"]
    assert status.inner_text() == "4 of 40 questions shown"

    page.get_by_role("searchbox").fill("QUESTION 13")
    assert len(shown(page)) == 1
    page.get_by_role("searchbox").fill("no such words")
    assert shown(page) == []
    assert status.inner_text() == "0 of 40 questions shown"

    page.get_by_role("searchbox").fill("")
    page.get_by_role("group").get_by_label("all").check()
    assert len(shown(page)) == 40


def test_the_keyboard_reaches_everything(opened: Any) -> None:
    page = opened()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the report"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left") >= 0
    page.get_by_role("group").get_by_label("all").focus()
    page.keyboard.press("ArrowRight")

    assert len(shown(page)) == 4
    outline = page.locator(".pill input:focus-visible + span").evaluate(
        "e => getComputedStyle(e).outlineStyle"
    )
    assert outline == "solid"


def test_paper_has_every_question_and_no_controls(opened: Any) -> None:
    page = opened()
    page.get_by_label("right or wrong changed").check()
    page.emulate_media(media="print")

    assert len(shown(page)) == 40
    assert not page.locator("nav").is_visible()
    assert not page.get_by_role("searchbox").is_visible()
    assert len(page.pdf()) > 10_000


def test_without_scripts_everything_is_there(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.goto(pages["report"].as_uri())

    assert len(shown(page)) == 40
    assert not page.get_by_role("searchbox").is_visible()
    context.close()


def test_what_a_model_says_is_never_run(
    opened: Any, pages: dict[str, Path], tmp_path: Path
) -> None:
    evil = copy.deepcopy(build(4))
    for who in ("prompt", "image", "adapter"):
        evil["items"][0][who] = (
            "</p><script>document.title='owned'</script>"
            "<img src=x onerror=\"document.title='owned'\">"
        )
    evil["name"] = "</title><script>document.title='owned'</script>"
    pages["evil"] = write_report(BuildRecord.from_json(evil), tmp_path).html

    page = opened("evil")

    assert page.title() != "owned"
    assert page.locator("img").count() == 0
