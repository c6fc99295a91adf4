"""Nobody attacks: the user puts a secret, a folder or a file where it should not be."""

from __future__ import annotations

import json
import re
import time
from contextlib import chdir
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import weightsmith as library
from weightsmith.building.record import Record
from weightsmith.building.wiring import keep_clean
from weightsmith.core import time_limits
from weightsmith.core.errors import UsageError
from weightsmith.core.ports import Silent
from weightsmith.core.values import (
    AdapterSnapshot,
    Checkpoint,
    Digest,
    FileEntry,
    Snapshot,
    Sources,
    Tree,
    without_passwords,
)
from weightsmith.evaluating import metrics
from weightsmith.evaluating.gate import foreign_faults
from weightsmith.evaluating.items import Item
from weightsmith.evaluating.metrics import check_metric, score_answers
from weightsmith.oci.references import Reference
from weightsmith.provenance.attest import public_recipe
from weightsmith.recipe.file import RecipeFile, check_recipe
from weightsmith.steps.stage_result import unrecorded
from weightsmith.steps.step import Results, Step
from weightsmith.steps.tools import NO_LIMIT

from tests.fakes.command_line import weightsmith

# Folders that are read: nothing is made in them, not for a moment.


def refused(folder: Path, command: str, words: dict[str, Any]) -> str:
    """Run a command that must end before anything is made; return what it says."""
    before = watched(folder)
    flags = [
        (f"--{name.strip('_').replace('_', '-')}", one)
        for name, value in words.items()
        for one in (value if isinstance(value, list) else [value])
    ]
    ended = weightsmith(command, *chain(*flags))
    assert ended.code == 2, ended.err
    assert watched(folder) == before
    return ended.err


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, an adapter and more, and two links that lead into the base."""
    for variable in ("HOME", "STORE"):
        monkeypatch.setenv(f"WEIGHTSMITH_{variable}", str(tmp_path / variable))
    for name in ("base/sub", "base/empty", "adapter", "merged"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "base" / "empty" / "config.json").unlink()
    (tmp_path / "way").symlink_to(tmp_path / "base")
    (tmp_path / "empty").symlink_to(tmp_path / "base" / "empty")
    (tmp_path / "base" / "out").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def watched(folder: Path) -> dict[str, int]:
    """Return when each folder below changed last: what was made and deleted again shows, too."""
    return {str(path): path.stat().st_mtime_ns for path in [folder, *folder.glob("**/")]}


OUTPUTS = {"out", "keep_adapter", "layout", "dist"}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        *(
            ("merge", {"base": "base", "adapter": ["adapter"], "out": out})
            for out in ("base/new", "base/sub/new", "way/new", "empty", "base/out", "adapter/new")
        ),
        ("merge", {"base": "way", "adapter": ["adapter"], "out": "base/new"}),
        ("merge", {"base": "base", "adapter": ["adapter"], "keep_adapter": "adapter/new"}),
        ("quantize", {"model": "base", "out": "base/model.gguf"}),
        ("quantize", {"model": "base", "out": "way/sub/model.gguf"}),
        ("render", {"model": "base", "target": "vllm", "out": "base/serving"}),
        ("render", {"model": "base", "target": "vllm", "out": "base"}),
        ("bake", {"model": "base", "target": "vllm", "layout": "base/image"}),
        ("bake", {"model": "merged", "target": "vllm", "layout": "way/image", "config": "base"}),
        ("build", {"base": "base", "adapter": ["adapter"], "layout": "base/image"}),
        ("build", {"base": "base", "adapter": ["adapter"], "dist": "adapter/dist"}),
        ("build", {"from_": "oci:image", "base": "base", "dist": "base/dist"}),
    ],
)
def test_an_output_in_a_folder_that_is_read(read, command, words):
    """The output is put into an input, or a link leads there: refused before anything is made."""
    *_, (name, out) = ((n, o) for n, o in words.items() if n in OUTPUTS)
    assert f"--{name.replace('_', '-')} {out}" in refused(read, command, words)


@pytest.mark.parametrize(
    ("out", "keep_adapter"), [("new/model", "new"), ("new", "new/adapter"), ("new", "new")]
)
def test_an_output_in_another_output(read, out, keep_adapter):
    words = {"base": "base", "adapter": ["adapter"], "out": out, "keep_adapter": keep_adapter}
    assert "give each its own folder" in refused(read, "merge", words)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("build", {"base": "base", "adapter": ["adapter"]}),
        ("build", {"from_": "oci:image"}),
        ("plan", {"base": "base", "adapter": ["adapter"]}),
        ("fleet", {}),
    ],
)
def test_results_without_a_folder(read, command, words):
    """A variable that is not set is an empty text, not the current folder."""
    assert "missing: --dist" in refused(read, command, {**words, "dist": ""})


@pytest.mark.parametrize("place", ["", "a\0b"])
def test_functions_take_no_path_that_is_none(read, place):
    recipe = {"name": "x", "base": {"source": "base"}, "targets": ["vllm"]}
    calls = [
        lambda: library.build(recipe, dist=place),
        lambda: library.plan(recipe, dist=place),
        lambda: library.merge(place, ["adapter"], "new"),
        lambda: library.merge("base", [place], "new"),
        lambda: library.merge("base", ["adapter"], place),
        lambda: library.render("base", "vllm", out=place),
    ]
    for call in calls:
        with pytest.raises(UsageError, match="no path"):
            call()


def test_a_key_that_nothing_is_checked_with(read):
    assert "--from" in refused(read, "build", {"base": "base", "key": "key.pub"})


NAMES = ("Team/Model", "localhost:5000/team/model:1.0", f"model@sha256:{'0' * 64}")


@pytest.mark.parametrize("command", ["plan", "build"])
@pytest.mark.parametrize(
    ("setting", "said"),
    [
        # Labels of ours say what was found out; a recipe must not say it instead.
        ("image.labels.dev.weightsmith.verdict=passed", "dev.weightsmith.verdict"),
        # No registry takes these, or they have a tag: it would be refused when all work is done.
        *((f"image.repository={name}", name) for name in NAMES),
    ],
)
def test_a_name_or_label_that_no_image_may_have(read, command, setting, said):
    assert said in refused(read, command, {"base": "base", "target": "vllm", "set": [setting]})


READERS = [
    ("merge", {"base": "base", "adapter": ["adapter"], "out": "new"}),
    ("validate", {"base": "base", "adapter": ["adapter"], "merged": "merged"}),
    ("quantize", {"model": "base", "out": "new"}),
    ("bake", {"model": "base", "target": "vllm", "layout": "image"}),
    ("evaluate", {"model": "base", "data": "eval.jsonl"}),
    ("build", {"base": "base"}),
    ("plan", {"base": "base"}),
]
"""Commands that read folders and use a shared cache."""


@pytest.mark.parametrize(("command", "words"), READERS)
def test_a_shared_cache_in_a_folder_that_is_read(read, command, words, monkeypatch):
    """The cache's folder is named by --cache or by the configuration."""
    assert "--cache" in refused(read, command, {**words, "cache": "base/shared"})
    (read / "config.yaml").write_text(f"cache: {read / 'base' / 'shared'}\n")
    monkeypatch.setenv("WEIGHTSMITH_CONFIG", str(read / "config.yaml"))
    assert "--cache" in refused(read, command, words)
    keep_clean(["base"], cache="base/.shared")
    keep_clean(["base"], cache="oci://127.0.0.1:5000/base")
    keep_clean(["base"], cache="off")


