"""The pages fit together: links lead somewhere, lists are whole, every promise has its test."""

import re
import subprocess
import tomllib
import venv
from pathlib import Path

import pytest
from weightsmith import errors
from weightsmith.building.targets import all_targets

from tests.unit.test_docs import PAGES, ROOT, listed

LINKING = [*PAGES, "CHANGELOG.md"]
VARIABLE = r"WEIGHTSMITH_[A-Z_]*[A-Z](?![A-Z_])"
"""The name of one of our variables, and not the beginning of several."""
CMAKE = {"WEIGHTSMITH_PROGRAMS", "WEIGHTSMITH_VARIANTS"}
"""Variables of CMake, not of the environment."""


def test_environment_page_lists_every_variable() -> None:
    asked = subprocess.run(
        ["git", "ls-files", "toolchain", "images", "templates", "Makefile", "tests", ".ci"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if asked.returncode != 0:
        pytest.skip("not a git checkout")
    used = set()
    for name in asked.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and not name.startswith("tests/unit/"):
            used |= set(re.findall(VARIABLE, path.read_text("utf-8", "replace")))
    page = (ROOT / "docs/reference/environment.md").read_text("utf-8")
    assert set(re.findall(VARIABLE, page)) == used - CMAKE


def test_exit_code_page_lists_every_code() -> None:
    kinds = (errors.WeightsmithError, *errors.WeightsmithError.__subclasses__())
    codes = {str(kind.exit_code) for kind in kinds}
    assert listed("docs/reference/exit-codes.md") == codes | {"0", "130"}


def test_the_readme_counts_the_targets_and_names_those_that_are_there() -> None:
    """`llamacpp-f16`, `-q8_0`, … and so many more: the rows of its table are all there is."""
    names = {target.name for target in all_targets().values()}
    page = (ROOT / "README.md").read_text("utf-8")
    table = page.partition("## Targets")[2].partition("\n## ")[0]
    words = re.findall(r"`([\w-]+)`", "\n".join(row.split("|")[1] for row in rows_of(table)))

    named = {f"llamacpp{word}" if word.startswith("-") else word for word in words}

    assert named <= names
    llamacpp = {name for name in names if name.startswith("llamacpp")}
    assert f"and [{len(llamacpp - named)} more](docs/reference/targets.md)" in table
    bits = [
        target.format.bits_per_weight
        for target in all_targets().values()
        if target.name in llamacpp
    ]
    assert f"{min(bits):.1f} to {max(bits):.0f} bits" in table


def test_the_readmes_memory_is_what_was_measured() -> None:
    figures = rows_of((ROOT / "benchmarks/README.md").read_text("utf-8"))
    page = (ROOT / "README.md").read_text("utf-8")

    def peaks(stage: str) -> list[str]:
        """Return the peaks of a stage in the two tables of whole builds, in GB."""
        mib = [int(row.split("|")[4]) for row in figures if row.startswith(f"| {stage} |")]
        return [f"{one * 2**20 / 1e9:.1f} GB" for one in mib]

    small, large = peaks("quantize, with the importance matrix")
    assert f"measured {small} for 1.17 billion weights and {large} for 7.4 billion" in page
    assert f"that was {peaks('start and questions')[-1]}" in page


def test_pages_say_what_the_benchmarks_do_of_images_and_merges() -> None:
    figures = rows_of((ROOT / "benchmarks/README.md").read_text("utf-8"))

    def row(start: str) -> list[str]:
        (first, *_) = (one for one in figures if one.startswith(f"| {start} |"))
        return [cell.strip() for cell in first.split("|")[2:-1]]

    images = (ROOT / "docs/explanation/assembled-images.md").read_text("utf-8")
    for way in ("`docker build` and `docker push`", "assemble and push"):
        wall, _, *cpu, _ = row(way)
        said = f"took {wall} s, and {sum(map(float, cpu)):.1f} s of CPU time"
        assert said in images, said
    merge = (ROOT / "docs/explanation/exact-merge.md").read_text("utf-8")
    (_, part, _, ours), (*_, theirs) = row("weightsmith"), row("PEFT merge_and_unload")
    said = f"{part} of the CPU time of PEFT's `merge_and_unload` and {int(ours) / int(theirs):.2f}"
    assert said in merge, said


def test_where_things_are() -> None:
    """Names after a row's first are of files beside it."""
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    rows = rows_of(page.partition("## Where things are\n")[2].partition("\n## ")[0])
    for first, *others in (re.findall(r"`([^`]+)`", row.split("|")[1]) for row in rows[1:]):
        assert (ROOT / first).exists(), first
        for name in others:
            beside = (ROOT / first).parent / name
            assert beside.exists() or (ROOT / name).exists(), name


def test_contributing_lists_every_marker() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    markers = {
        text.partition(":")[0] for text in settings["tool"]["pytest"]["ini_options"]["markers"]
    }
    names = listed("CONTRIBUTING.md", "Check and test")

    assert markers <= names


def test_help_of_make_lists_every_target() -> None:
    text = (ROOT / "Makefile").read_text("utf-8")
    phony = set(re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)[0].split())
    # Under `make test` it would also say which folder it enters.
    command = ["make", "--no-print-directory", "help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    rows = [line.split(maxsplit=1) for line in done.stdout.splitlines()]

    assert {row[0] for row in rows if len(row) == 2} == phony


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


def test_every_promise_names_a_test_that_is_there() -> None:
    page = (ROOT / "docs/explanation/security.md").read_text("utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and "| test" not in line]
    promises = [row for row in rows if not set(row) <= set("|- ")]

    for row in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row)
        assert named, row
        for file, name in named:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), re.MULTILINE), name


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
