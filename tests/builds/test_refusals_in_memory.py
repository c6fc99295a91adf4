"""A build in memory that is refused: the exit code, what was not begun, and what is not left."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from weightsmith.building import checks
from weightsmith.core.errors import (
    CheckFailed,
    EnvironmentFailure,
    InputRefused,
    UsageError,
    WeightsmithError,
)
from weightsmith.oci import limits
from weightsmith.steps.tools import JobMemory

from tests.fakes.baking import push_base
from tests.fakes.jobs import LOSSY, WRONG
from tests.fakes.memory import STAGES, Memory

TARGET = "llamacpp-q4_k_m"
RESULTS = {
    "merge": ("merge",),
    "validate": ("validate",),
    "reference": ("reference",),
    "quantize": ("quantize", "statistics"),
    "quality": ("quality",),
    "render": ("quantize", "quality"),
    "bake": ("base",),
    "evaluate": ("base", "smoke", "trial"),
}
"""Stage -> what the store calls what is lost before it, and so is made again."""
RESUMED = {"merge", "quantize"}
"""Results that go on where an earlier build was stopped."""
JOBS = {"base": "export-engine"}
"""Result -> the job that makes it, where that has another name."""


@dataclass(frozen=True)
class Refusal:
    """One thing that goes wrong: where, how it ends, and what sets it up."""

    stage: str
    error: type[WeightsmithError]
    says: str
    change: Callable[[Memory], object] = lambda memory: None
    settings: tuple[str, ...] = ()
    outputs: dict[str, Any] = field(default_factory=dict)


def fails(event: str, error: BaseException) -> Callable[[Memory], object]:
    return lambda memory: memory.journal.faults.update({event: error})


def forgets(who: str) -> Callable[[Memory], object]:
    """Make somebody wrong in every other question."""
    return lambda m: m.minds.forgot.update({who: set(list(m.minds.facts)[::2])})


def spoils(path: str, text: str) -> Callable[[Memory], object]:
    return lambda memory: (memory.home / path).write_text(text)


def describes(**changes: Any) -> Callable[[Memory], object]:
    """Change the base's config.json."""

    def write(memory: Memory) -> None:
        path = memory.home / "base" / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return write


DIED = EnvironmentFailure("the job was killed", hint="give it more memory")
REFUSED = InputRefused("it cannot be read", hint="download it again")

