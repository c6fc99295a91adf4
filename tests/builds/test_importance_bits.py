"""Importance from our own walk has the same bits on CPUs of other makers, with other vectors."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils._python_dispatch import TorchDispatchMode
from weightsmith.cpus import AVX2_LOOPS
from weightsmith.drivers.local import LocalRunner
from weightsmith.job_inputs import Input
from weightsmith.jobs import ImportanceJob
from weightsmith.quantizers.architectures import MEASURED
from weightsmith.quantizers.gguf_calibration import WITHOUT_WALK
from weightsmith.wiring import cache_folder

from tests.fakes.journal import RecordingProgress
from tests.unit.quantizers.test_importance import LINES, importance, make, tokens_of

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
LOOPS = """
__and__ _local_scalar_dense _to_copy _unique2 add add_ alias all any arange bitwise_not cat
chunk clone contiguous copy_ cos cumsum detach diff div div_ dropout embedding empty empty_like
eq expand fill_ flatten floor_divide full gather gelu gt histc index index_put_ is_nonzero
isfinite isnan item le lift_fresh lt masked_fill masked_fill_ mean mul ne neg new_empty new_ones
new_zeros numpy_T ones pow randn reciprocal repeat_interleave reshape resolve_conj resolve_neg
rsqrt scatter_ select set_ sigmoid silu sin slice softmax sort split split_with_sizes square_
stack sub sum tanh to topk transpose tril type_as unbind uniform_ unsqueeze view where zero_
zeros zeros_like
"""
"""Of torch: elementwise, sums along one axis, and what moves values; none calls a library."""


class Watch(TorchDispatchMode):
    """Notes the operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.usefixtures("kernels")
@pytest.mark.grid(9)
@pytest.mark.parametrize("architecture", sorted(MEASURED - WITHOUT_WALK))
def test_torch_runs_its_own_loops_alone(tmp_path, architecture):
    model = make(tmp_path / "model", architecture)
    with Watch() as watch:
        importance(model, LINES, tokens_of(model))
    assert watch.seen
    assert not watch.seen - set(LOOPS.split())


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("cpu", ["Haswell", "EPYC-Rome"])
def test_bits_are_those_of_other_cpus(tmp_path, cpu):
    found = (shutil.which(name) for name in ("qemu-x86_64-static", "qemu-x86_64"))
    emulator = next(filter(None, found), "")
    if not emulator:
        pytest.skip("no qemu-x86_64 (tests/engine.sh as root installs it)")
    models = [make(tmp_path / name, name) for name in MODELS]
    rows = tuple({"text": line, "tokens": 300} for line in LINES)
    root = Path(__file__).parents[2]
    subprocess.run(
        [emulator, "-cpu", cpu, sys.executable, "-c", PROGRAM, *models],
        check=True, capture_output=True,
        env={**os.environ, **AVX2_LOOPS, "PYTHONPATH": f"{root / 'toolchain'}:{root}"},
    )  # fmt: skip
    for model in models:
        out = tmp_path / f"{model.name}-here"
        out.mkdir()
        job = ImportanceJob(builder="gguf", output=out, seconds=0, model=Input(path=model),
                            texts=rows, file="imatrix.gguf")  # fmt: skip
        LocalRunner(cache_folder()).run(job, RecordingProgress())
        assert (out / job.file).read_bytes() == Path(f"{model}.gguf").read_bytes()
