"""What all commands have in common, by the program itself: JSON, errors, exit codes."""

import json
import os
import pty
import re
import subprocess
import sys
from contextlib import chdir
from dataclasses import astuple
from pathlib import Path

import pytest
from weightsmith.cli import namespace
from weightsmith.cli.program import Weightsmith
from weightsmith.drivers import checkup

from tests.fakes.command_line import Ended, weightsmith
from tests.fakes.tiny import write_model

ROOT = Path(__file__).parents[3]
PROGRAMS = {
    "weightsmith": [sys.executable, "-m", "weightsmith"],
    "invoke": [sys.executable, "-m", "invoke", "--search-root", str(ROOT)],
}


def run(*words, **environment):
    """Run a command in this process, in the project's folder."""
    with chdir(ROOT):
        return weightsmith(*words, env=environment)


def started(program, *words, **environment):
    """Run a command as a program of its own."""
    done = subprocess.run(
        [*PROGRAMS[program], *words], cwd=ROOT, env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("merge", "--seed", "x"), {"--seed", "x"}),
        (("evaluate", "--min-score", "half"), {"--min-score", "half"}),
        (("merge",), {"--base", "--adapter", "--out"}),
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

    assert done.code == 0
    assert "--to=STRING" in done.out


def test_invoke_is_left_as_it_is():
    """Other people's tasks stand beside ours: what `invoke` itself parses is its own business."""
    done = started("invoke", "merge", "--nosuch")

    assert done.code == 1
    assert "No idea what '--nosuch' is!" in done.err