BEFORE_WORK = {
    "a base that is not there": Refusal(
        "resolve", InputRefused, "nowhere", settings=("base.source=./nowhere",)
    ),
    "an encoder with a decoder": Refusal(
        "resolve", InputRefused, "T5ForConditionalGeneration is an encoder with a decoder",
        describes(architectures=["T5ForConditionalGeneration"], is_encoder_decoder=True),
    ),
    "a model that fills gaps": Refusal(
        "resolve", InputRefused, "BertForMaskedLM fills gaps in texts, and no target serves",
        describes(architectures=["BertForMaskedLM"]),
    ),
    "a broken list of modules": Refusal(
        "resolve", InputRefused, r"modules\.json does not list modules",
        spoils("base/modules.json", "[]"),
    ),
    "an adapter's broken configuration": Refusal(
        "resolve", InputRefused, "adapter_config.json", spoils("a/adapter_config.json", "{")
    ),
    "an adapter of another base": Refusal(
        "resolve", InputRefused, "q_proj", lambda m: spoil_shape(m)
    ),
    "a broken question": Refusal("", UsageError, "a.jsonl:1", spoils("a.jsonl", "{")),
    "a broken probe": Refusal(
        "", UsageError, "p.jsonl:1", spoils("p.jsonl", "no"), ("validate.probes=p.jsonl",)
    ),
    "a question of the training text": Refusal(
        "resolve", InputRefused, "t.jsonl|a.jsonl",
        spoils("t.jsonl", '{"text": "What does a say to 3? a says 9."}\n'),
        ("evaluate.training=t.jsonl", "evaluate.strict=true"),
    ),
    "a context that no memory holds": Refusal(
        "resolve", UsageError, "512[.]0 KiB", settings=("serve.memory=1MiB",)
    ),
    "a disk that is too small": Refusal(
        "resolve", EnvironmentFailure, "of disk", lambda m: setattr(m.store, "free", 1000)
    ),
    "memory that is too little": Refusal(
        "resolve", EnvironmentFailure, "quality llamacpp-q4_k_m needs 1[.].* may use 700[.]0 MiB",
        lambda m: setattr(m, "room", JobMemory.of(700 << 20, 1 << 40)),
    ),
    "a builder that nobody can make": Refusal(
        "resolve", EnvironmentFailure, "gguf", lambda m: m.runner.lacking.add("gguf")
    ),
    "a tag that another image has": Refusal(
        "resolve", UsageError, TARGET,
        lambda m: push_base(m.client, f"{m.repository}:1.0.0-{TARGET}", {}, {"x": b"x"}),
        outputs={"push": True},
    ),
    "a base image that is not there": Refusal(
        "resolve", InputRefused, "engines/none", lambda m: own_base(m, "none"),
    ),
    "a base image of another engine": Refusal(
        "resolve", InputRefused, "vllm", lambda m: own_base(m, "vllm")
    ),
    "a platform that the base lacks": Refusal(
        "resolve", UsageError, "linux/arm64", lambda m: own_base(m, "llamacpp"),
        ("image.platforms=[linux/arm64]",),
    ),
    "a base image in no folder": Refusal(
        "resolve", InputRefused, "nowhere does not exist", settings=("image.base=oci:nowhere",)
    ),
    "a base image of no name": Refusal(
        "resolve", UsageError, "not an image reference", settings=("image.base=Engine",)
    ),
    "a form that Ollama does not take": Refusal(
        "", UsageError, "Ollama", settings=("outputs=[ollama]", "quantize.split_max_size=1G")
    ),
    "parts that Ollama does not take": Refusal(
        "", UsageError, "shared_layers splits it",
        settings=("outputs=[ollama]", "quantize.shared_layers=true"),
    ),
    "parts of another size": Refusal(
        "resolve", UsageError, "exclude each other",
        settings=("quantize.split_max_size=1G", "quantize.shared_layers=true"),
    ),
    "a layer that is too large": Refusal(
        "resolve", UsageError, "one layer", settings=("image.max_layer_size=1kB",)
    ),
    "a folder that holds something else": Refusal(
        "", UsageError, "/own", lambda m: (m.folder / "own" / "x").mkdir(parents=True),
        outputs={"layout": "own"},
    ),
    "no repository on a hub": Refusal(
        "", UsageError, "foo: not a repository on a hub", settings=("outputs.hub=foo",)
    ),
    "limits of no format": Refusal(
        "", UsageError, "quality.limits.q4: unknown format", settings=("quality.limits.q4={}",)
    ),
    "answers as long as the context": Refusal(
        "resolve", UsageError, "max_tokens 64 of an answer leaves no room for its question",
        settings=("serve.max_model_len=64",),
    ),
    "a registry that lets nobody push": Refusal(
        "", EnvironmentFailure, "403",
        lambda m: m.registry.faults.append(("POST", "/uploads/", "403")), outputs={"push": True},
    ),
}  # fmt: skip

BY_A_PLAN = (
    "an encoder with a decoder",
    "a model that fills gaps",
    "a broken list of modules",
    "a broken question",
    "a broken probe",
    "a question of the training text",
    "an adapter of another base",
    "a context that no memory holds",
    "a base image in no folder",
    "a base image of no name",
    "a form that Ollama does not take",
    "a layer that is too large",
    "a folder that holds something else",
    "no repository on a hub",
    "limits of no format",
    "answers as long as the context",
)
"""What a plan refuses too: it asks no registry, and does not say what this machine lacks."""

