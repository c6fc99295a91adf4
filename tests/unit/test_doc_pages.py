"""The pages fit together: links lead somewhere, lists are whole, every promise has its test."""

import ast
import json
import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

import pytest
from weightsmith.building.targets import all_targets
from weightsmith.core import errors

from tests.conftest import REST, RUN_BY_MAKE_TEST
from tests.unit.test_docs import PAGES, ROOT, listed

PACKAGE = ROOT / "toolchain/weightsmith"
LINKING = [*PAGES, "CHANGELOG.md", "benchmarks/README.md"]
VARIABLE = r"WEIGHTSMITH_[A-Z_]*[A-Z](?![A-Z_])"
"""The name of one of our variables, and not the beginning of several."""
CMAKE = {f"WEIGHTSMITH_{name}" for name in ("HTTP", "PROGRAMS", "SERVER", "VARIANTS")}
"""Variables of CMake, not of the environment."""
LEVELS = {"WEIGHTSMITH_PROVEN", "WEIGHTSMITH_PROVEN_ON"}
"""Beginnings of what a verification summary says: no variables either."""


def test_environment_page_lists_every_variable() -> None:
    places = ("toolchain", "images", "templates", "Makefile", "tests", ".ci")
    command = ["git", "ls-files", *places]
    asked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if asked.returncode != 0:
        pytest.skip("not a git checkout")
    used = set()
    for name in asked.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and not name.startswith("tests/unit/"):
            used |= set(re.findall(VARIABLE, path.read_text("utf-8", "replace")))
    page = (ROOT / "docs/reference/environment.md").read_text("utf-8")
    assert set(re.findall(VARIABLE, page)) == used - CMAKE - LEVELS


def test_the_ai_act_s_page_names_keys_that_a_build_has() -> None:
    page = (ROOT / "docs/reference/eu-ai-act.md").read_text("utf-8")
    schema = json.loads((ROOT / "docs/reference/build.schema.json").read_text("utf-8"))
    inner = {"run_id", "source", "pin", "digest", "license", "card", "README.md", "report.html"}
    cells = [line.split(" | ")[-1] for line in page.splitlines() if line.startswith("| ")]
    words = {word for cell in cells for word in re.findall(r"`([\w.]+)`", cell)}
    assert {word.partition(".")[0] if word.startswith("card.") else word for word in words} <= {
        *schema["properties"], *inner
    }  # fmt: skip
    assert len(words & {*schema["properties"]}) > 20


def test_exit_code_page_lists_every_code() -> None:
    kinds = (errors.WeightsmithError, *errors.WeightsmithError.__subclasses__())
    codes = {str(kind.exit_code) for kind in kinds}
    assert listed("docs/reference/exit-codes.md") == codes | {"0", "130"}


def test_the_readme_names_targets_that_are_there() -> None:
    """`llamacpp-f16`, `-q8_0` and so on, in the first column."""
    page = (ROOT / "README.md").read_text("utf-8")
    table = page.partition("## Targets")[2].partition("\n## ")[0]
    words = re.findall(r"`([\w-]+)`", "\n".join(row.split("|")[1] for row in rows_of(table)))

    named = {f"llamacpp{word}" if word.startswith("-") else word for word in words}

    assert named <= {target.name for target in all_targets().values()}


def test_where_things_are() -> None:
    """The table names every room, and files in them."""
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rows = rows_of(page.partition("## Where things are\n")[2].partition("\n## ")[0])
    named = []
    for row in rows[1:]:
        first, holds = row.replace("\\|", ",").strip("| ").split("|")
        rooms = re.findall(r"`(\w+)`", first)
        for file in re.findall(r"`(\w+\.py)`", holds):
            assert any((PACKAGE / room / file).is_file() for room in rooms), file
        named += rooms
    assert sorted(named) == sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


def test_the_glossary_is_two_pages_in_order_and_names_files_that_are_there() -> None:
    page = (ROOT / "docs/glossary.md").read_text("utf-8")
    tables = [rows_of(part) for part in page.split("\n## ")[1:]]
    for words in ([row.strip("| ").partition(" |")[0] for row in table[1:]] for table in tables):
        assert words == sorted(words)
        assert len(words) > 10
    for name in re.findall(r"`([\w./]+\.py)`", page):
        assert (PACKAGE / name).is_file(), name
    assert len(page.split()) < 1000


ABOUT_CODE = (
    "CONTRIBUTING.md", "docs/design.md", "docs/glossary.md",
    "docs/explanation/how-a-build-flows.md", "docs/explanation/exact-merge.md",
)  # fmt: skip


