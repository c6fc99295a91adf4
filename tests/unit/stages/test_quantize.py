"""Quantizing in the store: what is resumed, what is shared, and what a change does again."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from weightsmith.core.errors import CheckFailed, EnvironmentFailure, InputRefused
from weightsmith.core.jobs import Input, QuantizeJob, SiblingFormat
from weightsmith.core.resources import compiled_engines
from weightsmith.core.values import Checkpoint, Digest, FileEntry, Tree
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.calibration import GENERAL, read_texts
from weightsmith.quantizers.quantizer import BuilderCommand, QuantizeRequest
from weightsmith.recipe.schema import TextBounds
from weightsmith.stages import quantize as stage
from weightsmith.stages.quantize import QuantizeOptions, quantize
from weightsmith.steps.destinations import InStore
from weightsmith.worker import jobs
from weightsmith.worker import steps as steps_of

from tests.fakes.memory import memory_tools

TEXTS = read_texts(GENERAL, TextBounds())


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "model").mkdir()
    entry = FileEntry(path="config.json", size=2, digest=Digest.of(b"{}"))
    return Checkpoint(tree=Tree(root=tmp_path / "model", files=(entry,)))


def quantizer_job(job, _report):
    """Do what the worker does to the output, without the programs."""
    given = job.statistics
    if job.texts and not given:
        (job.output / "imatrix.gguf").write_text("measured")
    (job.output / "demo.gguf").write_text(job.format)
    facts = {"given": given.path.read_text() if given else ""}
    for one in job.siblings:
        (job.output / one.folder).mkdir()
        (job.output / one.folder / "demo.gguf").write_text(one.format)
    return {**facts, "siblings": {one.format: facts for one in job.siblings}}


@pytest.fixture
def tools(tmp_path):
    return memory_tools(tmp_path, {"quantize": quantizer_job})


def wanted(name="q4_k_m", texts=TEXTS):
    options = of_format(name).options(formats()[name], {})
    return QuantizeOptions(name="demo", format=formats()[name], options=options, texts=texts)


def test_a_second_type_takes_the_importance_matrix_of_the_first(checkpoint, tools):
    """Nothing is made again, and other texts are measured anew."""
    first = quantize(checkpoint, wanted("q4_k_m"), InStore(tools.store), tools).value
    second = quantize(checkpoint, wanted("iq4_xs"), InStore(tools.store), tools).value

    assert first.details["given"] == ""
    assert second.details["given"] == "measured"
    assert [file.path for file in first.tree.files] == ["demo.gguf"]

    quantize(checkpoint, wanted("q4_k_m"), InStore(tools.store), tools)
    assert len(tools.runner.jobs) == 2
    fewer = replace(TEXTS, calibration=TEXTS.calibration[:-1])
    other = quantize(checkpoint, wanted("iq4_xs", fewer), InStore(tools.store), tools).value
    assert other.details["given"] == ""


def test_importance_of_a_walk_is_measured_again_with_other_kernels(monkeypatch):
    """Their order of sums decides its last bits."""
    checkpoint, key = Digest.of(b"model"), stage.walked_inputs(Digest.of(b"model"), TEXTS).key
    walked = replace(wanted(), options={"imatrix": "walk"})
    file = stage.inputs(checkpoint, walked).key

    # Their sources are in the pins of the builder that compiles them.
    assert "kernels" in compiled_engines(stage.WALK_BUILDER)
    monkeypatch.setattr(stage, "builder_pins", lambda name: Digest.of(f"other {name}".encode()))

    assert stage.walked_inputs(checkpoint, TEXTS).key != key
    assert stage.inputs(checkpoint, walked).key != file


def test_a_walk_is_kept_under_a_key_of_its_own(checkpoint, tools):
    """It is not llama-imatrix's measurement, whose last bits differ."""
    walked = replace(wanted(), options={"imatrix": "walk"})
    quantize(checkpoint, wanted(), InStore(tools.store), tools)

    first = quantize(checkpoint, walked, InStore(tools.store), tools).value
    second = replace(walked, format=formats()["iq4_xs"])
    again = quantize(checkpoint, second, InStore(tools.store), tools).value

    assert [made.details["given"] for made in (first, again)] == ["", "measured"]
    assert tools.store.find(stage.walked_inputs(checkpoint.digest, TEXTS).key)


def test_one_pass_begins_with_the_same_format_whichever_is_asked_for_first(checkpoint, tools):
    """Two builds with the formats in another order would wait for each other in the store."""
    asked = [wanted("q5_k_m", None), wanted("q4_k_m"), wanted("q6_k", None)]
    for order in (asked, asked[::-1]):
        tools.store.entries.clear()
        tools.runner.jobs.clear()

        made = quantize(checkpoint, order[0], InStore(tools.store), tools, siblings=order)
        rest = [quantize(checkpoint, one, InStore(tools.store), tools) for one in order[1:]]

        (job,) = tools.runner.jobs
        assert job.format == "q4_k_m"  # which needs the importance matrix
        assert [one.format for one in job.siblings] == ["q5_k_m", "q6_k"]
        assert (made.cached, [one.cached for one in rest]) == (False, [True, True])
        assert made.value.format == order[0].format


def test_formats_of_one_pass_share_the_file_that_importance_is_measured_on(
    checkpoint, tools, monkeypatch
):
    large = [FileEntry(path="model.safetensors", size=1 << 40, digest=Digest.of(b"weights"))]
    model = replace(
        checkpoint, tree=replace(checkpoint.tree, files=(*checkpoint.tree.files, *large))
    )
    asked: list[int] = []
    monkeypatch.setattr(tools.store, "require_room", lambda size, _what: asked.append(size))

    quantize(model, wanted("q4_k_m"), InStore(tools.store), tools, siblings=[wanted("iq4_xs")])

    assert 1 << 40 < asked[0] < 2 << 40