AT_WORK = {
    "a merge that dies": Refusal(
        "merge", EnvironmentFailure, "killed", fails("job merge", DIED)
    ),
    "an input that the merge refuses": Refusal(
        "merge", InputRefused, "read", fails("job merge", REFUSED)
    ),
    "a merge that crashes": Refusal(
        "merge", WeightsmithError, "unexpected KeyError", fails("job merge", KeyError("x"))
    ),
    "a wrong merge": Refusal(
        "validate", CheckFailed, "the sign is flipped",
        lambda m: m.bench.valid.update(passed=False, findings=[WRONG]),
    ),
    "a validation that dies": Refusal(
        "validate", EnvironmentFailure, "killed", fails("job validate", DIED)
    ),
    "a merge that forgot its task": Refusal(
        "reference", CheckFailed, r"0\.5", forgets("merged")
    ),
    "a reference that dies": Refusal(
        "reference", EnvironmentFailure, "killed", fails("job reference", DIED)
    ),
    "a file that the quantizer's own check refuses": Refusal(
        "quantize", CheckFailed, "wrong", fails("job quantize", CheckFailed("wrong", hint="again"))
    ),
    "a quantizer that dies": Refusal(
        "quantize", EnvironmentFailure, "killed", fails("job quantize", DIED)
    ),
    "a quantizer that loses too much": Refusal(
        "quality", CheckFailed, "layer_error 0.9", lambda m: m.bench.quality.update(LOSSY)
    ),
    "a measurement that dies": Refusal(
        "quality", EnvironmentFailure, "killed", fails("job quality", DIED)
    ),
    "an artifact larger than was planned": Refusal(
        "render", UsageError, "weights 24", lambda m: setattr(m.bench, "padding", 24 << 20),
        ("serve.memory=56MiB",),
    ),
    "an engine that cannot be made": Refusal(
        "bake", EnvironmentFailure, "killed", fails("job export-engine", DIED)
    ),
    "an engine that takes no candidate": Refusal(
        "evaluate", EnvironmentFailure, "full",
        fails("load candidate", EnvironmentFailure("the disk is full", hint="make room")),
    ),
    "an image that cannot be started": Refusal(
        "evaluate", EnvironmentFailure, "no start",
        fails("start", EnvironmentFailure("no start", hint="look")),
    ),
    "a server that ends at once": Refusal(
        "evaluate", CheckFailed, "no such program", lambda m: m.bench.programs.clear()
    ),
    "a server that ends over a question": Refusal(
        "evaluate", CheckFailed, "out of memory",
        lambda m: setattr(m.launcher, "dies_at", "say to 7"),
    ),
    "answers without an end": Refusal(
        "evaluate", CheckFailed, "before the length limit",
        lambda m: setattr(m.launcher, "ends", "length"),
    ),
    "an image that forgot its task": Refusal(
        "evaluate", CheckFailed, r"0\.5", forgets("image")
    ),
    "an engine that takes no image": Refusal(
        "publish", EnvironmentFailure, "full",
        fails(f"load 1.0.0-{TARGET}", EnvironmentFailure("the disk is full", hint="make room")),
    ),
    "a registry that refuses the tag": Refusal(
        "publish", EnvironmentFailure, "403",
        lambda m: m.registry.faults.append(("PUT", f"/manifests/1.0.0-{TARGET}", "403")),
        outputs={"push": True},
    ),
}  # fmt: skip
REPORTED = {
    "a wrong merge": "refused",
    "a merge that forgot its task": "refused",
    "a quantizer that loses too much": f"{TARGET}/refused",
    "a server that ends at once": f"{TARGET}/refused",
    "a server that ends over a question": f"{TARGET}/refused",
    "answers without an end": f"{TARGET}/refused",
    "an image that forgot its task": f"{TARGET}/refused",
}
"""What a check refused is written down, apart from what passed."""


def spoil_shape(memory: Memory) -> None:
    path = memory.home / "a" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes().replace(b"[2,256]", b"[4,128]"))


def own_base(memory: Memory, engine: str) -> None:
    """Name a base image, of another engine where there is one of that name."""
    base = f"{memory.registry.host}/engines/{engine}:1"
    memory.write_recipe(image={"repository": memory.repository, "base": base})
    if engine != "none":
        push_base(memory.client, base, {"dev.weightsmith.engine": engine}, {"x": b"x"})


def refused(memory: Memory, case: Refusal) -> WeightsmithError:
    """Build it to its refusal; what was there before is there, and nothing else."""
    case.change(memory)
    before, outputs = memory.seen(), dict(case.outputs)
    if "layout" in outputs:
        outputs["layout"] = memory.folder / outputs["layout"]

    with pytest.raises(case.error, match=case.says) as caught:
        memory.build(*case.settings, **outputs)

    assert caught.value.hint or case.error is WeightsmithError
    assert [name for name in memory.seen() if name != "refused"] == before
    assert memory.left() == []
    assert set(memory.store.half()) <= RESUMED
    return caught.value


@pytest.mark.parametrize("name", BEFORE_WORK)
def test_what_can_be_known_before_the_work_is_refused_before_it(memory: Memory, name: str) -> None:
    case = BEFORE_WORK[name]

    error = refused(memory, case)

    assert error.exit_code == case.error.exit_code
    assert memory.journal.of("stage", "job", "load", "start") == [
        f"stage {stage}" for stage in [case.stage] if stage
    ]
    assert memory.store.made() == []


@pytest.mark.parametrize("name", BY_A_PLAN)
def test_a_plan_refuses_what_its_build_would(memory: Memory, name: str) -> None:
    case = BEFORE_WORK[name]
    case.change(memory)
    folder = memory.folder / case.outputs["layout"] if case.outputs else None

    with pytest.raises(case.error, match=case.says):
        memory.forecast(*case.settings, layout=folder)


