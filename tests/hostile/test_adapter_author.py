"""The attacker wrote an adapter: its weights, its configuration, and the names in them."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import termios
import threading
import tty
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors.numpy import save_file
from weightsmith.api.commands.evaluate import read_results
from weightsmith.api.commands.images import inspect_text
from weightsmith.api.commands.plan import table as plan_table
from weightsmith.api.commands.verify import table as verify_table
from weightsmith.building.progress import PlainProgress, progress_for
from weightsmith.cli.command import print_error
from weightsmith.cli.commands import _verdict
from weightsmith.core.errors import InputRefused, WeightsmithError
from weightsmith.core.escape import as_json, put_line
from weightsmith.core.ports import Progress
from weightsmith.evaluating.build_record import BuildRecord
from weightsmith.evaluating.pages import build_view, render_view
from weightsmith.forward.libraries import load_tokenizer
from weightsmith.merging.plan import make_plan
from weightsmith.outside.process import forked
from weightsmith.provenance.chain import Check
from weightsmith.quantizers.quality.texts import _lengths
from weightsmith.validating.result import Validation, finding

from tests.fakes.records import BUILD
from tests.paths import TINY

BASE, ADAPTER = TINY / "base", TINY / "adapters" / "a"
WEIGHTS = "adapter_model.safetensors"

# Patterns that never end.

NEVER_ENDS = r"(\w+\.?)+!"
PATTERNS: dict[str, object] = {
    "target_modules": NEVER_ENDS,
    "exclude_modules": NEVER_ENDS,
    "rank_pattern": {NEVER_ENDS: 4},
    "alpha_pattern": {NEVER_ENDS: 4},
    "modules_to_save": [NEVER_ENDS],
    "layers_pattern": NEVER_ENDS,  # slow only where layers_to_transform asks for it
}


def adapter_with(folder: Path, **settings: object) -> Path:
    adapter = Path(shutil.copytree(ADAPTER, folder / "adapter"))
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | settings), "utf-8")
    return adapter


@pytest.mark.slow
@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_that_never_ends_is_refused_in_the_plan(name, tmp_path, impatient):
    """One of the configuration's regular expressions takes for ever on the base's names: refused
    from the process that the user started, with the field that holds it."""
    asked = {"layers_to_transform": [0]} if name == "layers_pattern" else {}
    adapter = adapter_with(tmp_path, **{name: PATTERNS[name], **asked})

    with pytest.raises(InputRefused, match=name):
        make_plan(BASE, [(adapter, 1.0)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["target_modules", "modules_to_save"])
def test_a_pattern_that_never_ends_does_not_reach_peft(name, tmp_path, impatient):
    """PEFT would match it against every module of the model: the jobs that ask PEFT refuse it."""
    from weightsmith.forward.adapters import with_adapters
    from weightsmith.forward.network import skeleton
    from weightsmith.merging.reference import load_network

    adapter = adapter_with(tmp_path, **{name: PATTERNS[name]})

    with pytest.raises(InputRefused, match=name):
        load_network(BASE, [(adapter, 1.0)])
    with pytest.raises(InputRefused, match=name):
        with_adapters(skeleton(BASE), [(adapter, 1.0)])


def test_a_pattern_nested_too_deeply_is_refused(tmp_path):
    """Python cannot even read the expression: refused, and no trace of it."""
    adapter = adapter_with(tmp_path, target_modules="(" * 5000 + ")" * 5000)

    with pytest.raises(InputRefused, match="adapter_config"):
        make_plan(BASE, [(adapter, 1.0)])


def test_a_tokenizer_whose_pattern_takes_too_many_steps_is_refused(tmp_path):
    """Its library panics after some millions of steps, which is no Exception: refused, by name.

    The importance of inputs is measured in a copy, whose end says what became of it.
    """
    model = Path(shutil.copytree(BASE, tmp_path / "model"))
    file = model / "tokenizer.json"
    pattern = {"type": "Split", "pattern": {"Regex": "(?:a|a|b|b)+$c"}, "behavior": "Isolated"}
    told = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(told | {"pre_tokenizer": pattern | {"invert": False}}))

    with pytest.raises(InputRefused, match=r"tokenizer\.json: a library gave up"):
        _lengths(model, ["ab" * 40])
    tokenizer = load_tokenizer(model)
    with (
        pytest.raises(InputRefused, match="measuring: a library gave up"),
        forked(lambda: tokenizer("ab" * 40), "measuring") as copy,
    ):
        copy.join()


@pytest.mark.slow
def test_names_of_tensors_that_are_searched_for_ever_are_refused(tmp_path, impatient):
    """Each name of hundreds could be read in hundreds of ways, and none of them is right."""
    adapter = adapter_with(tmp_path)
    names = [f"base_model.model.{n}{'.lora_A' * 570}.." for n in range(300)]
    save_file({name: np.zeros(1, np.float32) for name in names}, adapter / WEIGHTS)

    with pytest.raises(InputRefused, match="300"):
        make_plan(BASE, [(adapter, 1.0)])


# What reaches people: a name that steers a terminal, fakes a line of ours, or commands a CI system.

EVIL = "evil\x1b[2J\x1b]0;pwned\x07\r\nall checks passed\n::error::pwned ##vso[task.setvariable]"
EVIL += "\x9b31m\u202egnp\u2066\u200b\x7f\u2028[/][link=https://evil.example]x[/link] [bold]:skull:"
REFUSED = WeightsmithError(f"keys that nothing here merges: {EVIL}", hint=f"remove {EVIL}")
CHOSEN = st.text(st.characters() | st.sampled_from(EVIL), max_size=60)


SEQUENCE = re.compile("\x1b\\[[0-9;?]*[A-Za-z]")


def say(progress: Progress, text: str) -> None:
    """Say a text in every way that there is."""
    progress.stage("merge", text)
    progress.advance(1, 2, text)
    progress.note(text)
    progress.warn(text)
    progress.finish("merge", 0.1, cached=False)


def on_terminal(do: Callable[[], None]) -> str:
    """Return what a terminal receives, as it was sent and not as it would be shown."""
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (50, 400))
    tty.setraw(theirs)
    received = bytearray()

    def receive() -> None:
        with suppress(OSError):  # as a pty says that its other side is closed
            while chunk := os.read(ours, 1 << 16):
                received.extend(chunk)

    reader = threading.Thread(target=receive)
    reader.start()
    with os.fdopen(theirs, "w") as stream, redirect_stderr(stream):
        do()
    reader.join()
    os.close(ours)
    return received.decode()


def as_printed(text: str) -> str:
    stream = io.StringIO()
    put_line(text, stream)
    return stream.getvalue()


def assert_harmless(text: str) -> None:
    for character in text:
        assert character.isprintable() or character in "\n\t", repr(text)
    for line in text.split("\n"):
        assert not line.lstrip().startswith("::"), line
        assert not re.search(r"##\w*\[", line), line


def test_a_key_of_an_adapter_fakes_no_line():
    """A newline in a key begins no line of ours: what follows it is marked as a quotation.

    Escape sequences clear no screen and move no cursor: they are shown as text.
    """
    stream = io.StringIO()
    say(PlainProgress(stream), EVIL)
    text = stream.getvalue()
    assert_harmless(text)
    assert "evil\\x1b[2J\\x1b]0;pwned\\x07" in text
    assert "\\u202egnp\\u2066\\u200b\\x7f\\u2028[/][link=https://evil.example]x[/link]" in text
    lines = text.splitlines()
    faked = [line for line in lines if "all checks passed" in line or "pwned ##" in line]
    assert faked
    assert all(line.startswith("  | ") for line in faked)


def test_an_error_quotes_without_obeying(capsys):
    """A refusal that names a key: harmless on stderr, and the same text back from JSON."""
    print_error(REFUSED, as_json=True)
    told = capsys.readouterr()
    assert_harmless(told.err)
    assert [line[:8] for line in told.err.splitlines() if not line.startswith("  | ")] == [
        "error: k", "  hint: ",
    ]  # fmt: skip
    assert told.out.count("\n") == 1
    assert_harmless(told.out)
    assert json.loads(told.out)["error"]["message"] == REFUSED.message


def test_a_live_terminal_is_not_steered():
    """The same with bars: rich's own sequences are all that steers, and nothing is markup."""
    text = on_terminal(lambda: say(progress_for(), EVIL))
    for sequence in ("\x1b[2J", "\x1b]0;", "\x1b]8;", "\x07", "\x9b", "\u202e", "\u2028", "\x7f"):
        assert sequence not in text
    plain = SEQUENCE.sub("", text)
    assert plain.count("[/][link=https://evil.example]x[/link] [bold]:skull:") == 3
    assert_harmless(plain.replace("\r", ""))
    assert not re.search(r"^\s*all checks passed", plain, re.MULTILINE)


