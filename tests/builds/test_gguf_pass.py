"""Quantized files are llama-quantize's own, byte for byte, though it never wrote them."""

import json
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from weightsmith.core.errors import InputRefused
from weightsmith.quantizers.gguf_header import read_header
from weightsmith.quantizers.gguf_pass import (
    GgufOutput,
    GgufSource,
    finish,
    read_targets,
    write_files,
)
from weightsmith.quantizers.gguf_rows import StoredRows
from weightsmith.quantizers.gguf_types import FILE_TYPES

from tests.fakes.ggufs import (
    SHAPE,
    TINY,
    beside,
    compare,
    made,
    make_random,
    program,
    run,
    same,
    theirs,
    with_matrix,
)

pytestmark = pytest.mark.builders


@pytest.fixture(scope="module")
def quantized(middle, tmp_path_factory) -> list[Path]:
    """What llama-quantize makes of it, in q4_k_m."""
    return theirs(middle, tmp_path_factory.mktemp("quantized") / "theirs", "q4_k_m")


TYPES = [row.name for row in FILE_TYPES.values() if not row.direct]


def takes(name: str, measured: bool) -> bool:
    """Say whether a type can be made with an importance matrix, or without."""
    row = FILE_TYPES[name]
    return row.takes_imatrix if measured else not row.needs_imatrix


SEARCHED = {"iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs"}
"""Types whose rows llama.cpp searches a codebook for: a minute for this model."""


@pytest.mark.grid(9)
@pytest.mark.parametrize(
    ("name", "measured"),
    [
        pytest.param(
            name,
            measured,
            id=f"{name}-{'with' if measured else 'without'}",
            marks=[pytest.mark.full] * (name in SEARCHED),
        )
        for name in TYPES
        for measured in (False, True)
        if takes(name, measured)
    ],
)
def test_every_type_from_a_16_bit_file(middle, tmp_path, name, measured):
    words = with_matrix(middle, measured=measured)
    done = run(middle, tmp_path, name, importance="imatrix.gguf" if measured else "")
    if "has no importance" in done.stderr:
        assert not measured
        with pytest.raises(subprocess.CalledProcessError):
            theirs(middle, tmp_path / "theirs", name)
        return
    assert done.returncode == 0, done.stderr
    assert same([tmp_path / "demo.gguf"], theirs(middle, tmp_path / "theirs", name, *words))


def test_chosen_types_may_be_floats(middle, tmp_path):
    chosen = {"attn_v": "f16", "attn_k": "bf16", "ffn_up": "f32", "ffn_gate": "q8_0"}
    words = [word for p, t in chosen.items() for word in ("--tensor-type", f"{p}={t}")]

    done = run(middle, tmp_path, "q5_0", tensor_types=chosen)

    assert done.returncode == 0, done.stderr
    assert same([tmp_path / "demo.gguf"], theirs(middle, tmp_path / "theirs", "q5_0", *words))


def test_a_rule_for_tensors_that_the_file_lacks_is_refused(middle, tmp_path):
    done = run(middle, tmp_path, "q5_0", tensor_types={"attn_v": "q8_0", "ffn_gate_exps": "q8_0"})

    assert done.returncode == 3
    assert "no tensor of the GGUF file matches 'ffn_gate_exps'" in done.stderr
    assert not (tmp_path / "demo.gguf").exists()


# test_gguf_architectures.py compares the same for llama in bfloat16.
@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_checkpoint_of_each_type_without_a_file_between(tmp_path, dtype):
    config = LlamaConfig(**{**SHAPE, "hidden_size": 256, "intermediate_size": 512}, vocab_size=512)
    model = make_random(tmp_path / "model", config, TINY / "base", dtype)
    compare(model, tmp_path, str(dtype).removeprefix("torch."))


@pytest.mark.full
def test_several_types_are_made_in_one_pass(tmp_path):
    config = LlamaConfig(**{**SHAPE, "hidden_size": 256, "intermediate_size": 512}, vocab_size=512)
    model = make_random(tmp_path / "model", config, TINY / "base")
    names = ("q4_k_m", "bf16")

    together = beside(model, tmp_path / "together", *names)

    for name in names:
        assert same(together[name], made(model, tmp_path / name, name))


def test_what_float16_cannot_hold_is_refused(tmp_path):
    model = make_random(tmp_path / "model", LlamaConfig(**SHAPE, vocab_size=512), TINY / "base")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    save_file(tensors, model / "model.safetensors", {"format": "pt"})

    with pytest.raises(InputRefused, match=r"blk\.1\.ffn_up\.weight overflows float16"):
        made(model, tmp_path / "ours", "f16")


LAZY = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
import gguf, numpy as np, torch
from conversion.base import LazyTorchTensor
from weightsmith.quantizers import gguf_rows
BF16 = gguf.GGMLQuantizationType.BF16
def load(at, dtype="BF16", rows=4):
    size = rows * 32 * 2
    span = gguf.utility.LocalTensorRange(filename=Path(sys.argv[2]), offset=at * size, size=size)
    local = gguf.utility.LocalTensor(dtype=dtype, shape=(rows, 32), data_range=span)
    return LazyTorchTensor.from_local_tensor(local).to(torch.float32)