@pytest.mark.slow
def test_letters_that_the_terminal_lacks_are_escaped(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("name: x\nbase: {source: ./bäse}\ntargets: [vllm]\nnö: 1\n", "utf-8")

    done = started("weightsmith", "plan", "--recipe", str(recipe), PYTHONIOENCODING="ascii")

    assert done.code == 2
    assert r"`n\xf6`" in done.err


def test_help_in_a_terminal_that_lacks_its_letters():
    done = started("weightsmith", "build", "--help", PYTHONIOENCODING="ascii")

    assert (done.code, done.err) == (0, "")
    assert r"awskms://\u2026" in done.out


PLAN = ("plan", "--base", "examples/tiny/base", "--target", "vllm")


@pytest.mark.grid(3)
@pytest.mark.parametrize("words", [("targets",), ("merge",), PLAN], ids=lambda words: words[0])
def test_nobody_reads(words):
    """As after `2>&1 | head`: what is left to say goes nowhere, and nothing else changes."""
    read, write = os.pipe()
    os.close(read)
    silent = subprocess.run(
        [*PROGRAMS["weightsmith"], *words], cwd=ROOT, stdout=write, stderr=write, check=False
    )
    os.close(write)

    assert silent.returncode == run(*words).code


@pytest.mark.parametrize("words", [("--list",), ("--help", "plan")], ids=" ".join)
def test_nobody_reads_a_list(words):
    """As after `| head -1`: no trace of Invoke's, and no fault."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [*PROGRAMS["weightsmith"], *words],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(write)

    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "left"), [("", True), ("n", True), ("y", False)])
def test_emptying_the_store_asks_on_a_terminal(tmp_path, answer, left):
    result = tmp_path / "results" / ("a" * 64)
    result.mkdir(parents=True)
    (result / "manifest.json").write_text('{"files": [{"size": 5}]}')
    ours, theirs = pty.openpty()
    os.write(ours, f"{answer}\n".encode())
    done = subprocess.run(
        [*PROGRAMS["weightsmith"], "clean"], cwd=ROOT, stdin=theirs, stderr=theirs,
        stdout=subprocess.PIPE, text=True, check=False,
        env={**os.environ, "WEIGHTSMITH_STORE": str(tmp_path)},
    )  # fmt: skip
    os.close(theirs)
    os.close(ours)

    assert (done.returncode, result.exists()) == (0, left), done.stdout


def test_a_closed_input_is_not_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)

    done = run("clean", WEIGHTSMITH_STORE=str(tmp_path / "store"))

    assert (done.code, done.out) == (0, "deleted 0 result(s), 0 B; kept 0 B\n")


def test_a_name_that_is_no_text_is_reported(tmp_path):
    words = ("--model", "examples/tiny/base", "--target", "llamacpp-f16", "--out", tmp_path / "out")

    done = run("render", *words, "--name", "\udcff")

    assert done.code == 2
    assert r"\udcff" in done.err
    assert not list(tmp_path.glob("out/*"))


def test_a_layout_has_a_folder_of_its_own(tmp_path):
    here = {"WEIGHTSMITH_CACHE": str(tmp_path / "cache"), "WEIGHTSMITH_STORE": str(tmp_path / "st")}
    words = ("--model", "examples/tiny/base", "--target", "vllm", "--kind", "volume")

    done = run("bake", *words, "--layout", "/", **here)

    assert done.code == 2
    assert "--layout /" in done.err


def test_a_folder_that_is_gone_is_reported(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    words = f"rmdir '{gone}'; exec {sys.executable} -m weightsmith plan --base {ROOT} --target vllm"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "toolchain")}
    done = subprocess.run(
        ["sh", "-c", words], cwd=gone, env=environment, capture_output=True, text=True, check=False
    )

    assert (done.returncode, "current folder was deleted" in done.stderr) == (5, True), done.stderr


@pytest.mark.parametrize("variable", ["WEIGHTSMITH_STORE", "WEIGHTSMITH_CACHE"])
@pytest.mark.parametrize("place", ["/proc/nosuch", "file", "file/below"])
def test_a_place_that_can_hold_no_folder_is_reported(tmp_path, monkeypatch, variable, place):
    (tmp_path / "file").touch()
    here = {"WEIGHTSMITH_CACHE": str(tmp_path / "cache"), "WEIGHTSMITH_STORE": str(tmp_path / "st")}
    here[variable] = str(tmp_path / place)  # an absolute one stays as it is
    merge = ("merge", "--base", "examples/tiny/base", "--adapter", "examples/tiny/adapters/a")

    done = run(*merge, "--out", str(tmp_path / "out"), "--runner", "local", **here)

    assert done.code == 5
    said, hint = done.err.split("hint: ")
    assert here[variable] in said
    assert variable in hint
    monkeypatch.setattr(checkup, "_ENOUGH_DISK", 1)  # what is free here is of no interest
    disk = run("doctor", "--json", **here)
    ok = json.loads(disk.out)["checks"]["disk"]["ok"]
    assert ok is (variable == "WEIGHTSMITH_CACHE")


def test_a_key_that_cannot_sign_is_reported_before_any_work(tmp_path):
    (tmp_path / "key.pem").write_text("no key")
    here = {"WEIGHTSMITH_CACHE": str(tmp_path / "cache"), "WEIGHTSMITH_STORE": str(tmp_path / "st")}
    recipe = ("--recipe", "examples/tiny/recipe.yaml", "--dist", str(tmp_path / "dist"))

    done = run(
        "build", *recipe, "--sign-key", str(tmp_path / "key.pem"), "--runner", "local", **here
    )

    assert done.code == 2
    assert "key.pem" in done.err
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "key.pem"]


@pytest.mark.parametrize("home", ["file", "loop", "a" * 5000])
def test_a_home_that_is_no_folder_is_reported(tmp_path, home):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    done = run("targets", "--json", HOME=str(tmp_path / home))

    assert done.code == 5
    assert json.loads(done.out)["error"]["hint"] == "set HOME"


@pytest.mark.slow
def test_a_home_that_cannot_be_made_is_needed_by_the_first_build_only(tmp_path, monkeypatch):
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "WEIGHTSMITH_CACHE", "WEIGHTSMITH_STORE"):
        monkeypatch.delenv(name, raising=False)
    recipe = ("--recipe", str(ROOT / "examples/tiny/recipe.yaml"))
    build = ("build", *recipe, "--runner", "local", "--dist", str(tmp_path))

    for words in (("targets",), ("doctor",), ("plan", *recipe)):
        assert run(*words, HOME="/proc/no-home").code == 0
    done = run(*build, HOME="/proc/no-home")

    assert done.code == 5
    assert done.err.splitlines()[-1].split() == [
        "hint:", "set", "WEIGHTSMITH_CACHE", "to", "a", "writable", "folder"
    ]  # fmt: skip


def test_the_machine_is_described(tmp_path):
    """Builders of either runner count: a build takes whichever is there."""
    done = run("doctor", "--json", WEIGHTSMITH_CACHE=str(tmp_path))

    assert done.code == 0
    checks = json.loads(done.out)["checks"]
    assert set(checks) >= {"engine", "gpu", "memory", "disk", "credentials", "builders", "jobs"}
    assert "local jobs" in checks["jobs"]["found"]
    assert "local: none" in checks["builders"]["found"]


@pytest.mark.slow
def test_a_result_that_cannot_be_written_is_reported():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [*PROGRAMS["weightsmith"], "targets", "--json"],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip

    assert done.returncode == 5
    assert done.stderr.startswith("error: cannot write the result: No space left on device")
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["2>&-", "2>/dev/full", "2>&- <&-"])
def test_nobody_listens_to_the_progress(tmp_path, closed):
    words = f"push oci:{tmp_path}/none --to 127.0.0.1:1/a:1 --json {closed}"
    done = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m weightsmith {words}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 3
    assert json.loads(done.stdout)["error"]["message"].endswith("it has no file 'oci-layout'")


def test_a_layout_is_written_where_references_to_it_lead(tmp_path, monkeypatch):
    """`oci:DIR` had been a folder of that whole name."""
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    place = f"oci:{write_model(tmp_path / 'model').with_name('out')}"
    words = ("--model", tmp_path / "model", "--target", "vllm", "--kind", "volume")
    done = run("bake", *words, "--layout", place, "--json")

    assert done.code == 0, done.err
    assert json.loads(done.out)["reference"] == place
    assert (tmp_path / "out" / "oci-layout").is_file()


@pytest.mark.parametrize("words", [("bake",), ("build",), ("plan",)])
def test_a_layout_that_is_written_has_no_name_of_its_own(tmp_path, words):
    """`oci:DIR:NAME` had been a folder of that whole name."""
    model = write_model(tmp_path / "model")
    bake = ("--model", model, "--kind", "volume")
    given = bake if words == ("bake",) else ("--base", model, "--runner", "local")

    done = run(*words, *given, "--target", "vllm", "--layout", f"oci:{tmp_path}/out:1.0", "--json")

    assert done.code == 2
    error = json.loads(done.out)["error"]
    assert error["message"].startswith(f"--layout oci:{tmp_path}/out:1.0: ")
    assert f"give oci:{tmp_path}/out:" in error["hint"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def flags(command):
    return {argument.name for argument in namespace[command].get_arguments()}


def test_a_plan_takes_the_flags_of_the_build_that_it_foresees():
    """All but those of an image that is built again, whose recipe has to be fetched first."""
    assert flags("build") - flags("plan") == {"from_", "key"}
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


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "a" * 5000),
        ("verify", "a:" * 3000),
        ("plan", "--recipe", "a" * 300),
        ("evaluate", "--url", "http://127.0.0.1:9", "--data", "a" * 300),
        ("render", "--model", "a" * 300, "--target", "vllm", "--out", "x"),
    ],
    ids=lambda words: words[0],
)
def test_a_path_that_is_too_long_is_a_wrong_use(words):
    done = run(*words)

    assert done.code in (2, 3), done.err
    assert "hint: " in done.err


@pytest.mark.parametrize(
    "words",
    [
        ("bake", "--model", "base", "--target", "vllm", "--kind", "volume", "--layout", "loop"),
        ("render", "--model", "base", "--target", "vllm", "--out", "loop"),
        ("merge", "--base", "base", "--adapter", "base", "--out", "loop", "--runner", "local"),
        ("build", "--base", "base", "--target", "vllm", "--dist", "loop", "--runner", "local"),
    ],
    ids=lambda words: words[0],
)
def test_links_in_a_circle_are_a_wrong_use(tmp_path, words):
    (tmp_path / "loop").symlink_to("loop")
    places = {"loop": tmp_path / "loop", "base": write_model(tmp_path / "base")}

    done = run(*(places.get(word, word) for word in words))

    assert done.code == 2, done.err
    assert f"{tmp_path}/loop: symbolic links lead in a circle" in done.err
    assert "correct the symbolic links" in done.err


@pytest.mark.parametrize("variable", ["WEIGHTSMITH_STORE", "WEIGHTSMITH_CACHE"])
def test_a_place_that_links_to_itself_is_reported(tmp_path, variable):
    (tmp_path / "loop").symlink_to("loop")
    here = {"WEIGHTSMITH_CACHE": str(tmp_path / "cache"), "WEIGHTSMITH_STORE": str(tmp_path / "st")}
    model = write_model(tmp_path / "base")
    words = ("bake", "--model", model, "--target", "vllm", "--kind", "volume")

    done = run(*words, "--layout", tmp_path / "x", **here | {variable: str(tmp_path / "loop")})

    assert done.code in (2, 5), done.err
    assert "hint: " in done.err
    assert "bug" not in done.err


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--recipe", "/dev/zero"),
        ("fleet", "--plan", "--file", "/dev/zero"),
        ("push", "oci:none", "--to", "127.0.0.1:9/a:1", "--sign-key", "/dev/zero"),
        ("evaluate", "--url", "http://127.0.0.1:9", "--data", "/dev/zero"),
        ("evaluate", "--data", "DATA", "--url", "http://127.0.0.1:9", "--training", "/dev/zero"),
        ("quantize", "--model", "BASE", "--out", "OUT", "--calibration", "/dev/zero"),
    ],
    ids=lambda words: f"{words[0]} {words[-2]}",
)
def test_a_file_that_never_ends_is_refused(tmp_path, words):
    """It had filled the memory, or been read for ever."""
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "expected": "b"}\n')
    places = {"DATA": tmp_path / "data.jsonl", "OUT": tmp_path / "out"}
    places["BASE"] = write_model(tmp_path / "base")
    given = [str(places.get(word, word)) for word in words]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -v 4000000; exec "$@"', "sh", *PROGRAMS["weightsmith"], *given],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode in (2, 3), done.stderr
    assert "/dev/zero" in done.stderr


def test_results_go_into_a_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    model = write_model(tmp_path / "base")

    done = run("render", "--model", model, "--target", "vllm", "--out", tmp_path / "file")

    assert (done.code, (tmp_path / "file").read_text()) == (2, "mine")
    assert "file is not a folder" in done.err


@pytest.mark.parametrize("value", ["1", "[]", "x", "null"])
def test_a_section_that_is_no_mapping_is_refused(tmp_path, value):
    model = write_model(tmp_path / "base")
    words = ("render", "--model", model, "--target", "vllm", "--out", tmp_path / "out")

    done = run(*words, "--set", f"serve={value}")

    assert done.code == 2, done.err
    assert "serve" in done.err
