"""Builds in memory of adapters that lie, unmerged, beside a quantized base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from weightsmith.api.commands.verify import verify_image
from weightsmith.core.errors import CheckFailed, InputRefused, UsageError
from weightsmith.core.jobs import DequantizedJob, QualityJob, QuantizeJob
from weightsmith.core.ports import Silent
from weightsmith.fleets.graph import plan_of
from weightsmith.fleets.ordering import foreseen, ordered

from tests.fakes.cache import MemoryCache
from tests.fakes.fleet import run, write_fleet
from tests.fakes.memory import Memory, in_memory, questions
from tests.fakes.tiny import tensors

GGUF, AWQ, FP8 = "llamacpp-q4_k_m-lora", "vllm-awq-lora", "vllm-fp8-lora"


@pytest.fixture
def two(tmp_path: Path, quick: None) -> Iterator[Memory]:
    """Two adapters, each with a task of its own."""
    with in_memory(tmp_path, adapters=("a", "b")) as made:
        write(made, "a", "b")
        yield made


def write(memory: Memory, *names: str, vllm: bool = False, **changes: Any) -> None:
    rows = [{"source": f"./{name}", "evaluate": {"data": f"{name}.jsonl"}} for name in names]
    put = memory.use_vllm if vllm else memory.write_recipe
    put(**{"adapters": rows, "evaluate": None, **changes})


def quantizations(memory: Memory) -> list[QuantizeJob]:
    return [job for job in memory.runner.jobs if isinstance(job, QuantizeJob)]


@pytest.mark.parametrize("target", [GGUF, AWQ, FP8])
def test_the_base_is_quantized_and_each_adapter_is_asked_on_it(two: Memory, target: str) -> None:
    built = two.build(targets=[target])[target]

    (job,) = quantizations(two)
    assert job.model.path == two.home / "base"
    assert (job.name, job.virtual) == ("base", None)
    (measured,) = (one for one in two.runner.jobs if isinstance(one, QualityJob))
    assert measured.model.path == two.home / "base"
    asked = {(adapter, q.split()[2]) for adapter, q in two.launcher.asked if q != "Hello"}
    assert asked == {("a", "a"), ("b", "b")}
    assert [result.scores["image"].score for result in built.results] == [1, 1]
    assert "merge" not in two.jobs()
    record = two.record(target)
    assert record["artifact"]["format"] == target.partition("-")[2]
    assert record["inputs"]["quantize"]["checkpoint"] == record["base"]["digest"]


@pytest.mark.parametrize("target", [GGUF, AWQ])
def test_other_adapters_and_another_recipe_have_the_same_base(two: Memory, target: str) -> None:
    two.build(targets=[target])
    first = two.record(target)["artifact"]["files"]
    write(two, "b", name="another", version="2.0.0")
    two.build(targets=[target])

    assert quantizations(two) == []
    (path,) = two.dist.rglob(f"another/2.0.0/{target}/build.json")
    files = json.loads(path.read_text())["artifact"]["files"]
    bases = [{f["digest"] for f in one if "adapters/" not in f["path"]} for one in (first, files)]
    assert bases[0] == bases[1]
    assert {f["path"].split("/")[1].partition(".")[0] for f in files if "/" in f["path"]} == {"b"}


def test_another_machine_takes_the_base_from_the_cache(tmp_path: Path) -> None:
    cache = MemoryCache()
    for name in ("one", "other"):
        with in_memory(tmp_path / name, adapters=("a", "b"), cache=cache) as memory:
            write(memory, "a" if name == "one" else "b")
            memory.build(targets=[GGUF])
            assert len(quantizations(memory)) == (name == "one")


@pytest.mark.slow
def test_a_fleet_quantizes_the_base_once(two: Memory) -> None:
    path = write_fleet(two, targets=[GGUF])
    before = plan_of(foreseen(ordered(path), two.dist, two.tools))
    assert [row["cells"] for row in before["shared"]] == [2, 2]
    rows, engine = run(two, path)

    assert [row.kind for row in rows.shared] == ["base", "weights"]
    assert len(quantizations(two)) == 1
    assert two.jobs().count("quality") == 1
    assert engine.done[-2:] == [f"a x {GGUF}", f"b x {GGUF}"]


def test_formats_of_one_base_are_made_in_one_pass(two: Memory) -> None:
    two.build(targets=[GGUF, "llamacpp-q8_0-lora", "llamacpp-q4_k_m"])

    plans = [(job.name, sorted([job.format, *(o.format for o in job.siblings)]))
             for job in quantizations(two)]  # fmt: skip
    assert sorted(plans) == [("base", ["q4_k_m", "q8_0"]), ("tiny", ["q4_k_m"])]


def test_an_adapter_that_forgets_on_the_quantized_base_is_named(two: Memory) -> None:
    two.launcher.answer = lambda question, adapter: (
        "?" if adapter == "b" else two.minds.answer("image", (adapter,), question)
    )

    with pytest.raises(CheckFailed, match=r"^b: .*image"):
        two.build(targets=[GGUF])
    assert two.left() == []


def test_a_base_that_lost_too_much_is_not_asked(two: Memory) -> None:
    two.bench.quality["layer_error"] = 5.0

    with pytest.raises(CheckFailed, match="layer_error"):
        two.build(targets=[GGUF])
    assert two.launcher.asked == []


def test_awq_is_made_without_scales_between_layers(two: Memory) -> None:
    two.build(targets=[AWQ, "vllm-awq"])

    scaled = {job.name: job.options.get("scaled", True) for job in quantizations(two)}
    assert scaled == {"base": False, "tiny": True}


@pytest.mark.parametrize("name", ["awq-autoawq", "awq-gptqmodel", "awq-compressed"])
def test_awq_of_tools_that_move_scales_is_refused_in_the_plan(two: Memory, name: str) -> None:
    with pytest.raises(UsageError, match="moves scales") as refused:
        two.forecast(targets=[f"vllm-{name}-lora"])
    assert "choose awq" in refused.value.hint
    assert two.jobs() == []


@pytest.mark.parametrize(
    ("shapes", "config", "said"),
    [
        (((2, 128), (256, 2)), {}, "shapes differ"),
        (((3, 256), (256, 3)), {}, "has rank 3 in lora_A"),
        (((2, 256), (256, 2)), {"target_modules": ["q_proj", "o_proj"]}, r"such as .*o_proj"),
        (((2, 256), (256, 2)), {"layer": 7}, r"layers\.7\..*, which the base does not have"),
    ],
)
def test_adapters_of_another_base_are_refused_before_any_work(
    two: Memory, shapes: Any, config: dict[str, Any], said: str
) -> None:
    path = two.home / "b" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    stem = f"base_model.model.model.layers.{config.get('layer', 0)}.self_attn.q_proj.lora_"
    named = tuple(zip((f"{stem}A.weight", f"{stem}B.weight"), shapes, strict=True))
    (two.home / "b" / "adapter_model.safetensors").write_bytes(tensors(named, seed=5))
    for target in (GGUF, AWQ):
        with pytest.raises(InputRefused, match=said):
            two.forecast(targets=[target])
        with pytest.raises(InputRefused, match=said):
            two.build(targets=[target])
        assert two.jobs() == []


def test_where_no_image_starts_each_adapter_answers_on_the_dequantized_base(two: Memory) -> None:
    serve = {"max_model_len": 256, "max_num_seqs": 2, "gpu": "nvidia-h100-80gb"}
    write(two, "a", "b", vllm=True, serve=serve)
    two.build(targets=[FP8])

    (job,) = (one for one in two.runner.jobs if isinstance(one, DequantizedJob))
    assert [given.path.name for given in job.adapters] == ["a", "b"]
    assert [task.adapters for task in job.tasks] == [(0,), (1,)]
    assert job.model.path == two.home / "base"
    suites = two.record(FP8)["suites"]
    assert [one["scores"]["dequantized"]["score"] for one in suites] == [1, 1]

    two.minds.forgot["dequantized"] = {prompt for prompt, _ in questions("b")}
    two.store.forget("dequantized")
    with pytest.raises(CheckFailed, match=r"^b: the dequantized"):
        two.build(targets=[FP8])


def test_the_chain_leads_from_the_image_to_its_base_and_adapters(two: Memory) -> None:
    two.build(targets=[GGUF, "vllm-lora"], push=True)

    for target in (GGUF, "vllm-lora"):
        told = verify_image(f"{two.repository}:1.0.0-{target}", None, two.client, Silent())
        found = {one.name: (one.ok, one.found) for one in told.checks}
        assert not [name for name, (ok, _) in found.items() if ok is False], found
        assert found["base"] == (True, "served with adapters beside it")
        assert {"unmerged", "label base", "label adapter:0", "label adapter:1"} <= found.keys()
        assert "merge" not in found
        assert ("quantize" in found) == (target == GGUF)