turn = lambda t: t.reshape(2, 2, 32).swapaxes(0, 1).reshape(t.shape)
cases = {
    "plain": (lambda: load(0), True),
    "stacked": (lambda: torch.stack([load(0), load(1)], dim=0), True),
    "turned": (lambda: turn(load(0)), True), "turned twice": (lambda: turn(turn(load(0))), True),
    "stacked and turned": (lambda: torch.stack([turn(load(0)), load(1)], dim=0), True),
    "turned as a stack": (
        lambda: torch.stack([load(0), load(1)], dim=0).swapaxes(0, 1), False),
    "turned inside rows": (lambda: load(0).reshape(4, 2, 16).swapaxes(1, 2).reshape(4, 32), False),
    "turned with columns": (lambda: load(0).swapaxes(0, 1).reshape(4, 32), False),
    "turned, plus": (lambda: turn(load(0)) + 1, False), "plus": (lambda: load(0) + 1, False),
    "narrowed": (lambda: load(0, "F16"), False), "stacked otherwise": (
        lambda: torch.stack([load(0), load(1)], dim=1), False),
    "half stacked": (lambda: torch.stack([load(0), load(0) + 1], dim=0), False),
    "turned far": (lambda: turn(load(0)), False),
}
near = gguf_rows._NEAR
for name, (make, in_parts) in cases.items():
    gguf_rows._NEAR = 16 if name == "turned far" else near
    tensor = gguf.quants.quantize(make().numpy(), BF16)
    assert bool(gguf_rows._places(tensor, "BF16", 32)) == in_parts, name
    rows = gguf_rows.rows_of(tensor, "BF16", 32)
    whole = gguf.quants.quantize(make().numpy(), BF16)
    whole = gguf.quants.dequantize(type(whole).to_eager(whole), BF16).reshape(-1, 32)
    np.testing.assert_array_equal(rows(0, len(whole)), whole, err_msg=name)
    np.testing.assert_array_equal(rows(1, 3), whole[1:3], err_msg=name)
"""


@pytest.mark.usefixtures("compiled_kernels")
def test_what_the_converter_passes_on_is_read_in_parts_and_nothing_else(tmp_path):
    """By the lazy tensors of the pinned converter; each is held against what it computes itself."""
    weights = np.random.default_rng(0).standard_normal((8, 32)).astype(ml_dtypes.bfloat16)
    (tmp_path / "weights").write_bytes(weights.tobytes())
    command = [sys.executable, "-c", LAZY, program("").parent / "convert", tmp_path / "weights"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.grid(2)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    config = LlamaConfig(**SHAPE, vocab_size=512)
    model = make_random(tmp_path / "model", config, TINY / "base")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(tensors, model / "model.safetensors", {"format": "pt"})

    with pytest.raises(InputRefused, match=r"blk\.1\.ffn_up\.weight has NaN or infinite weights"):
        made(model, tmp_path / "ours", "q4_k_m")


def test_a_type_without_the_importance_that_it_needs_is_refused(tmp_path):
    with pytest.raises(InputRefused, match="has no importance, which IQ3_XXS needs") as found:
        made(TINY / "base", tmp_path / "ours", "q4_k_m", tensor_types={"ffn_down": "iq3_xxs"})
    assert "imatrix" in found.value.hint


def test_a_matrix_of_another_width_is_refused(tmp_path):
    name = b"blk.0.ffn_up.weight"
    entry = struct.pack("<i", len(name)) + name + struct.pack("<ii", 1, 4) + bytes(16)
    (tmp_path / "imatrix.dat").write_bytes(struct.pack("<i", 1) + entry)
    with pytest.raises(InputRefused, match=r"has 4 values for blk\.0\.ffn_up\.weight") as found:
        made(TINY / "base", tmp_path / "ours", "q4_k_m", tmp_path / "imatrix.dat")
    assert "imatrix" in found.value.hint


def test_parts_importance_and_chosen_types_are_as_llama_quantize_has_them(middle, tmp_path):
    chosen = {"ffn_down": "q8_0", "attn_v": "q5_1", "attn_k": "q6_k", "ffn_up": "iq4_nl"}
    words = [word for p, t in chosen.items() for word in ("--tensor-type", f"{p}={t}")]
    statistics = middle.parent / "imatrix.dat"
    ours = made(
        TINY / "base", tmp_path / "ours", "q4_k_m", statistics,
        tensor_types=chosen, split_max_size="1M", about={"license": "mit"},
    )  # fmt: skip

    # What q4_k_m in parts of 1 MB has in 16 bits.
    first, *_ = made(
        TINY / "base", tmp_path / "parts", "bf16", split_max_size="2M", about={"license": "mit"}
    )
    shutil.copy(statistics, first.parent / "imatrix.gguf")
    words += [*with_matrix(first, measured=True), "--override-kv", "general.license=str:mit"]
    assert same(ours, theirs(first, tmp_path / "theirs", "q4_k_m", *words, "--keep-split"))
    assert len(ours) > 2


def written(middle: Path, out: Path, broken_at: str = "", key: str = "") -> list[str]:
    """Write a file by our pass; return the tensors that were read, up to the one that fails."""
    command = [program("llama-quantize"), "--dry-run", middle, "Q4_K_M"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True)
    header, read = read_header(middle), []

    def rows(entry, kind):
        read.append(entry.name)
        if entry.name == broken_at:
            raise KeyboardInterrupt
        at = header.size + entry.offset
        size = {"rows": entry.rows, "columns": entry.columns}
        return StoredRows(path=middle, kind=kind, offset=at, **size).read

    lines = (printed.stdout + printed.stderr).splitlines()
    source = GgufSource(header=header, rows=rows, stored=lambda *_: np.zeros(0))
    output = GgufOutput(path=out, targets=read_targets(lines), file_type=15, key=key)
    write_files(source, [output], 2)
    finish([out])
    return read


@pytest.mark.usefixtures("kernels")
def test_an_interrupted_file_goes_on_at_the_tensor_that_it_had_reached(middle, tmp_path, quantized):
    out = tmp_path / "demo.gguf"
    broken = "blk.1.ffn_up.weight"
    with pytest.raises(KeyboardInterrupt):
        written(middle, out, broken)
    assert not out.exists()
    journal = tmp_path / ".demo.gguf.journal"
    with journal.open("a") as file:
        file.write("output.wei")  # cut off while it was written

    again = written(middle, out)

    assert again[0] == broken
    assert same([out], quantized)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.gguf"]


@pytest.mark.usefixtures("kernels")
def test_what_follows_a_line_that_was_cut_off_counts_too(middle, tmp_path):
    out, first = tmp_path / "demo.gguf", "blk.1.ffn_up.weight"
    with pytest.raises(KeyboardInterrupt):
        written(middle, out, first)
    with (tmp_path / ".demo.gguf.journal").open("a") as file:
        file.write("output.wei")
    with pytest.raises(KeyboardInterrupt):
        written(middle, out, "blk.3.ffn_up.weight")

    assert first not in written(middle, out)


WATCHED = """
import os, signal
from weightsmith.quantizers.gguf_pass import _Writer
from weightsmith.worker.quantize_gguf import main
add, note, noted = _Writer.add, _Writer._note, []
def tell(writer, source, entry, files):
    print("reads", entry.name, flush=True)
    add(writer, source, entry, files)
