"""A build in memory of every kind of target: what is made for each, and who is asked what."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load
from weightsmith.api.commands.images import inspect_image, inspect_text
from weightsmith.api.commands.verify import verify_image
from weightsmith.building import checks
from weightsmith.core.devices import Devices
from weightsmith.core.errors import CheckFailed, InputRefused, UsageError
from weightsmith.core.ports import Silent
from weightsmith.models.folder import scan
from weightsmith.models.safetensors import read_header
from weightsmith.models.tensors import has_no_data
from weightsmith.oci.image import Image, Index
from weightsmith.oci.references import Reference

from tests.fakes.baking import push_base
from tests.fakes.memory import QUESTIONS, Memory, in_memory, new_signer

TARGET = "llamacpp-q4_k_m"
MACHINES = ("amd64", "arm64")


@pytest.fixture
def two(tmp_path: Path, quick: None) -> Iterator[Memory]:
    """Two adapters, each with a task of its own and none together."""
    with in_memory(tmp_path, adapters=("a", "b")) as made:
        rows = [
            {"source": f"./{name}", "version": "v1", "evaluate": {"data": f"{name}.jsonl"}}
            for name in ("a", "b")
        ]
        made.write_recipe(adapters=rows, evaluate=None)
        yield made


def weights_in(image: Image) -> dict[str, np.ndarray]:
    """The tensors of an image, by the files that its index names."""
    files = image.files()
    index = json.loads(files["/models/model.safetensors.index.json"])["weight_map"]
    found = {name: load(files[f"/models/{name}"]) for name in set(index.values())}
    return {tensor: found[name][tensor] for tensor, name in index.items()}


def asked(memory: Memory) -> dict[str, set[str]]:
    """Who the image was asked for, and whose questions."""
    found: dict[str, set[str]] = {}
    for adapter, question in memory.launcher.asked:
        if question != "Hello":
            found.setdefault(adapter, set()).add(question.split()[2])
    return found


def test_vllm_serves_the_merged_checkpoint_on_a_base_of_a_registry(memory: Memory) -> None:
    base = memory.use_vllm()
    built = memory.build("card.description=Answers.", "card.license=mit")["vllm"]
    image = memory.engine.held(f"{memory.repository}:1.0.0-vllm")
    below = memory.client.pull(Reference.parse(base))

    assert memory.jobs() == [
        "merge", "validate", "reference base", "reference adapter", "reference merged",
    ]  # fmt: skip
    assert image.diff_ids[: len(below.layers)] == tuple(one.diff_id for one in below.layers)
    (merged,) = merges(memory)
    served, made = weights_in(image), load((merged / "model.safetensors").read_bytes())
    assert served.keys() == made.keys()
    assert all(np.array_equal(served[name], made[name]) for name in made)
    standard = "org.opencontainers.image."
    said = {"base.digest": below.digest, "description": "Answers.", "licenses": "mit"}
    assert {key: image.config["Labels"][standard + key] for key in said} == said
    assert built.scores["image"].score == 1
    lock = json.loads((memory.home / "recipe.lock").read_text())
    assert lock["bases"] == {base: {"linux/amd64": below.digest}}


def test_vllm_on_a_cpu_is_assembled_once(memory: Memory) -> None:
    built = memory.build(targets=["vllm"])["vllm"]
    assert "make vllm-cpu for linux/amd64" in memory.journal.after("stage bake")
    assert built.scores["image"].score == 1

    memory.build("serve.max_num_seqs=1", targets=["vllm"])
    assert memory.journal.of("assemble") == []


def test_two_targets_share_what_comes_before_them(memory: Memory) -> None:
    built = memory.build(targets=["vllm", TARGET])

    assert memory.journal.of("stage") == [
        f"stage {name}" for name in (
            "resolve", "merge", "validate", "reference",
            *("quantize", "quality", "render", "bake", "evaluate", "publish") * 2,
        )
    ]  # fmt: skip
    assert memory.jobs() == [
        "merge", "validate", "reference base", "reference adapter", "reference merged",
        "quantize", "quality", "export-engine",
    ]  # fmt: skip
    assert len({one.published.digest for one in built.values()}) == 2
    assert built["vllm"].stages["merge"] == built[TARGET].stages["merge"]


@pytest.mark.parametrize("names", [[TARGET], ["vllm-fp8", "vllm-w8a8"]])
def test_gguf_and_formats_without_calibration_need_no_merged_weights_on_the_disk(
    memory: Memory, names: list[str]
) -> None:
    if TARGET not in names:
        memory.use_vllm()
    memory.build(targets=names)
    (headers_only,) = merges(memory)
    alone = {name: memory.record(name) for name in names}
    (job, *_) = (job for job in memory.runner.jobs if job.kind == "quantize")
    assert "model.layers.0.self_attn.q_proj.weight" in job.virtual.largest
    shard = alone[names[0]]["merge"]["shards"][0]
    assert "largest" not in alone[names[0]]["merge"]

    memory.build(targets=["vllm", *names])
    (written,) = set(merges(memory)) - {headers_only}

    assert has_no_data(read_header(headers_only / "model.safetensors"))
    assert not has_no_data(read_header(written / "model.safetensors"))
    assert memory.jobs().count("merge") == 1
    assert "quantize" not in memory.jobs()  # the same keys
    for name in names:
        for part in ("merge", "artifact", "image"):
            assert memory.record(name)[part]["digest"] == alone[name][part]["digest"]
    assert memory.record(names[0])["merge"]["shards"] == [shard]
    data = (written / "model.safetensors").read_bytes()
    assert hashlib.sha256(data).hexdigest() == shard["sha256"]


def test_weights_of_more_layers_than_engines_take_are_refused_before_any_work(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1.3 TB, DeepSeek-V3's in 16 bits."""
    monkeypatch.setattr(checks, "LARGEST_ANYWHERE", 100)

    with pytest.raises(UsageError, match=r"layers or more, and engines support at most 125 layers"):
        memory.build(targets=["vllm"])

    assert memory.jobs() == []
    memory.build(targets=["llamacpp-q4_k_m"])  # one file is one layer, of any size