@pytest.mark.parametrize("page", ABOUT_CODE)
def test_pages_about_code_name_files_that_are_there(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    spans = re.findall(r"`([\w./]+/[\w./]*)`", text)
    for name in {*spans, *re.findall(r"(?<![\w/`.])[a-z_]+/[\w/]+\.(?:py|c)\b", text)}:
        if not re.search(r"NAME|^dist/|^refused/", name):
            assert (PACKAGE / name).exists() or (ROOT / name).exists(), name


@pytest.mark.parametrize("room", sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py")))
def test_each_room_says_what_it_may_import_and_where_to_begin(room: str) -> None:
    text = (PACKAGE / room / "__init__.py").read_text("utf-8")
    said = " ".join((ast.get_docstring(ast.parse(text)) or "").split())

    assert re.search(r"may import", said)
    begin = re.search(r"Begin with ([^.]*?[\w/]+\.py)", said)
    assert begin
    for name in re.findall(r"[\w/]+\.py", said):
        assert (PACKAGE / room / name).is_file() or (PACKAGE / name).is_file(), name


def test_contributing_lists_every_marker() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    markers = {
        text.partition(":")[0] for text in settings["tool"]["pytest"]["ini_options"]["markers"]
    }
    names = listed("CONTRIBUTING.md", "Check and test")

    assert markers <= names


def rows_of(text: str) -> list[str]:
    """Return the rows of a page's tables."""
    return [line for line in text.splitlines() if line.startswith("| ")]


def slug(heading: str) -> str:
    """Return the anchor that forges give a heading."""
    plain = re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    text = without_code(path.read_text("utf-8"))
    return {slug(line) for line in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", LINKING)
def test_links_lead_somewhere(page: str) -> None:
    text = without_code((ROOT / page).read_text("utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), link
        if anchor:
            assert anchor in anchors(path), link


def test_every_page_is_reached_from_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text("utf-8")
    for page in PAGES:
        if page.startswith("docs/") and page != "docs/README.md":
            assert f"({page.removeprefix('docs/')})" in index, page


def test_pages_name_no_machine_of_ours() -> None:
    for page in LINKING:
        text = (ROOT / page).read_text("utf-8")
        assert not re.search(r"/work/|/root/|/tmp/w|/home/\w+", text), page


def test_the_page_for_closed_sites_fetches_what_the_builders_pin() -> None:
    page = (ROOT / "docs/how-to/air-gapped-site.md").read_text("utf-8")
    (shown,) = re.findall(r"torch==([\d.]+)", page)
    for name in ("merge", "gguf"):
        pinned = (ROOT / f"images/builders/{name}/requirements-cpu.txt").read_text("utf-8")
        assert re.findall(r"^torch==([\d.]+)", pinned, re.MULTILINE) == [shown]
    for file in re.findall(r"images/\S+\.(?:txt|py|json|lock)", page):
        assert (ROOT / file).is_file(), file


@pytest.mark.slow
def test_every_promise_names_tests_that_make_test_runs(pytestconfig: pytest.Config) -> None:
    security = (ROOT / "docs/explanation/security.md").read_text("utf-8")
    readme = (ROOT / "README.md").read_text("utf-8").partition("## What is promised\n")[2]
    promises = [
        *(row for row in rows_of(security) if "| test" not in row and set(row) - set("|- ")),
        *re.findall(r"^- .*", readme.partition("\n## ")[0], re.MULTILINE),
    ]
    named = {row: re.findall(r"tests/[\w/]+\.py::\w+", row) for row in promises}
    makefile = (ROOT / "Makefile").read_text("utf-8")
    (rest,) = re.findall(r"^REST := (.+)$", makefile, re.MULTILINE)
    assert {*rest.split(" or "), "gpu"} == REST
    tests = {test for found in named.values() for test in found}
    run = pytestconfig.stash[RUN_BY_MAKE_TEST]
    if other := sorted(tests - run):  # none where all tests are collected, as `make test` does
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, "-m", f"not ({' or '.join(REST)})", *other],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        run |= {line.partition("[")[0] for line in done.stdout.splitlines()}

    assert len(promises) > 50
    assert [row for row, found in named.items() if not found] == []
    assert sorted(tests - run) == []


def test_setup_leaves_another_checkouts_environment_alone(tmp_path: Path) -> None:
    """`make check VENV=…` would replace the tool that the other checkout's tests run."""
    place = tmp_path / "other" / "weightsmith"
    place.mkdir(parents=True)
    (place / "__init__.py").touch()
    venv.create(tmp_path / "venv")
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "other.pth").write_text(str(place.parent))

    done = subprocess.run(
        ["make", "--no-print-directory", "setup", f"VENV={tmp_path / 'venv'}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 2
    assert f"another checkout installed, {place}" in done.stderr
    assert not (tmp_path / "venv" / ".ready").exists()