@pytest.mark.parametrize("variable", ["WEIGHTSMITH_HOME", "WEIGHTSMITH_STORE"])
@pytest.mark.parametrize(
    ("command", "words"),
    [*READERS, ("render", {"model": "base", "target": "vllm", "out": "new"})],
)
def test_a_store_or_cache_in_a_folder_that_is_read(read, variable, command, words, monkeypatch):
    """WEIGHTSMITH_STORE or WEIGHTSMITH_HOME names a folder of the base's own folder."""
    monkeypatch.setenv(variable, str(read / "base" / "cache"))
    assert variable in refused(read, command, words)


@pytest.mark.parametrize("variable", ["WEIGHTSMITH_HOME", "WEIGHTSMITH_STORE"])
def test_a_hidden_store_or_cache_in_a_folder_that_is_read(read, variable, monkeypatch):
    """In CI, an adapter's repository is built from its root, and caches lie in the project: names
    that no reader looks at are no part of it. A link does not hide what it leads to."""
    for name in (".cache", ".cache/weightsmith", "sub/.cache"):
        monkeypatch.setenv(variable, str(read / "base" / name))
        keep_clean(["base"])
    with pytest.raises(UsageError, match=r"--dist base/\.dist") as caught:
        keep_clean(["base"], dist="base/.dist")
    assert "give --dist" in caught.value.hint
    (read / "base" / ".link").symlink_to(read / "base" / "sub")
    monkeypatch.setenv(variable, str(read / "base" / ".link"))
    with pytest.raises(UsageError, match=variable):
        keep_clean(["base"])


