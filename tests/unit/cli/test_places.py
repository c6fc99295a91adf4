"""Files and folders that users name: too long, gone, endless, in a circle, not writable."""

import json
import os
import subprocess
import sys

import pytest
from weightsmith.outside import checkup

from tests.fakes.command_line import PROGRAMS, ROOT, run, started
from tests.fakes.tiny import write_model

RECIPE = ("--recipe", "examples/tiny/recipe.yaml", "--bench-results")
TINY = ("--model", "examples/tiny/base", "--target", "vllm")
SERVER = "http://127.0.0.1:9"
NOBODY = "~nobody-of-this-name"
# `Path.is_dir` of a name that is too long raises OSError before Python 3.14.
TOO_LONG = 2 if sys.version_info < (3, 14) else 3


@pytest.fixture(autouse=True)
def own_places(tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTSMITH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("WEIGHTSMITH_STORE", str(tmp_path / "store"))


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("bake", *TINY, "--kind", "volume", "--layout", "/"), 2, "--layout /"),
        (("inspect", ""), 2, "is empty"),
        (("inspect", " "), 2, "is empty"),
        (("verify", ""), 2, "is empty"),
        (("affected", "--in", ""), 2, "--in is empty"),
        (("push", "a", "--to", " "), 2, "is empty"),
        (("report", "--compare", "\t"), 2, "is empty"),
        (("merge", "--base", "a", "--adapter", "", "--out", "b"), 2, "is empty"),
        (("inspect", "examples"), 3, "not an OCI layout"),
        (("verify", "oci:examples"), 3, "not an OCI layout"),
        (("inspect", "./README.md"), 3, "not an OCI layout"),
        (("inspect", "ghcr.io/Team/App"), 2, "must be lower case"),
        (("verify", "a", "--key", f"{NOBODY}/key.pem"), 2, "has no home folder"),
        (("cache", "stat", "--cache", f"{NOBODY}/cache"), 2, "has no home folder"),
        (("plan", "--base", f"{NOBODY}/base", "--target", "vllm"), 2, "has no home folder"),
        (("plan", *RECIPE, "none.json"), 2, "--bench-results none.json cannot be read"),
        (("build", *RECIPE, "README.md"), 3, "--bench-results README.md: it is no valid JSON"),
        (("build", *RECIPE, "examples/tiny/base/config.json"), 3, "no `time_to_first_token`"),
        (
            ("plan", *RECIPE, "x.json", "--target", "vllm", "--target", "llamacpp-q8_0"),
            2,
            "--bench-results is about one image, and this build makes 2",
        ),
        *(
            (
                (command, *RECIPE, "x.json", "--target", "auto", *more),
                2,
                "which one auto chooses is not known yet",
            )
            for command in ("plan", "build")
            for more in ((), ("--target", "vllm"))
        ),
        (("validate", "--merged", f"{NOBODY}/a", "--base", "b", "--adapter", "c"), 2, "no home"),
        (("inspect", "a" * 5000), 2, "hint: "),
        (("verify", "a:" * 3000), 2, "hint: "),
        (("plan", "--recipe", "a" * 300), 2, "hint: "),
        (("evaluate", "--url", SERVER, "--data", "a" * 300), 2, "hint: "),
        (("render", "--model", "a" * 300, "--target", "vllm", "--out", "x"), TOO_LONG, "hint: "),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else None,
)
def test_a_name_of_no_place(words, code, says):
    done = run(*words)

    assert (done.code, says in done.err) == (code, True), done.err


@pytest.mark.parametrize(
    "place", ["./outt", "/nowhere/outt", "~/outt", "outt/", "outt/Big/1", "oci:outt", "../outt:1.0"]
)
@pytest.mark.parametrize(
    "words",
    [
        ("inspect", "{}"),
        ("verify", "{}"),
        ("push", "{}", "--to", "127.0.0.1:1/a"),
        ("bench", "--image", "{}"),
        ("bake", *TINY, "--base-image", "{}", "--layout", "/tmp/never"),
    ],
)
def test_a_mistyped_folder_is_not_asked_of_a_registry(place, words):
    done = run(*(word.format(place) for word in words))

    assert (done.code, "does not exist" in done.err) == (3, True), done.err
    assert "outt" in done.err


@pytest.mark.slow
@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_names_are_read_where_python_was_told_to_expect_ascii(tmp_path, program):
    """As the tool, run by a job of CI without a locale, is; Invoke reads our code too late."""
    model = write_model(tmp_path / "mödel")
    recipe = tmp_path / "récipe.yaml"
    base = {"source": f"./{model.name}"}
    recipe.write_text(json.dumps({"name": "a", "version": "1", "base": base, "targets": ["vllm"]}))

    done = started(program, "plan", "--recipe", str(recipe), LC_ALL="C", PYTHONUTF8="0")

    assert "Traceback" not in done.err
    assert done.code == (0 if program == "weightsmith" else 3), done.err
    assert ("set LC_ALL=C.UTF-8" in done.err) == (program == "invoke")


def test_a_home_folder_in_quotes_is_the_users(tmp_path, monkeypatch):
    """A shell expands no ~ in quotes or after `=`, and a CI's settings have no shell."""
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    write_model(home / "model")
    (home / "config.yaml").write_text("cache: ~/shared")
    places = {"HOME": str(home), "WEIGHTSMITH_CONFIG": "~/config.yaml"}
    places |= {"WEIGHTSMITH_HOME": "~/cache", "WEIGHTSMITH_STORE": "~/store"}
    base = ("--base", "~/model", "--target", "vllm", "--update-lock")

    assert run("plan", *base, "--dist=~/dist", **places).code == 0
    done = run("render", "--model=~/model", "--target", "vllm", "--out=~/settings", **places)

    assert done.code == 0, done.err
    made = {path.name for path in home.iterdir()}
    assert made >= {"store", "settings"}
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


