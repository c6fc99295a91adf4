"""What is planned and rendered for well-known models on well-known GPUs.

plans/ has one readable page per model, renders/ one folder of all files per engine. `make golden`
writes them anew; then read the difference. The invariants are checked on every row, so that a page
cannot be updated into nonsense.
"""

import pytest
from weightsmith.serving import engines, vllm
from weightsmith.serving.devices import GPUS
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.memory import human

from tests.fakes.configs import LLAMA_8B, LLAMA_8B_BYTES, facts
from tests.golden.cases import (
    GOLDEN,
    MACHINES,
    MODELS,
    PACKED,
    RENDERS,
    TARGETS,
    model,
    planned,
    rendered,
    updating,
)
from tests.paths import ROOT

LENGTH = 8192


def cells(name, target, machine):
    plan, error = planned(name, target, machine)
    if error is not None:
        told = error.details.get("plan")
        ways = [way["text"] for way in told.nearest] if told else [error.message]
        return f"| {target} | {machine} | | | | | no: {'; '.join(ways) or 'no way found'} |"
    fixed, _ = planned(name, target, machine, max_model_len=LENGTH)
    at_once = fixed.max_num_seqs if fixed else "none"
    ways = f"{plan.tensor_parallel_size} x {plan.pipeline_parallel_size}, "
    split = ways if plan.gpus > 1 else ""
    layers = "" if plan.fits else f", {plan.gpu_layers} layers on the GPU"
    return (
        f"| {target} | {machine} | {human(plan.weights_bytes_per_gpu)} |"
        f" {human(plan.kv_cache_bytes)} | {plan.max_model_len} x {plan.max_num_seqs} | {at_once} |"
        f" {split}{human(plan.kv_bytes_per_request)} a request{layers} |"
    )


def page(name):
    head = (
        f"# {name}\n\n`auto` is tokens x requests where both are left open; {LENGTH}: how many"
        " requests of that length. Sizes are per GPU.\n\n"
        f"| target | on | weights | for the cache | auto | at {LENGTH} | |\n"
        "|---|---|---|---|---|---|---|\n"
    )
    targets = PACKED.get(name, TARGETS)
    rows = [cells(name, target, machine) for target in targets for machine in MACHINES]
    return head + "\n".join(rows) + "\n"


@pytest.mark.parametrize("name", MODELS)
def test_plans_are_as_before(name):
    path, text = GOLDEN / "plans" / f"{name}.md", page(name)
    if updating():
        path.write_text(text, "utf-8")

    assert path.read_text("utf-8") == text


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_planned_fits_and_grows_with_what_is_given(name, machine):
    for target in PACKED.get(name, TARGETS):
        plan, error = planned(name, target, machine)
        if plan is None:
            assert error.exit_code in {2, 3}
            continue
        if not plan.fits:
            assert plan.gpu_layers < model(name)["config"].get("num_hidden_layers", 62)
            continue
        gpus, whole = plan.gpus, GPUS[plan.device].usable_bytes
        each = plan.weights_bytes_per_gpu + plan.kv_cache_bytes + plan.overhead_bytes // gpus
        assert each + plan.margin_bytes <= whole + gpus
        assert plan.kv_bytes_total <= plan.kv_cache_bytes * gpus + gpus
        assert plan.max_num_seqs <= plan.max_concurrency
        half, _ = planned(name, target, machine, max_model_len=max(256, plan.max_model_len // 2))
        assert half is not None
        assert half.max_num_seqs >= plan.max_num_seqs
        one, _ = planned(name, target, machine, max_num_seqs=1)
        two, _ = planned(name, target, machine, max_num_seqs=2)
        assert two is None or one.max_model_len >= two.max_model_len


@pytest.mark.parametrize("case", RENDERS)
def test_rendered_files_are_as_before(case):
    folder, files = GOLDEN / "renders" / case, rendered(*RENDERS[case]).files
    if updating():
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for name, text in files.items():
            (folder / name).write_text(text, "utf-8")

    assert {path.name for path in folder.iterdir()} == set(files)
    for name, text in files.items():
        assert (folder / name).read_text("utf-8") == text, name


@pytest.mark.parametrize("case", RENDERS)
def test_what_is_rendered_fits(case):
    plan, (_, _, wishes) = rendered(*RENDERS[case]).plan, RENDERS[case]
    gpus = plan.gpus or 1
    whole = GPUS[plan.device].usable_bytes if plan.gpus else wishes["host_memory_bytes"]

    each = plan.weights_bytes_per_gpu + plan.kv_cache_bytes + plan.margin_bytes
    assert each + plan.overhead_bytes // gpus <= whole + gpus
    assert plan.kv_bytes_total == plan.kv_bytes_per_request * plan.max_num_seqs
    assert plan.kv_bytes_total <= plan.kv_cache_bytes * gpus + gpus
    assert plan.fits


def test_every_engine_has_a_folder():
    of = {rendered(*case).target.partition("-")[0] for case in RENDERS.values()}

    assert of == set(engines())


PAGE = ROOT / "docs" / "explanation" / "memory-plan.md"


def test_the_page_says_what_the_planner_says():
    plan = vllm.plan(
        facts(LLAMA_8B), LLAMA_8B_BYTES, ServeOptions(gpu="nvidia-l40s", max_model_len=8192)
    )
    page = PAGE.read_text("utf-8")

    assert f"{plan.weight_bytes:,} bytes" in page
    assert f"{plan.overhead_bytes:,}" in page
    assert f"{plan.margin_bytes:,}" in page
    assert f"{plan.kv_cache_bytes:,} bytes" in page
    assert f"{plan.kv_cache_bytes // 2**21:,} blocks" in page
    assert f"so {plan.max_num_seqs} requests of {plan.max_model_len} tokens" in page