# Patterns that Python cannot read: too deep for it, or a number that it has no room for.


def question(expected: str) -> Item:
    return Item(messages=({"role": "user", "content": "?"},), expected=(expected,), line=7)


UNREADABLE = ["(" * 3000 + ")" * 3000, "a{99999999999999999999}", "(", "(?<=a+)b"]


@pytest.mark.parametrize("pattern", UNREADABLE)
def test_a_pattern_that_cannot_be_read(pattern):
    recipe = {"name": "x", "base": {"source": "x"}}
    with pytest.raises(UsageError, match="tensor_types`: invalid regular expression"):
        check_recipe({**recipe, "quantize": {"tensor_types": {pattern: "q8_0"}}}, "test")
    for metric, expected in (
        ("regex", pattern),
        ("json-schema", json.dumps({"pattern": pattern})),
        ("json-schema", json.dumps({"patternProperties": {pattern: {}}})),
    ):
        with pytest.raises(UsageError, match="line 7"):
            check_metric(metric, [question(expected)])


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ('{"$ref": "#"}', "line 7: .*reference '#' leads back to itself"),
        ('{"allOf": [{"$ref": "#"}]}', "refers to itself without an end"),
    ],
)
def test_a_schema_that_refers_to_itself(schema, message):
    with pytest.raises(UsageError, match=message):
        score_answers(["{}"], [question(schema)], "json-schema")


# Metrics that never end.

NEVER_ENDS = "(a+)+$"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metric", "expected", "answer"),
    [
        ("regex", NEVER_ENDS, "a" * 60 + "!"),
        ("json-schema", json.dumps({"pattern": NEVER_ENDS}), json.dumps("a" * 60 + "!")),
    ],
)
def test_a_metric_that_never_ends_costs_its_own_question(metric, expected, answer, impatient):
    """The expected pattern takes for ever on what the model said: that answer is wrong, its row
    says why, and the others are judged."""
    honest = "aa" if metric == "regex" else '"aa"'

    found = score_answers([answer, honest, honest], [question(expected)] * 3, metric)

    assert [row["ok"] for row in found.per_item] == [False, True, True]
    assert re.search("line 7: .* exceeded 0.* s of CPU time", found.per_item[0]["unjudged"])
    assert "unjudged" not in found.per_item[1]
    (said,) = foreign_faults(found)
    assert said.startswith("1 of 3 questions count as wrong, since they could not be judged")


@pytest.mark.slow
def test_many_patterns_without_an_end_take_a_bounded_time(impatient):
    """The first ones use the time up; each later one, and any honest one, still has a share."""
    asked = [*[question(NEVER_ENDS)] * 8, question("!")]

    found = score_answers(["a" * 60 + "!"] * 9, asked, "regex")

    assert [row["ok"] for row in found.per_item] == [False] * 8 + [True]
    limits = [
        float(re.search("exceeded ([0-9.]+) s", row["unjudged"])[1])  # type: ignore[index]
        for row in found.per_item[:8]
    ]
    assert sum(limits) <= time_limits.FOREIGN_SECONDS + 8 * metrics.SECONDS_EACH
    assert limits[-1] == metrics.SECONDS_EACH < limits[0]


def test_an_answer_of_white_space_in_a_fence_is_judged_at_once(impatient):
    """The model fills a Markdown fence with blanks without end: judged, not searched for ever."""
    answer = "```json\n" + "\n" * 1_000_000 + "x"
    assert score_answers([answer], [question("{}")], "json-schema").score == 0.0


# Secrets in a recipe, and in addresses.