@pytest.mark.slow
@given(CHOSEN)
def test_no_name_steers_a_terminal(name):
    """Whatever characters a name has, in progress and in errors."""
    stream = io.StringIO()
    say(PlainProgress(stream), name)
    with redirect_stderr(stream), redirect_stdout(stream):
        print_error(WeightsmithError(name, hint=name, details={"checks": [name]}), as_json=True)
    assert_harmless(stream.getvalue())


@given(CHOSEN)
def test_no_name_adds_a_row(name):
    """Tables of `inspect`, `verify`, `plan` and others have the rows that they should."""
    wanted = {"reference": "r", "digest": "d", "scores": {name: 1.0}, "provenance": {name: name},
              "plan": {}, "layers": [{"digest": "sha256:" + "0" * 64, "size": 1, "file": name}],
              "index": "i", "platform": name, "platforms": [name]}  # fmt: skip
    said = name.encode(errors="replace").decode()  # half a character is no JSON
    tasks = {"results": {said: {f"acc,{said}": 1}}}
    with TemporaryDirectory() as folder:
        (Path(folder) / "results_1.json").write_text(json.dumps(tasks))
        _, told = read_results(Path(folder))
    row = {"stage": "merge", "target": name, "cached": False, "why": name, "read_bytes": 0,
           "write_bytes": 0, "peak_memory_bytes": 0}  # fmt: skip
    forecast = {"name": name, "version": name, "stages": [row], "serving": {}, "advice": {},
                "sharing": {name: {"shared_bytes": 1, "own_bytes": 2}},
                "platforms": {name: {name: name, "linux/amd64": name}}}  # fmt: skip
    for text, rows in (
        (inspect_text(wanted), 7),
        (verify_table([Check(name=name, ok=True, found=name)]), 1),
        (told, 1),
        (_verdict("m", Validation(passed=True, findings=(finding("warning", "logits", name),))), 2),
    ):
        shown = as_printed(text)
        assert_harmless(shown)
        assert shown.count("\n") == rows
    assert_harmless(as_printed(plan_table(forecast)))