def test_the_disk_for_unmerged_adapters_is_planned(two: Memory) -> None:
    """Of 100 adapters of a 70B model, 40 GB."""
    two.write_recipe(evaluate=None)
    folders = [two.home / name for name in ("base", *two.adapters)]
    whole = sum((folder / name).stat().st_size for folder in folders for name in scan(folder))

    assert two.planned("publish", targets=["vllm-lora"])["write_bytes"] == whole


def test_the_plan_counts_what_the_gate_reads(memory: Memory) -> None:
    read = memory.planned("quality", targets=[TARGET])["read_bytes"]
    merged = sum(file.stat().st_size for file in (memory.home / "base").glob("*.safetensors"))
    assert merged < read < 2 * merged


@pytest.mark.parametrize("target", ["vllm", "vllm-awq", "vllm-gptq"])
def test_one_other_target_needs_them(memory: Memory, target: str) -> None:
    memory.use_vllm()
    built = memory.build(targets=["vllm-fp8", target])

    assert {one.scores["image"].score for one in built.values()} == {1}
    (written,) = merges(memory)
    assert not has_no_data(read_header(written / "model.safetensors"))


def test_a_method_that_needs_whole_tensors_writes_them(two: Memory) -> None:
    two.build("merge.method=ties", "merge.density=0.5", targets=[TARGET])

    (written,) = merges(two)
    assert not has_no_data(read_header(written / "model.safetensors"))


@pytest.mark.slow
def test_gguf_targets_are_made_in_one_pass(memory: Memory) -> None:
    names = [TARGET, "llamacpp-q5_k_m", "llamacpp-q8_0"]
    together = memory.build(targets=names)
    assert memory.jobs().count("quantize") == 1
    digests = {name: one.published.digest for name, one in together.items()}

    memory.store.entries.clear()
    for name in reversed(names):
        assert memory.build(targets=[name])[name].published.digest == digests[name]
        assert memory.jobs().count("quantize") == 1


