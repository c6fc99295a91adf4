"""Jobs as JSON, and what they say of their inputs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from weightsmith.core.jobs import (
    AskedModel,
    AskedTask,
    AskedWalk,
    CacheScalesJob,
    CombinationRule,
    ConvertAdaptersJob,
    DequantizedJob,
    DequantizedTask,
    ExportEngineJob,
    ImportGgufJob,
    Input,
    Job,
    LayerTimeJob,
    MergeJob,
    ProofJob,
    QualityJob,
    QuantizeJob,
    Question,
    ReadCallsJob,
    ReferenceJob,
    ValidateJob,
    Virtual,
    read_job,
    write_job,
)
from weightsmith.core.merge_options import Merge
from weightsmith.core.values import (
    Checkpoint,
    Digest,
    FileEntry,
    Snapshot,
    Sources,
    Tree,
    UnreadDigest,
    VirtualWeights,
)
from weightsmith.worker.jobs import STAGES

from tests.fakes.echo import EchoJob

ENTRY = FileEntry(path="model.safetensors", size=3, digest=Digest.of(b"abc"))
TREE = Tree(root=Path("/store/é"), files=(ENTRY,))
KNOWN, UNKNOWN = Input.tree(TREE), Input(path=Path("/home/model"))
CHAT = ({"role": "user", "content": "Wie heißt es?\n"},)
ENVELOPE: dict[str, Any] = {"builder": "merge", "output": Path("/out"), "seconds": 90}
OPTIONS = Merge(method="ties", density=0.5, seed=7)
REFERENCE = ReferenceJob(
    **ENVELOPE,
    models=(KNOWN, UNKNOWN),
    adapters=(UNKNOWN,),
    walks=(
        AskedWalk(
            tasks=(
                AskedTask(
                    models=(
                        AskedModel(name="a", key="1", model=1, adapters=(0,), weights=(0.5,)),
                        AskedModel(name="m", key="2", model=0, draft="1", draft_texts=("x",)),
                    ),
                    questions=(Question(messages=CHAT, choices=("a", "b"), plain=True),),
                    max_tokens=8,
                ),
            ),
            choose=True,
            batch_bytes=1 << 28,
        ),
    ),
)
VALIDATION = ValidateJob(
    **ENVELOPE,
    base=KNOWN,
    merged=UNKNOWN,
    adapters=(),
    weights=(),
    chats=(CHAT, CHAT * 2),
    scope="rest",
    mixture=CombinationRule(truncates=True, rank=4),
)
JOBS = (
    MergeJob(
        **ENVELOPE,
        base=KNOWN,
        adapters=(KNOWN, UNKNOWN),
        weights=(1.0, -0.5),
        options=OPTIONS,
        keep_adapter=True,
        memory_bytes=1 << 40,
        use_gpu=True,
    ),
    VALIDATION,
    REFERENCE,
    ImportGgufJob(**ENVELOPE, gguf=Input.file(TREE, "model.safetensors")),
    QuantizeJob(
        **ENVELOPE,
        model=KNOWN,
        quantizer="gguf",
        format="q4_k_m",
        name="demo",
        options={"tensor_types": {"output": "q8_0"}, "keep": ["a"], "none": None},
        texts=({"text": "a"}, {"messages": list(CHAT)}),
        statistics=Input.file(TREE, "model.safetensors"),
    ),
    ConvertAdaptersJob(**ENVELOPE, base=KNOWN, adapters=(UNKNOWN, KNOWN), folders=("a", "b")),
    QualityJob(
        **ENVELOPE,
        model=KNOWN,
        artifact=UNKNOWN,
        quantizer="gguf",
        texts=({"text": "a"},),
        tokens=9,
        virtual=Virtual(
            base=KNOWN,
            adapters=(UNKNOWN, KNOWN),
            weights=(1.0, 0.5),
            options=OPTIONS,
            digests={"model.safetensors": "ab"},
            largest={"a.weight": 0.125, "b.weight": 2.0},
        ),
    ),
    ExportEngineJob(**ENVELOPE),
    ProofJob(
        **ENVELOPE,
        validation=replace(VALIDATION, adapters=(KNOWN,), weights=(1.0,), mixture=None),
        reference=REFERENCE,
    ),
    CacheScalesJob(**ENVELOPE, model=UNKNOWN, texts=({"text": "a"},)),
    LayerTimeJob(**ENVELOPE, model=UNKNOWN, counts=(8, 256)),
    ReadCallsJob(
        **ENVELOPE,
        model=KNOWN,
        packages=UNKNOWN,
        parsers=("hermes", "xlam"),
        thoughts="",
        tools=({"type": "function", "function": {"name": "f"}},),
        chats=({"name": "a call", "said": {"role": "assistant"}, "calls": [["f", {}]]},),
        reasoners=("qwen3",),
        thinking={"said": {"role": "assistant"}, "thoughts": "?"},
    ),
    DequantizedJob(
        **ENVELOPE,
        model=KNOWN,
        artifact=UNKNOWN,
        quantizer="rounded",
        tasks=(DequantizedTask(questions=(Question(messages=CHAT),), max_tokens=8, choose=False),),
    ),
    EchoJob(**ENVELOPE, text=UNKNOWN, try_to_write=("/x",), targets={"port": 1}),
)


def test_each_kind_is_here_and_has_its_function() -> None:
    assert sorted(job.kind for job in JOBS) == sorted(STAGES)


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"seconds": "soon"}, "merge.seconds"),
        ({"seconds": True}, "merge.seconds"),
        ({"base": "/base"}, "merge.base"),
        ({"base": {"path": "/b", "files": [{"path": "a", "size": 1}]}}, "merge.base.files"),
        ({"base": {"path": "/b", "files": [{"path": "a", "size": 1, "digest": "x"}]}}, "sha256"),
        ({"weights": [1.0, None]}, r"merge.weights\[1\]"),
        ({"options": {"method": "ties"}}, "merge.options"),
        ({"options": {**asdict(OPTIONS), "method": "mean"}}, r"merge\.options\.method"),
        ({"options": {**asdict(OPTIONS), "density": "half"}}, r"merge\.options\.density"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_is_wrong_is_found_where_it_is_read(change: Any, place: str) -> None:
    data = json.loads(write_job(JOBS[0]))
    data["job"].update(change)

    with pytest.raises(ValueError, match=place):
        read_job(json.dumps(data))


def test_a_job_names_what_it_reads() -> None:
    assert list(JOBS[0].inputs) == ["adapter0", "adapter1", "base"]
    assert list(JOBS[4].inputs) == ["model", "statistics"]
    assert JOBS[7].inputs == {}
    virtual = ["virtual_base", "virtual_adapter0", "virtual_adapter1"]
    assert list(JOBS[6].inputs) == ["model", "artifact", *virtual]


def test_a_job_gets_the_files_that_are_there() -> None:
    sources = Sources(base=Snapshot(tree=TREE, source="base", pin="base", pinned=True))
    there = Tree(root=TREE.root, files=(replace(ENTRY, size=2, digest=Digest.of(b"ab")),))
    most = {"a.weight": 0.5}
    computed = VirtualWeights(tree=there, sources=sources, merge=asdict(OPTIONS), largest=most)

    assert Input.checkpoint(Checkpoint(tree=TREE)).files == TREE.files
    assert Input.checkpoint(Checkpoint(tree=TREE, computed=computed)).files == there.files
    assert Virtual.of(Checkpoint(tree=TREE)) is None
    virtual = Virtual.of(Checkpoint(tree=TREE, computed=computed))
    assert (virtual.options, virtual.largest) == (OPTIONS, most)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.kind)
def test_a_job_is_the_same_behind_the_wire_and_but_for_paths_in_another_place(job: Job) -> None:
    assert read_job(write_job(job)) == job
    there = {name: given.at(Path("/in", name)) for name, given in job.inputs.items()}

    moved = job.at(there, Path("/elsewhere"))

    assert {n: given.path for n, given in moved.inputs.items()} == {
        n: Path("/in", n) for n in there
    }
    assert moved.output == Path("/elsewhere")
    assert moved.at(job.inputs, job.output) == job


def test_a_reference_says_whether_its_content_is_known_and_one_to_a_file_is_to_itself() -> None:
    unread = replace(ENTRY, path="large", digest=UnreadDigest.of(b"stamp"))
    given = Input.file(TREE, "model.safetensors")

    assert KNOWN.files == (ENTRY,)
    assert Input.tree(replace(TREE, files=(ENTRY, unread))).files is None
    assert given.path == Path("/store/é/model.safetensors")
    assert [given.path / entry.path for entry in given.files or ()] == [given.path]