def test_markup_in_a_plan_is_text():
    """A recipe's or an adapter's name in a plan is no markup of rich's, nor ends it."""
    row = {"stage": "merge", "target": "t", "cached": False, "why": "[/] [bold]why :skull:",
           "read_bytes": 0, "write_bytes": 0, "peak_memory_bytes": 0}  # fmt: skip
    forecast = {"name": "[red]n", "version": "[/]", "stages": [row], "serving": {}, "sharing": {},
                "platforms": {}, "advice": {"merge": None, "why": ["a\nb"]}}  # fmt: skip
    text = plan_table(forecast)
    assert "[red]n [/]" in text
    assert "[/] [bold]why :skull:" in text
    assert "a\\nb" in text


# Reports: build.json quotes names and answers, and people read it as a page, a summary, in CI.

MARKUP = (
    "# h\n> q\n- l\n1. n\n\n    code\n| a | b |\n`c` **b** _i_ ~~s~~ [a](https://evil.example)"
    " ![i](u) <img src=x onerror=alert(1)> <!-- &lt;b&gt; https://evil.example \\| </script>"
)
SHAPE = ("created",)
"""Facts that have a form of their own; all others may be any text."""


def spoiled(facts: Any, evil: str) -> Any:
    """Return a build's facts with a text appended to each of theirs."""
    if isinstance(facts, dict):
        return {k: v if k in SHAPE else spoiled(v, evil) for k, v in facts.items()}
    if isinstance(facts, list):
        return [spoiled(each, evil) for each in facts]
    return facts + evil if isinstance(facts, str) else facts


def spoiled_build(evil: str) -> BuildRecord:
    return BuildRecord.from_json(spoiled(BUILD, evil))


def kinds_in(markdown: str) -> list[str]:
    """Return the kinds of what a Markdown reader makes of a text, in order."""
    parser = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    found = []
    for token in parser.parse(markdown):
        found += [token.type, *(each.type for each in token.children or ())]
    return found


@pytest.mark.parametrize("evil", [MARKUP, MARKUP + EVIL, "\n" + MARKUP[::-1]])
def test_a_summary_has_no_markup_of_others(evil):
    """Every name, digest, verdict and check of report.md is text: its structure stays as it is."""
    harmless, hostile = (
        render_view(build_view(spoiled_build(text), (), None), "report.md.j2")
        for text in ("x", evil)
    )
    assert kinds_in(hostile) == kinds_in(harmless)
    assert not re.search(r"(?m)^(?!    ).*[^\\]://evil", hostile)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e\u2066]", hostile)


@pytest.mark.parametrize("evil", [MARKUP, MARKUP + EVIL])
def test_a_report_page_has_no_markup_of_others(evil):
    """report.html has the elements that it should, and no character that turns its text round."""
    tags = []
    for text in ("x", evil):
        page = render_view(build_view(spoiled_build(text), (), None), "report.html.j2")
        reader = HTMLParser()
        kept: list[tuple[str, list[str]]] = []
        reader.handle_starttag = lambda tag, attrs, kept=kept: kept.append(
            (tag, [name for name, _ in attrs])
        )
        reader.feed(page)
        tags.append(kept)
    assert tags[0] == tags[1]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e\u2066]", page)


@given(CHOSEN)
def test_json_is_the_same_and_obeyed_by_nobody(text):
    """`--json` gives back what was put in, and steers neither a terminal nor a CI system."""
    told = as_json({text: [text, {"a": "##vso[x]\x7f##[y]###" + text}]})
    assert json.loads(told) == {text: [text, {"a": "##vso[x]\x7f##[y]###" + text}]}
    assert told.isascii()
    assert_harmless(as_printed(told))
    assert as_printed(told) == told + "\n"