def test_merged_weights_that_are_there_are_read(memory: Memory) -> None:
    memory.build(targets=["vllm"])
    memory.build(targets=[TARGET])

    assert "merge" not in memory.jobs()
    assert all(job.virtual is None for job in memory.runner.jobs)


def merges(memory: Memory) -> list[Path]:
    """The merged checkpoints in the store."""
    entries = memory.store.entries.values()
    return [entry.tree.root for entry in entries if "shards" in entry.meta]


def test_a_target_that_passed_stays_when_the_next_is_refused(memory: Memory) -> None:
    memory.bench.quality["layer_error"] = 0.9

    with pytest.raises(CheckFailed, match="layer_error"):
        memory.build(targets=["vllm", TARGET], push=True)

    assert {tag for _, tag in memory.registry.manifests if not tag.startswith("sha256")} == {
        "1.0.0-vllm", f"1.0.0-vllm-{memory.record('vllm')['image']['digest'][7:19]}",
    }  # fmt: skip
    assert memory.left() == []


@pytest.mark.parametrize("target", ["vllm-lora", "llamacpp-lora"])
def test_an_unmerged_adapter_is_served_beside_the_base(memory: Memory, target: str) -> None:
    built = memory.build(targets=[target])[target]
    converted = ["quantize", "convert-adapters", "export-engine"]

    assert memory.jobs() == [
        "reference base",
        "reference adapter",
        *(converted if "llama" in target else []),
    ]
    assert built.scores["image"].score == 1
    assert set(built.scores) == {"base", "adapter", "image"}
    assert asked(memory) == {"a-v1": {"a"}}


@pytest.mark.parametrize(
    ("target", "limit", "files"),
    [("vllm", "auto", 10), ("vllm-lora", "auto", 10), ("vllm", "900KB", 10), ("vllm", "none", 1)],
)
def test_weights_are_cut_by_kind(memory: Memory, target: str, limit: str, files: int) -> None:
    """Seven kinds of matrices, two tables and the norms."""
    memory.use_vllm()
    memory.build(f"image.max_layer_size={limit}", targets=[target], push=True)

    image = memory.client.pull(Reference.parse(f"{memory.repository}:1.0.0-{target}"))
    names = [layer.file for layer in image.layers if layer.file.endswith(".safetensors")]
    assert sum("adapters/" not in name for name in names) == files
    told = verify_image(f"{memory.repository}:1.0.0-{target}", None, memory.client, Silent())
    assert any(one.name == "split" for one in told.checks) is (files > 1)


@pytest.mark.parametrize("target", ["vllm-lora", "llamacpp-lora"])
def test_of_several_unmerged_adapters_each_is_asked_its_own(two: Memory, target: str) -> None:
    built = two.build(targets=[target])[target]

    assert asked(two) == {"a-v1": {"a"}, "b-v1": {"b"}}
    assert [result.scores["image"].score for result in built.results] == [1, 1]


def test_of_several_merged_adapters_each_is_held_against_itself(two: Memory) -> None:
    built = two.build()[TARGET]
    asking = [job for job in two.runner.jobs if job.kind in {"proof", "reference"}]
    jobs: list[Any] = [getattr(job, "reference", job) for job in asking]

    (job,) = jobs
    assert [given.path.name for given in job.adapters] == ["a", "b"]
    assert job.models[0].path.name == "base"
    told = [task.models for walk in job.walks for task in walk.tasks]
    assert [[one.weights for one in models] for models in told] == [[(), (1.0,), ()]] * 2
    assert [result.task.task.name for result in built.results] == ["a v1", "b v1"]
    assert len(two.launcher.asked) > 2 * QUESTIONS
    assert asked(two) == {"": {"a", "b"}}


