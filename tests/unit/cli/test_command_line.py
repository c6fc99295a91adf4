"""What all commands have in common, by the program itself: JSON, errors, exit codes."""

import json
import re
import subprocess
import sys
from dataclasses import asdict, astuple

import pytest
from weightsmith.cli import namespace
from weightsmith.cli.program import Weightsmith
from weightsmith.recipe.user_config import WantedIdentity

from tests.fakes.command_line import PROGRAMS, ROOT, run, started
from tests.fakes.tiny import write_model


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("merge", "--seed", "x"), {"--seed", "x"}),
        (("evaluate", "--min-score", "half"), {"--min-score", "half"}),
        (("merge",), {"--base", "--out"}),
        (("merge", "--keep-adapter", "k"), {"--base", "--adapter"}),
        (("build", "--locked", "--update-lock"), {"--update-lock", "--locked"}),
        (("build", "--from", "x", "--update-lock"), {"--update-lock", "--from"}),
        (("evaluate", "--tasks", "x", "--memory", "4GiB"), {"--tasks", "--memory"}),
    ],
)
def test_a_wrong_use_is_reported_as_json_too(words, named):
    done = run(*words, "--json")

    assert done.code == 2
    message = json.loads(done.out)["error"]["message"]
    assert named <= set(re.findall(r"[\w-]+", message))
    assert done.err.startswith(f"error: {message}\n")


@pytest.mark.parametrize("program", PROGRAMS)
def test_each_program_reports_it_the_same(program):
    done = started(program, "merge", "--seed", "x", "--json")

    assert (done.code, done.out, done.err) == astuple(run("merge", "--seed", "x", "--json"))


@pytest.mark.parametrize(
    "words",
    [
        ("merge", "--nosuch"),
        ("nosuch",),
        ("inspect",),
        ("--nosuch",),
        ("--list=nosuch",),
        ("plan", "--target"),
        ("plan", "--target", "vllm", "--target"),
        ("merge", "--out"),
    ],
)
def test_what_the_parser_refuses_is_reported_as_json_too(words):
    done = run(*words, "--json")

    assert done.code == 2
    error = json.loads(done.out)["error"]
    assert done.err == f"error: {error['message']}\n  hint: {error['hint']}\n"


def test_a_repeatable_flag_of_several_commands_in_one_line():
    """Each flag is counted with its own value, whichever command of the line it belongs to."""
    program = Weightsmith(name="weightsmith", version="0", namespace=namespace)
    words = ["plan", "--target", "vllm", "--target", "tgi", "build", "--target", "tgi"]
    program.create_config()
    program.parse_core(["weightsmith", *words])
    program.parse_collection()
    program.parse_tasks()

    assert [task.args.target.value for task in program.tasks] == [["vllm", "tgi"], ["tgi"]]


@pytest.mark.parametrize("words", [("-T", "soon"), ("-T",), ("--list-depth", "x", "--list")])
def test_options_of_the_program_itself_are_refused_as_well(words):
    done = run(*words)

    assert done.code == 2
    assert done.err.startswith("error: ")


def test_help_of_a_command_with_a_positional_argument():
    done = run("push", "--help")

    assert (done.code, "--to=STRING" in done.out) == (0, True)


def test_a_hint_names_the_program_as_it_was_called():
    done = started("weightsmith", "push")

    assert done.code == 2
    assert "`python -m weightsmith --help push` has its flags" in done.err


def test_invoke_is_left_as_it_is():
    """Other people's tasks stand beside ours: what `invoke` itself parses is its own business."""
    done = started("invoke", "merge", "--nosuch")

    assert done.code == 1
    assert "No idea what '--nosuch' is!" in done.err


def test_the_tutorial_knows_what_invoke_says_elsewhere(tmp_path):
    words = [sys.executable, "-m", "invoke", "plan"]
    elsewhere = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)

    page = (ROOT / "docs/tutorial/first-image.md").read_text("utf-8")
    assert elsewhere.stderr.strip() in page


def test_a_name_that_is_no_text_is_reported(tmp_path):
    words = ("--model", "examples/tiny/base", "--target", "llamacpp-f16", "--out", tmp_path / "out")

    done = run("render", *words, "--name", "\udcff")

    assert done.code == 2
    assert r"\udcff" in done.err
    assert not list(tmp_path.glob("out/*"))


def test_the_machine_is_described(tmp_path):
    """Builders of either runner count: a build takes whichever is there."""
    done = run("doctor", "--json", WEIGHTSMITH_HOME=str(tmp_path))

    assert done.code == 0
    checks = json.loads(done.out)["checks"]
    assert set(checks) >= {"engine", "gpu", "memory", "disk", "credentials", "builders", "jobs"}
    assert "local jobs" in checks["jobs"]["found"]
    assert "local: none" in checks["builders"]["found"]


def flags(command):
    return {argument.name for argument in namespace[command].get_arguments()}


def test_a_plan_takes_the_flags_of_the_build_that_it_foresees():
    """All but those of an image that is built again, whose recipe has to be fetched first."""
    who = {"key", *asdict(WantedIdentity())}
    assert flags("build") - flags("plan") == {"from_", "keep_replay", *who}
    assert flags("plan") - flags("build") == {"measure"}


def test_who_speaks_with_registries_may_do_so_without_https():
    """Messages about certificates name --insecure, so every such command must have it."""
    speaking = {
        name
        for name in namespace.task_names
        if flags(name) & {"cache", "cache-from", "cache_from"}
        or name in {"push", "inspect", "verify"}
    }
    assert {"merge", "evaluate", "bench", "rebase", "fleet"} <= speaking
    assert [name for name in speaking if "insecure" not in flags(name)] == []


def test_a_plan_needs_the_flags_that_its_build_needs(tmp_path):
    model = write_model(tmp_path / "model")
    words = ("plan", "--base", model, "--target", "llamacpp-q2_k", "--json")

    refused, planned = run(*words), run(*words, "--allow-low-bits")

    assert (refused.code, planned.code) == (2, 0), planned.err
    assert "--allow-low-bits" in json.loads(refused.out)["error"]["hint"]


@pytest.mark.parametrize("value", ["1", "[]", "x", "null"])
def test_a_section_that_is_no_mapping_is_refused(tmp_path, value):
    model = write_model(tmp_path / "base")
    words = ("render", "--model", model, "--target", "vllm", "--out", tmp_path / "out")

    done = run(*words, "--set", f"serve={value}")

    assert done.code == 2, done.err
    assert "serve" in done.err