KEY = "sk-4f1d0b"
SECRETIVE = {
    "name": "x",
    "base": {"source": "hf://a/b"},
    "adapters": [
        {
            "source": "./a",
            "run_id": f"https://ann:{KEY}@runs.example/7",
            "evaluate": {"data": "b.jsonl", "metric": "command", "command": ["judge", KEY]},
        }
    ],
    "evaluate": {
        "data": "a.jsonl",
        "metric": "command",
        "command": ["/opt/judge.py", "--key", KEY],
    },
    "image": {"labels": {"source": f"https://{KEY}@git.example/x", "git": "ssh://git@g.example/x"}},
    "targets": ["llamacpp-q8_0"],
}


def test_arguments_of_the_judge_stay_here(tmp_path):
    """A key among the arguments of `evaluate.command` gets into no statement and no build.json."""
    recipe = check_recipe(SECRETIVE, "test")
    told = public_recipe(recipe)
    assert told["evaluate"]["command"] == ["judge.py", "…"]
    assert told["adapters"][0]["run_id"] == "https://runs.example/7"
    assert KEY not in str(told)
    tree = Tree(root=Path(), files=(FileEntry(path="f", size=1, digest=Digest.of(b"1")),))
    snapshot = Snapshot(tree=tree, source="./a", pin="p", pinned=True)
    sources = Sources(
        base=snapshot,
        adapters=(AdapterSnapshot(snapshot=snapshot, run_id=recipe.adapters[0].run_id),),
    )
    have = Results()
    steps = {name: Step() for name in ("sources", "checkpoint", "validation", "expected")}
    have.put(steps["sources"], unrecorded(sources))
    have.put(steps["checkpoint"], unrecorded(Checkpoint(tree=tree)))
    Record(
        request=SimpleNamespace(file=RecipeFile(recipe=recipe, folder=tmp_path)),
        steps=SimpleNamespace(**steps),
        run=SimpleNamespace(have=have, records=lambda _: {}),
        tools=SimpleNamespace(
            progress=Silent(), memory=NO_LIMIT, runner=SimpleNamespace(networked=False)
        ),
    )._write(None, tmp_path, "")
    document = json.loads((tmp_path / "build.json").read_text())
    assert document["recipe"]["evaluate"]["command"] == ["judge.py", "…"]
    assert KEY not in str(document)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        (f"https://ann:{KEY}@h.example:80/x", "https://h.example:80/x"),
        (f"http://{KEY}@h.example/x@y", "http://h.example/x@y"),
        (f"postgres://ann:{KEY}@@h.example", "postgres://h.example"),
        ("ssh://git@h.example/x", "ssh://git@h.example/x"),
        (f"https://ann:{'x' * 5000}'@h.example", "https://h.example"),
        ("http://h.example:80/a@b", "http://h.example:80/a@b"),
    ],
)
def test_passwords_in_addresses_are_not_told(address, shown):
    assert without_passwords({"a": [f"at {address}"]}) == {"a": [f"at {shown}"]}


def test_a_label_that_is_json_stays_what_it_is():
    """A label holds JSON, with an address and, elsewhere, an @: it is JSON afterwards, too."""
    label = '{"u":"http://127.0.0.1:8000","m":"a@b","p":"http://ann:%s@h"}'
    assert without_passwords(label % KEY) == label.replace("ann:%s@", "")


def test_a_text_of_many_colons_is_read_at_once():
    began = time.process_time()
    text = "://" + "a:" * 40_000
    assert without_passwords(text) == text
    assert time.process_time() - began < 1


def test_a_password_in_the_address_of_a_server(tmp_path):
    """`--url http://ann:KEY@…` of a server that is not there: the message names it without."""
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "expected": "b"}\n')
    words = ["evaluate", "--url", f"http://ann:{KEY}@127.0.0.1:9", "--data", "a.jsonl", "--json"]
    with chdir(tmp_path):
        done = weightsmith(*words, "--retries", "0")
    assert done.code == 5, done.err
    assert "127.0.0.1:9" in done.err
    assert KEY not in done.out + done.err


@pytest.mark.parametrize("scheme", ["", "https://"])
def test_a_password_in_a_reference(scheme):
    """`--push` to `ann:KEY@registry/…`: refused, with what to do, and without the key."""
    with pytest.raises(UsageError, match=r"r\.example") as caught:
        Reference.parse(f"{scheme}ann:{KEY}@r.example/team/app:1")
    assert KEY not in caught.value.message
    assert "docker login" in caught.value.hint