def python(code: str, **more) -> BuilderCommand:
    return BuilderCommand(title=code[:20], argv=(sys.executable, "-c", code), env={}, **more)


def add(name: str) -> str:
    return f"open({name!r}, 'a').write('x')"


@pytest.fixture
def request_(tmp_path):
    (tmp_path / "out").mkdir()
    return QuantizeRequest(
        model=tmp_path,
        format=formats()["q4_k_m"],
        output=tmp_path / "out",
        name="demo",
        tools=tmp_path,
        python=sys.executable,
        options={},
    )


def run(steps, request_):
    steps_of.run_steps(steps, request_.output, lambda *_: None)


def test_a_killed_quantization_does_not_repeat_what_it_finished(request_):
    good, bad = python(add("first")), python("raise SystemExit(9)")
    with pytest.raises(EnvironmentFailure):
        run((good, bad), request_)

    run((good, python(add("second"))), request_)

    assert (request_.output / "first").read_text() == "x"
    assert (request_.output / "second").read_text() == "x"
    run((python(add("first") + "  "),), request_)  # another command
    assert (request_.output / "first").read_text() == "xx"


def test_what_was_done_is_forgotten_by_one_deletion(request_):
    """A kill between two would leave a step that is done and the next without its input."""
    run((python(add("first")), python(add("second"))), request_)
    assert {path.name for path in request_.output.iterdir()} == {"first", "second", ".done"}

    steps_of.forget_steps(request_.output)
    assert {path.name for path in request_.output.iterdir()} == {"first", "second"}


@pytest.mark.parametrize(
    ("ends", "error", "without_input"),
    [
        ("raise KeyError('n_ctx')", InputRefused, EnvironmentFailure),
        ("raise MemoryError()", MemoryError, MemoryError),
    ],
)
def test_a_converters_exception_is_about_its_input(request_, ends, error, without_input):
    with pytest.raises(error, match=r"raise|KeyError: 'n_ctx'"):
        run((python(ends, reads="the model"),), request_)
    with pytest.raises(without_input):
        run((python(ends),), request_)


def test_what_a_step_needs_no_more_is_removed_after_it(request_):
    between = request_.output / ".demo.f16.gguf"
    split = request_.output / ".demo.f16-00001-of-00002.gguf"
    between.write_text("")
    split.write_text("")

    run((python("", removes=(between, between.with_name(".demo.f16-*.gguf"))),), request_)

    assert not between.exists()
    assert not split.exists()


def test_names_of_files_are_filled_in(request_):
    (request_.output / "m-2.gguf").write_text("")
    (request_.output / "m-1.gguf").write_text("abc")
    step = BuilderCommand(title="", argv=("x", "{first}"), env={}, finds={"first": "m-*.gguf"})

    assert steps_of._filled(step, request_.output) == ("x", str(request_.output / "m-1.gguf"))


def test_a_refused_file_is_made_from_the_start_the_next_time(request_, monkeypatch, tmp_path):
    def check(_):
        raise CheckFailed("wrong")

    quantizer = replace(of_format("q4_k_m"), steps=lambda _: (python(add("first")),), check=check)
    monkeypatch.setattr(jobs, "_quantizer", lambda _: quantizer)
    job = job_of(request_)
    for _ in range(2):
        with pytest.raises(CheckFailed):
            jobs.STAGES["quantize"](job, lambda *_: None)

    assert (request_.output / "first").read_text() == "xx"


def job_of(request_, *siblings):
    return QuantizeJob(
        builder="gguf",
        model=Input(path=request_.model),
        quantizer="gguf",
        format="q4_k_m",
        name="demo",
        options={},
        output=request_.output,
        seconds=0,
        siblings=tuple(SiblingFormat(format=name, options={}) for name in siblings),
    )


@pytest.mark.parametrize(("before", "now"), [(["q5_k_m"], []), ([], ["q5_k_m"])])
def test_a_run_with_other_formats_beside_takes_nothing_from_a_killed_one(
    request_, monkeypatch, before, now
):
    killed = True

    def steps(request):
        """Make all files in one step, whose words do not name them."""
        files = request.output / ".files"
        names = [str(one.output / "demo.gguf") for one in (request, *request.siblings)]
        code = "[open(name, 'w').close() for name in open('.files').read().split()]"
        return (python(code, writes={files: " ".join(names)}, removes=(files,)),)

    def check(request):
        if killed:
            raise KeyboardInterrupt
        assert (request.output / "demo.gguf").is_file()
        return {}

    quantizer = replace(of_format("q4_k_m"), steps=steps, check=check)
    monkeypatch.setattr(jobs, "_quantizer", lambda _: quantizer)
    with pytest.raises(KeyboardInterrupt):
        jobs.STAGES["quantize"](job_of(request_, *before), lambda *_: None)
    (request_.output / ".job.json").write_text("of a checkpoint without weights")
    (request_.output / ".engine").mkdir()  # a step's result, which the next one reads

    killed = False
    jobs.STAGES["quantize"](job_of(request_, *now), lambda *_: None)

    left = {path.name for path in request_.output.iterdir()}
    assert left == {"demo.gguf", ".engine", *(f".{name}" for name in now)}


def test_a_job_that_only_rounds_gets_less_time_than_one_that_searches():
    """A hanging job on 70 billion weights ends after a day, not after weeks."""
    seconds = {
        name: stage.job_of(
            Input(path=Path("model")), 141 * 10**9, wanted(name, None), Path()
        ).seconds
        for name in ("nvfp4a16", "awq")
    }

    assert seconds["nvfp4a16"] < 30 * 3600 < seconds["awq"]
