"""The pages keep their word: commands run or say why not, links lead somewhere, lists are whole."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml
from invoke.parser import Parser
from invoke.program import Program
from weightsmith.cli import namespace
from weightsmith.cli.commands import report_words
from weightsmith.fleets.file import check_fleet
from weightsmith.recipe.file import check_recipe
from weightsmith.recipe.user_config import UserConfig

from tests.fakes.registry import fake_registry
from tests.paths import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
)
OWN = ("invoke", "weightsmith")
LOOKS = {"targets", "plan", "doctor", "inspect", "render", "clean"}
"""Commands that take a second and need no builder."""
SHELLS = {"bash", "console"}
REGISTRY = "localhost:5000"
"""What pages call their registry; the tests put a free port there."""
CACHE = Path(
    os.environ.get("WEIGHTSMITH_TEST_CACHE")
    or os.environ.get("WEIGHTSMITH_HOME")
    or Path.home() / ".cache/weightsmith"
)
"""Builders are made once and kept here, because that takes minutes."""


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    page: str
    line: int
    language: str
    text: str
    reason: str
    """Why it is not run; empty where it is."""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def script(self) -> str:
        """What is typed: of a console, the lines with a prompt and their continuations."""
        if self.language != "console":
            return self.text
        typed, going = [], False
        for line in self.text.splitlines():
            if line.startswith("$ ") or going:
                typed.append(line.removeprefix("$ "))
                going = line.endswith("\\")
        return "\n".join(typed) + "\n"

    @property
    def commands(self) -> list[list[str]]:
        found: list[list[str]] = []
        for line in self.script.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>()")
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if set(word) <= set("|&;()"):
                    if words:
                        found.append(words)
                    words = []
                else:
                    words.append(word)
        return [bare for words in found if (bare := without_shell(words))]

    @property
    def looks_only(self) -> bool:
        """Say whether it needs neither builders nor what an earlier block made."""
        return all(
            is_look(words) for words in self.commands if words[0] in OWN and not helps(words)
        )


def without_shell(words: list[str]) -> list[str]:
    """Leave out assignments before a command, and redirections."""
    while words and re.match(r"[A-Za-z_]\w*=", words[0]):
        words = words[1:]
    if words and words[0] == "export":
        return []
    ends = [n for n, word in enumerate(words) if set(word) <= set("<>")]
    return words[: ends[0]] if ends else words


def helps(words: list[str]) -> bool:
    return any(w in {"--help", "--list", "--version", "-l"} or "completion" in w for w in words)


def is_look(words: list[str]) -> bool:
    if words[1] not in LOOKS:
        return False
    paths = [words[n + 1] for n, word in enumerate(words) if word in {"--model", "--config"}]
    paths += [word for word in words[2:3] if words[1] == "inspect"]
    return all((ROOT / path).exists() and not path.startswith("oci:") for path in paths)


@cache
def blocks() -> tuple[Block, ...]:
    return tuple(block for page in PAGES for block in read_blocks(page))


def read_blocks(page: str) -> Iterator[Block]:
    before, start, language = "", 0, ""
    body: list[str] = []
    for number, line in enumerate((ROOT / page).read_text("utf-8").splitlines(), start=1):
        if not start and (fence := re.fullmatch(r"```(\w*)", line)):
            start, language, body = number, fence[1], []
        elif start and line == "```":
            reason = re.fullmatch(r"<!-- not run: (.+) -->", before)
            text = "\n".join(body) + "\n"
            yield Block(page, start, language, text, reason[1].strip() if reason else "")
            start, before = 0, ""
        elif start:
            body.append(line)
        elif line.strip():
            before = line.strip()
    assert not start, f"{page}:{start}: the block does not end"


def shell_blocks() -> list[Block]:
    return [block for block in blocks() if block.language in SHELLS]


def parse(words: list[str]) -> None:
    """Parse as the program does; ParseError for an unknown flag or a missing value."""
    namespace["report"].positional = report_words(words)
    parser = Parser(initial=Program().initial_context, contexts=namespace.to_contexts())
    parser.parse_argv(words[1:])


def test_every_block_says_what_it_is() -> None:
    known = SHELLS | {"yaml", "json", "jsonl", "mermaid", "text", "python", "dockerfile"}
    assert [str(b) for b in blocks() if b.language not in known] == []


@pytest.mark.parametrize("block", shell_blocks(), ids=str)
def test_commands_exist_as_written(block: Block) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in block.commands:
        if words[0].rpartition("/")[2] in OWN:
            parse(words)
        elif words[0] == "make":
            assert {w for w in words[1:] if "=" not in w} <= targets, words


def test_commands_of_other_read_mes_exist_as_written() -> None:
    pages = [*ROOT.glob("examples/*/README.md"), *ROOT.glob("images/**/README.md")]
    for page in pages:
        for line in page.read_text("utf-8").splitlines():
            if line.startswith(tuple(f"    {name} " for name in OWN)):
                parse(shlex.split(line, comments=True))


def test_blocks_are_run_or_explained() -> None:
    for block in shell_blocks():
        programs = {words[0] for words in block.commands}
        if {"docker", "kubectl", "skopeo"} & programs:
            assert block.reason, f"{block} needs an engine or a cluster and does not say so"
        assert block.reason or block.commands or "export " in block.script, f"{block} is empty"


ASKED = {"eval.jsonl": 11, "general.jsonl": 32, "calibration.jsonl": 6}
"""Questions and texts of the support bot -> pages use every n-th; `tests/real/` uses all."""


def copy_support_bot(folder: Path) -> None:
    """Copy the example, with fewer questions and texts: its model takes a second for each."""
    shutil.copytree(ROOT / "examples/support-bot", folder)
    for name, step in ASKED.items():
        lines = (folder / name).read_text("utf-8").splitlines(keepends=True)
        (folder / name).write_text("".join(lines[::step]), "utf-8")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder like a checkout, to build in."""
    folder = tmp_path / "checkout"
    (folder / "examples").mkdir(parents=True)
    for name in ("docs", "Makefile", "tasks.py", "pyproject.toml", "toolchain"):
        (folder / name).symlink_to(ROOT / name)
    for example in (ROOT / "examples").iterdir():
        if example.name != "support-bot":
            (folder / "examples" / example.name).symlink_to(example)
    copy_support_bot(folder / "examples/support-bot")
    return folder