def test_a_merge_that_wins_one_task_at_the_others_cost_goes_no_further(two: Memory) -> None:
    two.minds.forgot["merged"] = {question for question in two.facts if " b " in question}

    with pytest.raises(CheckFailed, match="b v1"):
        two.build()

    assert "quantize" not in two.jobs()
    record = json.loads((two.dist / "tiny" / "1.0.0" / "refused" / "build.json").read_text())
    assert [suite["verdicts"][0]["passed"] for suite in record["suites"]] == [
        True, False,
    ]  # fmt: skip


def test_a_base_alone_is_neither_merged_nor_validated(memory: Memory) -> None:
    memory.write_recipe(adapters=[])
    built = memory.build()[TARGET]

    assert memory.jobs() == ["reference base", "quantize", "quality", "export-engine"]
    assert built.stages["merge"].cached is True
    assert any("no adapter" in text for text in memory.progress.warnings)


def test_without_questions_the_image_is_started_all_the_same(memory: Memory) -> None:
    memory.write_recipe(evaluate=None)
    built = memory.build()[TARGET]

    assert "reference" not in memory.jobs()
    assert "start" in memory.journal.events
    assert (built.scores, built.sameness, built.verdict) == ({}, {}, "not proven")
    assert any("no `evaluate`" in text for text in memory.progress.warnings)


def test_an_image_for_a_gpu_that_is_not_here_is_published_unstarted(memory: Memory) -> None:
    memory.use_vllm()
    built = memory.build("serve.gpu=nvidia-l4", push=True)["vllm"]

    assert "start" not in memory.journal.events
    assert set(built.scores) == {"base", "adapter", "merged"}
    assert any("it was not started" in text for text in memory.progress.warnings)
    assert "1.0.0-vllm" in {tag for _, tag in memory.registry.manifests}


def test_without_an_engine_an_image_for_a_gpu_is_started_on_this_machines(
    memory: Memory,
) -> None:
    memory.use_vllm()
    memory.engine.answering = False
    memory.launcher.runs_on = Devices(cpu="", cpus=2, gpus=("NVIDIA L4",))
    memory.build("serve.gpu=nvidia-l4")

    assert [one.use_gpu for one in memory.launcher.started] == [True]


def both_platforms(memory: Memory, content: bytes = b"1") -> str:
    """Put vLLM's base for two platforms into registry and recipe, always under the same tag."""
    memory.use_vllm()
    name, labels = f"{memory.registry.host}/engines/vllm:both", {"dev.weightsmith.engine": "vllm"}
    images = []
    for machine in MACHINES:
        files = {"usr/bin/vllm": machine.encode() + content}
        push_base(memory.client, f"{name}-{machine}", labels, files, f"linux/{machine}")
        place = Reference.parse(f"{name}-{machine}")
        images.append(memory.client.pull(place, platform=f"linux/{machine}"))
    memory.client.push(Index(images=tuple(images)), Reference.parse(name), force=True)
    memory.write_recipe(targets=["vllm"], image={"repository": memory.repository, "base": name})
    return name


def test_an_image_for_each_platform_of_its_base_shares_the_weights(memory: Memory) -> None:
    base, layout = both_platforms(memory), memory.folder / "own"
    memory.signer, key = new_signer(), memory.folder / "key.pub"
    key.write_bytes(memory.signer.public)
    built = memory.build(push=True, layout=layout)["vllm"].published
    name = f"{memory.repository}:1.0.0-vllm"
    kind, body = memory.registry.manifests["team/tiny", "1.0.0-vllm"]
    rows = json.loads(body)["manifests"]

    assert "index" in kind
    assert [row["platform"]["architecture"] for row in rows] == [*MACHINES]
    assert built.digest not in {row["digest"] for row in rows}
    assert memory.launcher.asked
    pulled = [
        memory.client.pull(Reference.parse(name), platform=f"linux/{one}") for one in MACHINES
    ]
    amd, arm = ({x.digest for x in one.layers if x.file.startswith("models/")} for one in pulled)
    assert amd == arm != set()
    for place in (name, str(layout)):
        found = verify_image(place, key, memory.client, Silent())
        checks = {one.name for one in found.checks}
        assert found.digest == built.digest
        assert {"signature", "linux/amd64 signature", "linux/arm64 weights"} <= checks
    for machine, image in zip(MACHINES, pulled, strict=True):
        seen = inspect_image(name, memory.client, memory.engine, f"linux/{machine}")
        assert (seen["digest"], seen["index"]) == (image.digest, built.digest)
        assert f"linux/{machine}, one of linux/amd64, linux/arm64" in inspect_text(seen)
    with pytest.raises(InputRefused, match="linux/amd64"):
        inspect_image(f"{base}-amd64", memory.client, memory.engine, "linux/arm64")

    # One platform's layer is damaged: it is told which one.
    broken = pulled[1].layers[0].digest
    memory.registry.blobs["team/tiny", broken] = memory.registry.blobs["team/tiny", broken][::-1]
    with pytest.raises(CheckFailed) as caught:
        verify_image(name, key, memory.client, Silent())
    bad = [row["check"] for row in caught.value.details["checks"] if row["ok"] is False]
    assert bad == ["linux/arm64 layer 0"]