@pytest.mark.parametrize("variable", ["WEIGHTSMITH_STORE", "WEIGHTSMITH_HOME"])
def test_a_home_folder_of_nobody_is_reported(variable):
    done = run("plan", "--base", "examples/tiny/base", "--target", "vllm", **{variable: NOBODY})

    assert (done.code, "has no home folder" in done.err) == (2, True), done.err


@pytest.mark.root
@pytest.mark.slow
def test_a_machine_without_proc_plans():
    words = [sys.executable, "-m", "weightsmith", "plan", "--recipe", RECIPE[1]]
    hidden = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh", *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "toolchain")}
    done = subprocess.run(
        hidden, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if "weightsmith" not in done.stderr and done.returncode and "mount" in done.stderr:
        pytest.skip(f"mounts are not allowed here: {done.stderr}")

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("action", ["stat", "pull", "push", "prune"])
def test_a_file_is_no_cache(tmp_path, action):
    (tmp_path / "file").touch()
    done = run("cache", action, "--cache", str(tmp_path / "file"), "--keep", "1GiB")

    assert (done.code, "it is not a folder" in done.err) == (2, True), done.err


def test_a_cache_below_a_folder_that_is_not_mounted_is_reported(tmp_path):
    done = run("cache", "stat", "--cache", str(tmp_path / "share" / "cache"))

    assert (done.code, "cannot be used" in done.err) == (5, True), done.err


def test_a_folder_that_is_gone_is_reported(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    words = f"rmdir '{gone}'; exec {sys.executable} -m weightsmith plan --base {ROOT} --target vllm"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "toolchain")}
    done = subprocess.run(
        ["sh", "-c", words], cwd=gone, env=environment, capture_output=True, text=True, check=False
    )

    assert (done.returncode, "current folder was deleted" in done.stderr) == (5, True), done.stderr


@pytest.mark.parametrize("variable", ["WEIGHTSMITH_STORE", "WEIGHTSMITH_HOME"])
@pytest.mark.parametrize("place", ["/proc/nosuch", "file", "file/below"])
def test_a_place_that_can_hold_no_folder_is_reported(tmp_path, monkeypatch, variable, place):
    (tmp_path / "file").touch()
    here = {variable: str(tmp_path / place)}  # an absolute one stays as it is
    merge = ("merge", "--base", "examples/tiny/base", "--adapter", "examples/tiny/adapters/a")

    done = run(*merge, "--out", str(tmp_path / "out"), "--runner", "local", **here)

    assert done.code == 5
    said, hint = done.err.split("hint: ")
    assert here[variable] in said
    assert variable in hint
    monkeypatch.setattr(checkup, "_ENOUGH_DISK", 1)  # what is free here is of no interest
    disk = run("doctor", "--json", **here)
    ok = json.loads(disk.out)["checks"]["disk"]["ok"]
    assert ok is (variable == "WEIGHTSMITH_HOME")


def test_a_key_that_cannot_sign_is_reported_before_any_work(tmp_path):
    (tmp_path / "key.pem").write_text("no key")
    recipe = ("--recipe", "examples/tiny/recipe.yaml", "--dist", str(tmp_path / "dist"))
    done = run("build", *recipe, "--sign-key", str(tmp_path / "key.pem"), "--runner", "local")

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
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "WEIGHTSMITH_HOME", "WEIGHTSMITH_STORE"):
        monkeypatch.delenv(name, raising=False)
    recipe = ("--recipe", str(ROOT / "examples/tiny/recipe.yaml"))
    build = ("build", *recipe, "--runner", "local", "--dist", str(tmp_path))

    for words in (("targets",), ("doctor",), ("plan", *recipe)):
        assert run(*words, HOME="/proc/no-home").code == 0
    done = run(*build, HOME="/proc/no-home")

    assert done.code == 5
    assert done.err.splitlines()[-1].split() == [
        "hint:", "set", "WEIGHTSMITH_HOME", "to", "a", "writable", "folder"
    ]  # fmt: skip


def test_a_layout_is_written_where_references_to_it_lead(tmp_path, monkeypatch):
    """`oci:DIR` had been a folder of that whole name."""
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


@pytest.mark.parametrize("variable", ["WEIGHTSMITH_STORE", "WEIGHTSMITH_HOME"])
def test_a_place_that_links_to_itself_is_reported(tmp_path, variable):
    (tmp_path / "loop").symlink_to("loop")
    words = ("bake", *TINY, "--kind", "volume", "--layout", tmp_path / "x")
    done = run(*words, **{variable: str(tmp_path / "loop")})

    assert done.code in (2, 5), done.err
    assert "hint: " in done.err
    assert "bug" not in done.err


@pytest.mark.parametrize(
    "words",
    [
        ("plan", "--recipe", "/dev/zero"),
        *(
            pytest.param(words, marks=pytest.mark.slow)
            for words in (
                ("fleet", "--plan", "--file", "/dev/zero"),
                ("push", "oci:none", "--to", "127.0.0.1:9/a:1", "--sign-key", "/dev/zero"),
                ("evaluate", "--url", SERVER, "--data", "/dev/zero"),
                ("evaluate", "--data", "DATA", "--url", SERVER, "--training", "/dev/zero"),
                ("quantize", "--model", "BASE", "--out", "OUT", "--calibration", "/dev/zero"),
            )
        ),
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

    done = run("render", *TINY, "--out", tmp_path / "file")

    assert (done.code, (tmp_path / "file").read_text()) == (2, "mine")
    assert "file is not a folder" in done.err
