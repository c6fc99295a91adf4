"""`import weightsmith`: every documented example runs, and nothing is loaded before it is used."""

from __future__ import annotations

import doctest
import inspect
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import weightsmith
from weightsmith.building import progress as shows
from weightsmith.building import wiring
from weightsmith.cli import namespace
from weightsmith.core.ports import Progress
from weightsmith.oci.registry import Registry
from weightsmith.recipe.user_config import RunOptions, WantedIdentity
from weightsmith.steps.tools import Tools

from tests.fakes.baking import push_base
from tests.fakes.fleet import MemoryFleet, by_tools
from tests.fakes.jobs import Bench, Minds
from tests.fakes.launcher import MemoryLauncher
from tests.fakes.memory import memory_tools
from tests.fakes.registry import fake_registry
from tests.paths import ROOT
from tests.unit.test_docs import CACHE, blocks

TINY = ROOT / "examples" / "tiny"
PAGE = "docs/reference/python.md"
FUNCTIONS = (
    "merge", "validate", "quantize", "render", "bake", "inspect", "verify", "plan", "build",
    "evaluate", "prove", "push", "affected", "rebase", "fleet",
)  # fmt: skip
"""In an order in which each example finds what it reads."""


@pytest.fixture
def client() -> Iterator[Registry]:
    with Registry(pause=lambda _: None) as made:
        yield made


