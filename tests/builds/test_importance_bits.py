"""Importance from our own walk has the same bits on CPUs of other makers, with other vectors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from weightsmith.core.cpus import AVX2_LOOPS
from weightsmith.quantizers.architectures import MEASURED
from weightsmith.quantizers.calibration import GENERAL
from weightsmith.quantizers.gguf_importance import WITHOUT_WALK
from weightsmith.quantizers.layerwise import importance as walking

from tests.paths import ROOT
from tests.unit.quantizers.conftest import make_any
from tests.unit.quantizers.test_importance import LINES, importance, tokens_of

pytestmark = [pytest.mark.builders, pytest.mark.timeout(1800)]
MODELS = ("LlamaForCausalLM", "Glm4MoeForCausalLM")
PROGRAM = """
import sys
from pathlib import Path
from weightsmith.forward import native
from weightsmith.quantizers.layerwise.importance import importance, write_importance
from tests.unit.quantizers.test_importance import LINES, tokens_of
assert native.is_fast()
for model in map(Path, sys.argv[1:]):
    write_importance(Path(f"{model}.gguf"), importance(model, LINES, tokens_of(model)))
"""
HERE = """
import sys
from weightsmith.quantizers.gguf_pass import ImportanceWalk
from weightsmith.worker.quantize_gguf import walking
texts, *models = sys.argv[1:]
for model in models:
    with walking(ImportanceWalk(model=model, texts=texts, out=f"{model}-here.gguf")) as measured:
        measured()
"""
LOOPS = """
__and__ _local_scalar_dense _to_copy _unique2 add add_ alias all any arange bitwise_and
bitwise_not cat chunk clone contiguous copy_ cos cumsum detach diff div div_ dropout embedding
empty empty_like eq expand fill_ flatten floor_divide full gather gelu gt histc index index_put_
is_nonzero isfinite isnan item le lift_fresh lt masked_fill masked_fill_ mean mul ne neg new_empty
new_ones new_zeros numpy_T ones pow randn reciprocal repeat_interleave reshape resolve_conj
resolve_neg rsqrt scalar_tensor scatter_ select set_ sigmoid silu sin slice softmax sort split
split_with_sizes square_ stack sub sum tanh tensor_split to topk transpose tril type_as unbind
uniform_ unsqueeze view where zero_ zeros zeros_like
"""
"""Of torch: elementwise, sums along one axis, and what moves values; none calls a library."""


class Watch(TorchDispatchMode):
    """Notes the operations that torch runs in a thread."""

    def __init__(self, seen: set[str]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("kernels")
@pytest.mark.grid(15)
@pytest.mark.parametrize("architecture", sorted(MEASURED - WITHOUT_WALK))
def test_torch_runs_its_own_loops_alone(tmp_path, monkeypatch, architecture):
    model, seen = make_any(tmp_path / "model", architecture), set()
    follow = walking.follow

    def begin(product):
        follow(product)
        Watch(seen).__enter__()

    monkeypatch.setattr(walking, "follow", begin)
    with Watch(seen):
        importance(model, LINES, tokens_of(model))
    assert {"embedding", "softmax"} <= seen
    assert seen - set(LOOPS.split()) == set()


@pytest.mark.usefixtures("kernels")
@pytest.mark.grid(4)
@pytest.mark.parametrize("cpus", [2, 1, 3, 8])
def test_bits_are_those_of_all_batches_at_once(tmp_path, monkeypatch, cpus):
    model = make_any(tmp_path / "model", "LlamaForCausalLM")
    lines = [json.loads(line)["text"] for line in GENERAL.read_text("utf-8").splitlines()]
    monkeypatch.setattr(walking, "CPUS", cpus)
    concurrent = importance(model, lines, 1 << 20)
    assert walking._batch_per_thread(model, concurrent.window)
    assert concurrent.chunks * concurrent.window > 3 * walking._ROWS

    monkeypatch.setattr(walking, "_SMALL", 0)

    at_once = importance(model, lines, 1 << 20)
    assert concurrent.sums.keys() == at_once.sums.keys()
    for name, sums in at_once.sums.items():
        assert np.array_equal(concurrent.sums[name].squares, sums.squares), name
        assert np.array_equal(concurrent.sums[name].counts, sums.counts)


@pytest.mark.full  # a minute of qemu; the first test finds loops that differ between CPUs
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    ("cpu", "names"), [("Haswell", MODELS[:1]), ("EPYC-Rome", MODELS)], ids=["Haswell", "EPYC-Rome"]
)
def test_bits_are_those_of_other_cpus(tmp_path, cpu, names):
    found = (shutil.which(name) for name in ("qemu-x86_64-static", "qemu-x86_64"))
    emulator = next(filter(None, found), "")
    if not emulator:
        pytest.skip("no qemu-x86_64 (tests/engine.sh as root installs it)")
    models = [make_any(tmp_path / name, name) for name in names]
    texts, root = tmp_path / "texts.jsonl", ROOT
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in LINES))
    paths = {**os.environ, "PYTHONPATH": f"{root / 'toolchain'}:{root}"}

    there = [emulator, "-cpu", cpu, sys.executable, "-c", PROGRAM, *models]
    subprocess.run(there, check=True, capture_output=True, env=paths | AVX2_LOOPS)
    here = [sys.executable, "-c", HERE, texts, *models]
    subprocess.run(here, check=True, capture_output=True, env=paths)

    for model in models:
        assert Path(f"{model}-here.gguf").read_bytes() == Path(f"{model}.gguf").read_bytes()