@pytest.mark.parametrize("name", AT_WORK)
def test_a_refusal_ends_the_build_and_nothing_of_it_is_seen(
    warm: Memory, digest: str, name: str
) -> None:
    """What was made before it is kept: the next build goes on there, to the very same image."""
    case = AT_WORK[name]
    after = STAGES[STAGES.index(case.stage) + 1 :]
    warm.store.forget(*RESULTS.get(case.stage, ()))
    kept = warm.store.made()

    error = refused(warm, case)

    assert error.exit_code == case.error.exit_code
    begun = [event.partition(" ")[2] for event in warm.journal.of("stage")]
    assert begun == [stage for stage in STAGES if stage not in after]
    if f"job {case.stage}" in warm.journal.events and case.error is not CheckFailed:
        assert warm.store.made() == kept
    check_report(warm, REPORTED.get(name, ""), error.message)
    check_next_build(warm, case, digest)


def check_report(memory: Memory, folder: str, why: str) -> None:
    """Check that a report is where one is promised, and nowhere else."""
    reports = [path.parent for path in memory.dist.rglob("report.html")]
    assert reports == ([memory.dist / "tiny" / "1.0.0" / folder] if folder else [])
    for path in reports:
        record = json.loads((path / "build.json").read_text())
        assert not (record["image"] or {}).get("reference")
        assert record["refused"] == why
        assert "Stopped: not published" in (path / "report.html").read_text()
        assert "<failure" in (path / "junit.xml").read_text()


def check_next_build(memory: Memory, case: Refusal, digest: str) -> None:
    """Check that an undisturbed build makes the image, without what was made before."""
    memory.repair()
    memory.store.forget(*RESULTS.get(case.stage, ()))

    built = memory.build(**case.outputs)[TARGET]

    assert built.published.digest == digest
    assert {name.split()[0] for name in memory.jobs()} <= {
        JOBS.get(result, result) for result in RESULTS.get(case.stage, ())
    }
    assert memory.left() == []


def test_memory_changes_nothing_but_what_is_recorded_of_it(memory: Memory) -> None:
    """Half of what is free is filled, and a stage may use all of it."""
    first = memory.build()[TARGET].published.digest
    assert memory.record()["memory_bytes"] == 0
    memory.room = JobMemory.of(0, 3 << 30)
    assert memory.room == JobMemory(limit=3 << 30, budget=3 << 29)
    memory.journal.events.clear()

    second = memory.build()[TARGET].published.digest

    assert second == first
    assert memory.jobs() == []
    assert memory.record()["memory_bytes"] == 3 << 30


def test_a_quality_refusal_records_the_weights_and_no_image(memory: Memory) -> None:
    """There is nothing yet that a plan or a digest could be of."""
    memory.bench.quality.update(LOSSY)
    with pytest.raises(CheckFailed) as caught:
        memory.build()
    assert f"{TARGET}/refused/report.html" in caught.value.hint
    folder = memory.results() / "refused"
    kept = json.loads((folder / "build.json").read_text())
    assert {path.name for path in folder.iterdir()} == {
        "build.json", "report.html", "report.md", "junit.xml",
    }  # fmt: skip
    assert (kept["target"], kept["image"], kept["plan"]) == (TARGET, None, None)
    assert kept["artifact"]["format"] == "q4_k_m"
    assert "layer_error 0.9" in kept["quality"]["exceeded"][0]
    assert list(kept["stages"]) == list(STAGES[: STAGES.index("quality") + 1])
    assert set(kept["inputs"]) == {"merge", "validate", "reference", "quantize"}
    assert f"invoke build --recipe recipe.yaml --target {TARGET}" in kept["reproduce"]
    assert "Quantizing lost too much: layer" in (folder / "report.md").read_text()


def test_a_layer_that_its_registry_will_not_take_is_refused_before_the_image_is_started(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came out is larger than what was estimated before the work."""
    host = re.escape(memory.registry.host)
    narrow = limits.RegistryLimits(name="Narrow", hosts=host, largest_layer=9, source="its page")
    monkeypatch.setattr(limits, "REGISTRIES", (narrow,))
    monkeypatch.setattr(checks, "check_layer_sizes", lambda *_: None)

    with pytest.raises(UsageError, match=r"Narrow.* 9 "):
        memory.build(push=True)

    assert memory.journal.of("stage")[-1] == "stage bake"
    assert memory.left() == []


def test_limits_of_a_format_that_there_is_not_are_refused_before_any_work(memory: Memory) -> None:
    """A typing error would leave the gate with its own limits, and nobody would know."""
    with pytest.raises(UsageError, match=r"quality\.limits\.q4_k_n: unknown format") as caught:
        memory.build("quality.limits={q4_k_n: {kl_mean: 0.1}}")
    assert "q4_k_m" in caught.value.hint.partition("?")[0]
    memory.build("quality.limits={'*': {kl_mean: 9.0}, awq: {kl_mean: 0.1}}")