def run_blocks(wanted: list[Block], folder: Path, store: Path) -> None:
    """Run blocks one after another in one shell, as a reader would."""
    script = "set -euo pipefail\n"
    for block in wanted:
        script += f"echo '== {block}' >&2\n{block.script}"
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "WEIGHTSMITH_HOME": str(CACHE),
        "WEIGHTSMITH_STORE": str(store),
        # No engine answers there: every page is run with the local runner.
        "DOCKER_HOST": f"unix://{folder}/no-engine.sock",
    }
    with fake_registry() as registry:
        done = subprocess.run(
            ["bash", "-c", script.replace(REGISTRY, registry.host)], cwd=folder, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout[-4000:]}"


def runnable(page: str) -> list[Block]:
    return [block for block in shell_blocks() if block.page == page and not block.reason]


LOOKING = [page for page in PAGES if any(block.looks_only for block in runnable(page))]
BUILDING = [page for page in PAGES if any(not block.looks_only for block in runnable(page))]
FIRST = {"README.md", "docs/tutorial/first-image.md"}
"""Read first; tests of whole builds run what the other pages do as well."""


@pytest.mark.slow
@pytest.mark.parametrize("page", LOOKING)
def test_looking_commands_run(page: str, checkout: Path, tmp_path: Path) -> None:
    alone = [b for b in runnable(page) if b.looks_only and (page not in BUILDING or b.commands)]
    alone = [b for b in alone if page not in BUILDING or all(w[0] in OWN for w in b.commands)]
    run_blocks(alone, checkout, tmp_path / "store")


@pytest.mark.builders
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.full] * (page not in FIRST)) for page in BUILDING],
)
def test_whole_page_runs(page: str, checkout: Path, shared_store: Path) -> None:
    run_blocks(runnable(page), checkout, shared_store)