@pytest.fixture
def registry(client: Registry, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The host of a registry that holds another engine base."""
    with fake_registry() as fake:
        labels = {"dev.weightsmith.engine": "llamacpp"}
        push_base(client, f"{fake.host}/engines/llamacpp:2", labels, {"app/llama-server": b"2"})

        @contextmanager
        def make_registry(**_more: Any) -> Iterator[Registry]:
            yield client

        monkeypatch.setattr(wiring, "make_registry", make_registry)
        yield fake.host


@pytest.fixture
def tools(tmp_path: Path, client: Registry, monkeypatch: pytest.MonkeyPatch) -> Tools:
    """A notebook's folder, and everything outside it in memory; merges are real ones."""
    rows = map(json.loads, (TINY / "eval-a.jsonl").read_text().splitlines())
    minds = Minds({row["prompt"]: ("a", row["expected"]) for row in rows})
    bench = Bench(base=TINY / "base", minds=minds)
    (tmp_path / "memory").mkdir()
    made = memory_tools(tmp_path / "memory", bench.stages, client)
    answer = partial(minds.answer, "image", ("a",))
    launcher = MemoryLauncher(made.engine, lambda question, _adapter: answer(question))
    made = replace(made, launcher=launcher, make_engine_files=_write_healthcheck)

    @contextmanager
    def open_tools(run: RunOptions, progress: Progress, **_more: Any) -> Iterator[Tools]:
        yield replace(made, progress=progress)

    monkeypatch.setattr(wiring, "open_tools", open_tools)
    monkeypatch.setattr(wiring, "make_engine", lambda: made.engine)
    nodes = MemoryFleet(by_tools(made))
    monkeypatch.setattr(wiring, "make_fleet_engine", lambda *_: nodes)
    monkeypatch.setenv("WEIGHTSMITH_HOME", str(tmp_path / "memory"))
    monkeypatch.delenv("WEIGHTSMITH_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return made


def _write_healthcheck(_engine: str, _platform: str, folder: Path, _progress: Progress) -> None:
    (folder / "healthcheck").write_bytes(b"a program")


def merge(out: str = "merged", **options: Any) -> weightsmith.Merged:
    return weightsmith.merge(TINY / "base", TINY / "adapters/a", out, progress=False, **options)


@pytest.mark.slow
def test_every_function_has_an_example_and_all_run(tools: Tools, registry: str) -> None:
    names: dict[str, Any] = {"weightsmith": weightsmith, "registry": registry}
    for name in FUNCTIONS:
        text = getattr(weightsmith, name).__doc__
        example = doctest.DocTestParser().get_doctest(text, names, name, None, None)
        assert example.examples, name
        assert "Raises " in text, name
        runner = doctest.DocTestRunner(verbose=False)
        runner.run(example, clear_globs=False)
        assert runner.summarize(verbose=False).failed == 0, name
        names = example.globs


def test_a_merge_is_a_value_with_types(tools: Tools) -> None:
    merged = merge(weights=[0.5])

    assert merged.shards[0].path.stat().st_size == merged.shards[0].size
    assert merged.tensors["merged"] > 0
    assert tools.runner.jobs[0].weights == (0.5,)


RECIPE = {"name": "x", "base": {"source": "base"}, "targets": ["llamacpp-q8_0"]}
ASKED: Mapping[str, tuple[Any, ...]] = {
    "merge": ("base", "adapter", "out"),
    "validate": ("base", "adapter", "merged"),
    "quantize": ("model", "out"),
    "bake": ("model", "vllm"),
    "rebase": ("x/y:1", "x/engine:2", "x/y:2"),
    "plan": (RECIPE,),
    "build": (RECIPE,),
    "evaluate": ("questions.jsonl",),
    "prove": ("x/y:1",),
    "fleet": ({"recipe": str(TINY / "recipe.yaml"), "adapters": [str(TINY / "adapters/a")]},),
}
"""What each function that runs anything must be given."""


@pytest.mark.parametrize("name", ASKED)
def test_options_of_running_arrive(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Seen(Exception):
        pass

    def open_tools(run: RunOptions, _progress: Progress, **_more: Any) -> Any:
        raise Seen(run)

    monkeypatch.setattr(wiring, "open_tools", open_tools)
    monkeypatch.setattr(wiring, "keep_clean", lambda *_, **_more: None)
    monkeypatch.chdir(tmp_path)
    every = {key: True if value is False else key for key, value in asdict(RunOptions()).items()}
    every["cache"] = every["cache_from"] = str(tmp_path / "cache")
    function = getattr(weightsmith, name)
    given = {key: every[key] for key in every.keys() & inspect.signature(function).parameters}

    with pytest.raises(Seen) as caught:
        function(*ASKED[name], **given)

    assert caught.value.args == (RunOptions(**given),)


def test_every_command_has_its_function_or_a_reason_why_not() -> None:
    rows = re.findall(r"^\| no (.*?) \| \S", (ROOT / PAGE).read_text("utf-8"), re.MULTILINE)
    without = {name for row in rows for name in re.findall(r"`(\w+)`", row)}

    assert {*FUNCTIONS} <= {*weightsmith.__all__}
    assert {*namespace.task_names} == {*FUNCTIONS} | without
    assert not {*FUNCTIONS} & without


IN_PYTHON = {
    "adapter": "adapters", "target": "targets", "platforms": "platform",
    "keep_module": "keep", "tensor_type": "tensor_types", "key": "keys",
}  # fmt: skip
"""Flags whose keyword has another name: it takes several or one, or is the recipe's key."""
THE_RECIPES = {"base", "adapter", "kind", "allow_low_bits", "allow_text_only", "gpu", "gpu_memory",
               "gpu_count", "max_model_len", "max_num_seqs", "sbom"}  # fmt: skip
"""Flags that write a recipe, or a key of one: a caller has the recipe itself."""
FLAGS_ALONE = {
    "merge": {"keep_adapter"},
    "evaluate": {"tasks", "tokenizer", "include"},
    "build": {"from_", "key", *asdict(WantedIdentity()), *THE_RECIPES},
    "plan": {"push", "load", "layout", "force", *THE_RECIPES},
    "fleet": {"plan", "print_", "watch"},
}
"""What the page says is left out, and why."""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_flag_has_its_keyword_with_the_same_default(name: str) -> None:
    keywords = inspect.signature(getattr(weightsmith, name)).parameters
    flags = dict(inspect.signature(namespace[name].body).parameters)
    del flags["context"], flags["json"]
    named = {flag: flag if flag in keywords else IN_PYTHON.get(flag, flag) for flag in flags}

    def shown(default: object) -> str:
        return "" if default in (None, 0, "0", (), inspect.Parameter.empty) else str(default)

    assert {flag for flag in flags if named[flag] not in keywords} == FLAGS_ALONE.get(name, set())
    assert keywords.keys() & asdict(RunOptions()).keys() <= flags.keys()
    for flag in flags.keys() - FLAGS_ALONE.get(name, set()):
        said = keywords[named[flag]].default
        if said is not inspect.Parameter.empty:  # it must be given, as the command says in words
            assert shown(said) == shown(flags[flag].default), flag


@pytest.mark.parametrize(
    "options", [{"method": "mean"}, {"weights": [1, 2]}, {"density": 2.0}, {"out": TINY / "base"}]
)
def test_what_does_not_fit_is_refused_before_any_job(tools: Tools, options: Any) -> None:
    with pytest.raises(weightsmith.UsageError) as caught:
        merge(**options)

    assert caught.value.hint
    assert isinstance(caught.value, weightsmith.WeightsmithError)
    assert tools.runner.jobs == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"image": "oci:image", "url": "http://localhost"}, "exactly one"),
        ({"model": TINY / "base", "metric": "rouge"}, "metric"),
        ({"model": TINY / "base", "metric": "command"}, "needs a `command`"),
        ({"model": TINY / "base", "max_drop": 2}, "max_drop"),
        ({"model": TINY / "base", "served_name": "x"}, "--served-name is a model's name on a"),
        ({"model": TINY / "base", "concurrency": 0}, "concurrency"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(tools: Tools, options: Any, says: str) -> None:
    with pytest.raises(weightsmith.UsageError, match=says):
        weightsmith.evaluate(TINY / "eval-a.jsonl", progress=False, **options)

    assert tools.runner.jobs == []


def test_a_score_too_low_is_a_failed_check(tools: Tools) -> None:
    with pytest.raises(weightsmith.CheckFailed, match="below the minimum score"):
        weightsmith.evaluate(
            TINY / "eval-a.jsonl", model=TINY / "base", min_score=0.9, progress=False
        )


@pytest.mark.parametrize(
    "options", [{"public": True}, {"to": "hf://a/b", "signature_format": "bundle"}]
)
def test_an_option_of_the_other_kind_of_push_is_refused(tools: Tools, options: Any) -> None:
    with pytest.raises(weightsmith.UsageError):
        weightsmith.push("oci:image", **{"to": "localhost:5000/x", "progress": False, **options})


def test_a_failed_validation_has_its_findings(tools: Tools) -> None:
    merge()
    finding = {"severity": "error", "check": "logits", "message": "off", "tensor": "", "layer": 3}
    wrong = {"passed": False, "seconds": 1.0, "findings": [finding]}
    tools.runner.stages = {"validate": lambda job, report: wrong}

    with pytest.raises(weightsmith.CheckFailed) as caught:
        weightsmith.validate(TINY / "base", TINY / "adapters/a", "merged", progress=False)

    assert caught.value.details["findings"] == wrong["findings"]


def test_a_recipe_is_a_file_a_mapping_or_a_recipe(tools: Tools) -> None:
    data = {"name": "x", "base": {"source": "examples/tiny/base"}, "targets": ["llamacpp-q8_0"]}

    for given in (data, weightsmith.Recipe.model_validate(data)):
        found = weightsmith.plan(given, set=["version=2.0.0"])
        assert found["version"] == "2.0.0"
        assert list(found["serving"]) == ["llamacpp-q8_0"]
    assert list(weightsmith.plan(data, targets="vllm", set="serve.memory=8GiB")["serving"]) == [
        "vllm"
    ]
    with pytest.raises(weightsmith.UsageError, match="did you mean `targets`"):
        weightsmith.plan({**data, "target": []})


def test_it_works_off_the_main_thread_and_leaves_signals_alone(tools: Tools) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGVTALRM)
    before = [signal.getsignal(number) for number in numbers]
    found: list[weightsmith.Merged] = []
    thread = threading.Thread(target=lambda: found.append(merge("one")))
    thread.start()
    thread.join()
    merge("two")

    assert found[0].path.is_dir()
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_bar_is_taken_away_when_a_job_fails(
    tools: Tools, monkeypatch: pytest.MonkeyPatch
) -> None:
    bar = shows.LiveProgress()
    monkeypatch.setattr(shows, "progress_for", lambda: bar)
    tools.runner.stages = {}

    with pytest.raises(weightsmith.WeightsmithError):
        weightsmith.merge(TINY / "base", TINY / "adapters/a", "merged")

    assert bar._task is None
    assert not bar._bars.live.is_started


def test_a_notebook_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    assert isinstance(shows.progress_for(), shows.PlainProgress)
    monkeypatch.setitem(sys.modules, "IPython", object())
    monkeypatch.setattr(Console, "is_jupyter", True, raising=False)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert isinstance(shows.progress_for(), shows.LiveProgress)


def test_nothing_is_loaded_before_it_is_used() -> None:
    code = (
        "import sys; before = set(sys.modules); import weightsmith; dir(weightsmith)\n"
        "print(*(set(sys.modules) - before))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert found.stdout.split() == ["weightsmith"]


def test_every_public_name_is_there_and_no_other() -> None:
    for name in weightsmith.__all__:
        assert getattr(weightsmith, name).__doc__, name
    assert set(weightsmith.__all__) < set(dir(weightsmith))
    with pytest.raises(AttributeError, match="no attribute 'marge'"):
        weightsmith.marge  # noqa: B018
    assert (Path(weightsmith.__file__).parent / "py.typed").is_file()


def test_the_page_lists_every_public_name() -> None:
    named = set(re.findall(r"`(\w+)[`(]", (ROOT / PAGE).read_text("utf-8")))

    assert set(weightsmith.__all__) <= named


@pytest.mark.full  # the commands that call the same are run by other tests
@pytest.mark.builders
@pytest.mark.timeout(3600)
def test_the_page_runs(tmp_path: Path, shared_store: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    code = "".join(b.text for b in blocks() if b.page == PAGE and b.language == "python")
    environment = {
        **os.environ,
        "WEIGHTSMITH_HOME": str(CACHE),
        "WEIGHTSMITH_STORE": str(shared_store),
        "DOCKER_HOST": f"unix://{tmp_path}/no-engine.sock",
    }

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