def test_the_lock_decides_which_base(memory: Memory) -> None:
    both_platforms(memory)
    first = memory.build(push=True)["vllm"].published
    both_platforms(memory, b"2")
    again = memory.build(push=True)["vllm"].published
    assert (again.digest, again.uploaded_bytes) == (first.digest, 0)

    (memory.home / "recipe.lock").unlink()
    with pytest.raises(UsageError) as caught:
        memory.build(push=True)
    assert "--force" in caught.value.hint
    one = memory.build("image.platforms=[linux/arm64]", push=True, force=True)["vllm"].published
    assert one.digest != first.digest
    assert "index" not in memory.registry.manifests["team/tiny", "1.0.0-vllm"][0]
    with pytest.raises(UsageError, match="linux/s390x"):
        memory.build("image.platforms=[linux/s390x]")


def test_weights_in_small_layers_may_lie_below_the_engine(memory: Memory) -> None:
    base = memory.use_vllm()
    largest = (memory.home / "base" / "model.safetensors").stat().st_size // 2 + (130 << 10)
    memory.build("image.order=weights-first", f"image.max_layer_size={largest}")
    image = memory.engine.held(f"{memory.repository}:1.0.0-vllm")
    below = memory.client.pull(Reference.parse(base))

    assert image.diff_ids[0] != below.layers[0].diff_id
    assert below.layers[0].diff_id in image.diff_ids[2:]


@pytest.mark.parametrize("target", ["vllm-lora", "llamacpp-lora"])
def test_the_memory_for_adapters_is_planned_before_the_build_as_in_it(
    two: Memory, target: str
) -> None:
    two.write_recipe(evaluate=None)
    base = (two.home / "base" / "model.safetensors").stat().st_size
    tensors = [read_header(two.home / name / "adapter_model.safetensors").tensors for name in "ab"]
    size = sum(tensor.size for one in tensors for tensor in one)

    (before,) = two.forecast(targets=[target])["serving"].values()
    two.build(targets=[target])

    in_16_bits = base // 2 if target == "llamacpp-lora" else base
    assert before["weight_bytes"] - in_16_bits == size
    told = two.record(target)
    files = {file["path"]: file["size"] for file in told["artifact"]["files"]}
    (served,) = (files[name] for name in files if Path(name).suffix in {".gguf", ".safetensors"}
               and not name.startswith("adapters/"))  # fmt: skip
    assert told["plan"]["weight_bytes"] - served == size


@pytest.mark.parametrize("target", ["vllm-lora", "llamacpp-lora"])
def test_adapters_with_weights_that_peft_leaves_out_are_refused_before_any_work(
    two: Memory, target: str
) -> None:
    path = two.home / "b" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "layers_to_transform": [1]}))

    with pytest.raises(InputRefused, match=r"layers_to_transform \[1\].*PEFT leaves them out"):
        two.build(targets=[target])

    assert two.jobs() == []