def run_demo(folder: Path, store: Path) -> subprocess.CompletedProcess[str]:
    """Run the demo in a copy, since it writes beside itself."""
    copy_support_bot(folder / "examples/support-bot")
    (folder / "tasks.py").symlink_to(ROOT / "tasks.py")
    return subprocess.run(
        [sys.executable, folder / "examples/support-bot/demo.py", "--runner", "local"],
        env={**os.environ, "WEIGHTSMITH_HOME": str(CACHE), "WEIGHTSMITH_STORE": str(store)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.builders
@pytest.mark.timeout(3600)
def test_demo_asks_the_built_image(tmp_path: Path, shared_store: Path) -> None:
    done = run_demo(tmp_path, shared_store)

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("     image  ") == 3
    assert "(wrong)" not in done.stdout
    assert "lantern, right of 3: base 0 | base+adapter 3 | image 3" in done.stdout
    assert "general, right of 3: base " in done.stdout
    assert (tmp_path / "dist/support-bot/1.0.0/llamacpp-q4_k_m/report.html").is_file()


@pytest.mark.slow
def test_demo_fails_as_its_command_does(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("no folder")

    done = run_demo(tmp_path, tmp_path / "store")

    assert done.returncode == 5, done.stderr
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr


def listed(page: str, heading: str = "") -> set[str]:
    """Return the code spans that begin a table's rows, below a heading where one is named."""
    text = (ROOT / page).read_text("utf-8")
    if heading:
        text = re.split(r"^#+ ", text.split(f"# {heading}\n")[1], flags=re.MULTILINE)[0]
    rows = [re.match(r"\| (`[^|]+`) ", line) for line in text.splitlines()]
    return {name for row in rows if row for name in re.findall(r"`([^`]+)`", row[1])}


@pytest.mark.builders
@pytest.mark.timeout(3600)
def test_pages_list_every_key_of_a_record_and_every_label(
    shared_store: Path, tmp_path: Path
) -> None:
    """Of the tiny example's build.json, and of its image."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    build = "weightsmith build --recipe examples/tiny/recipe.yaml --layout image --json"
    look = "weightsmith inspect oci:image --json >image.json"
    block = Block("the record", 1, "bash", f"{build} >build.json\n{look}\n", "")
    run_blocks([block], tmp_path, shared_store)
    path = tmp_path / "dist/tiny-capitals/1.0.0/llamacpp-q4_k_m/build.json"
    labels = json.loads((tmp_path / "image.json").read_text("utf-8"))["labels"]
    found = {re.sub(r"adapter\.\d+", "adapter.N", label) for label in labels}
    keys = {*json.loads(path.read_text("utf-8")), "bench"}  # the recipe measures no speed
    assert listed("docs/reference/build-json.md", "Keys") == keys
    assert listed("docs/reference/image.md", "Labels") == found


@pytest.mark.parametrize("block", [b for b in blocks() if "json" in b.language], ids=str)
def test_json_can_be_parsed(block: Block) -> None:
    for text in block.text.splitlines() if block.language == "jsonl" else [block.text]:
        json.loads(text)


@pytest.mark.parametrize("block", [b for b in blocks() if b.language == "yaml"], ids=str)
def test_yaml_is_a_recipe_a_fleet_a_workflow_or_a_configuration(block: Block) -> None:
    data = yaml.safe_load(block.text)
    if {"recipe", "adapters"} <= set(data):
        check_fleet(data, str(block))
        return
    if data.get("kind") == "InferenceModelRewrite":
        return  # tests/unit/stages/test_manifests.py holds it against its definition
    if set(data) == {"cache"}:
        assert UserConfig.model_validate(data).cache.where
        return
    if "jobs" not in data:
        check_recipe(data if "name" in data else skeleton(data), str(block))
        return
    for job in data["jobs"].values():
        for step in job["steps"]:
            script = Block(block.page, block.line, "bash", step.get("run", ""), "")
            for words in script.commands:
                if words[0].rpartition("/")[2] in OWN:
                    parse(words)


def skeleton(part: dict[str, object]) -> dict[str, object]:
    """Return a whole recipe around a part of one."""
    return {"name": "x", "base": {"source": "./x"}, **part}