def note_some(writer, *given):
    note(writer, *given)
    noted.append(given)
    if len(noted) == LIMIT:
        os.kill(os.getpid(), signal.SIGKILL)
_Writer.add, _Writer._note = tell, note_some
main()
"""


def test_a_killed_program_goes_on_at_the_tensor_that_it_had_reached(middle, tmp_path, quantized):
    killed = run(middle, tmp_path, "q4_k_m", ("-c", WATCHED.replace("LIMIT", "7")))
    assert killed.returncode == -signal.SIGKILL
    _, *lines = (tmp_path / ".demo.gguf.journal").read_text().splitlines()
    noted = [json.loads(line)[0] for line in lines]
    assert len(noted) == 7

    again = run(middle, tmp_path, "q4_k_m", ("-c", WATCHED.replace("LIMIT", "0")))

    assert again.returncode == 0, again.stderr
    read = [line.split()[1] for line in again.stdout.splitlines() if line.startswith("reads ")]
    assert not set(read) & set(noted)
    assert {*read, *noted} == set(read_header(middle).tensors)
    assert same([tmp_path / "demo.gguf"], quantized)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("damage", ["a bit", "the header", "the end", "a line"])
def test_what_an_interrupted_run_wrote_is_read_back_before_it_is_trusted(
    middle, tmp_path, quantized, damage
):
    out, broken = tmp_path / "demo.gguf", "blk.1.ffn_up.weight"
    with pytest.raises(KeyboardInterrupt):
        written(middle, out, broken)
    partial, journal = tmp_path / ".demo.gguf.partial", tmp_path / ".demo.gguf.journal"
    key, *lines = journal.read_text().splitlines()
    name, (at, size, _), *_ = json.loads(lines[-1])
    data = bytearray(partial.read_bytes())
    match damage:
        case "a bit":
            data[at + size // 2] ^= 1
        case "the header":
            data[100] ^= 1
        case "the end":
            del data[at + size // 2 :]
        case "a line":
            lines[-1] = lines[-1].replace("]]", "")
    partial.write_bytes(data)
    journal.write_text("\n".join([key, *lines]) + "\n")

    again = written(middle, out)

    assert damage == "the header" or name in again
    assert json.loads(lines[0])[0] not in again or damage == "the end"
    assert same([out], quantized)


@pytest.mark.usefixtures("kernels")
def test_what_was_begun_from_other_weights_is_begun_anew(middle, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        written(middle, tmp_path / "demo.gguf", "blk.1.ffn_up.weight", key="other")

    assert "token_embd.weight" in written(middle, tmp_path / "demo.gguf", key="these")
