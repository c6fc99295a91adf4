"""Headers of GGUF files, held against the gguf package; what a pass over the weights refuses."""

import errno
import json
import os
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.quantizers import gguf_pass
from weightsmith.quantizers.gguf_header import (
    GgufHeader,
    GgufTensorInfo,
    changed_values,
    number,
    quantized,
    read_header,
    strings,
)
from weightsmith.quantizers.gguf_pass import (
    GgufOutput,
    GgufSource,
    TypeChange,
    read_targets,
    write_files,
)

from tests.unit.quantizers.conftest import finish


@pytest.fixture
def written(tmp_path):
    """A file with a value of every kind, by gguf-py."""
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_quantization_version(2)
    writer.add_file_type(1)
    writer.add_bool("a.bool", True)
    writer.add_float32("a.float", 1.5)
    writer.add_uint64("a.large", 1 << 40)
    writer.add_array("a.words", ["one", "zwölf"])
    writer.add_array("a.numbers", [1, 2, 3])
    writer.add_license("mit")
    writer.add_uint16("split.no", 0)
    writer.add_tensor("norm", np.ones(64, np.float32))
    writer.add_tensor("flat", np.ones((1, 64), np.float32))
    writer.add_tensor("matrix", np.zeros((3, 64), np.float16))
    finish(writer)
    return path


def test_a_header_is_read_as_the_gguf_package_reads_it(written):
    header, reader = read_header(written), gguf.GGUFReader(written)

    own = {name for name in reader.fields if not name.startswith("GGUF.")}
    assert header.values.keys() == own
    assert strings(header.values["a.words"]) == ["one", "zwölf"]
    assert number(header.values["general.file_type"]) == 1
    found = {t.name: (tuple(map(int, t.shape)), int(t.tensor_type)) for t in reader.tensors}
    assert {e.name: (e.shape, e.kind) for e in header.tensors.values()} == found
    for tensor in reader.tensors:
        assert header.size + header.tensors[tensor.name].offset == tensor.data_offset


def test_a_new_header_has_the_same_values_and_the_changed_ones_last(written, tmp_path):
    header = read_header(written)
    changes = changed_values(15, {"general.license": "apache", "quantize.imatrix.entries_count": 7})
    targets = {"matrix": (int(gguf.GGMLQuantizationType.Q8_0), 3 * 68), "flat": (0, 256)}

    data, offsets = quantized(header, targets, changes)

    path = tmp_path / "new.gguf"
    path.write_bytes(data + bytes(224 + 256))
    reader = gguf.GGUFReader(path)
    names = [name for name in reader.fields if not name.startswith("GGUF.")]
    assert names[-5:-3] == ["general.quantization_version", "general.file_type"]
    assert names[-3:] == ["general.license", "quantize.imatrix.entries_count", "split.no"]
    assert reader.fields["general.file_type"].contents() == 15
    assert reader.fields["general.license"].contents() == "apache"
    assert reader.fields["a.numbers"].contents() == [1, 2, 3]
    tensors = {t.name: t for t in reader.tensors}
    assert [t.name for t in reader.tensors] == ["matrix", "flat"]
    assert {name: t.data_offset for name, t in tensors.items()} == offsets
    assert [int(n) for n in tensors["flat"].shape] == [64]  # as ggml counts dimensions


def test_a_later_part_has_only_its_place(tmp_path, written):
    header = read_header(written)
    part = type(header)(
        values={"split.no": header.values["split.no"]}, tensors=header.tensors, size=0
    )

    data, _ = quantized(part, {"norm": (0, 256)}, changed_values(15, {}))

    (tmp_path / "part.gguf").write_bytes(data)
    assert read_header(tmp_path / "part.gguf").values.keys() == {"split.no"}


def test_what_is_no_gguf_is_refused(tmp_path, written):
    (tmp_path / "other").write_bytes(b"GGML" + bytes(20))
    with pytest.raises(ValueError, match="not a GGUF file"):
        read_header(tmp_path / "other")
    (tmp_path / "cut").write_bytes(written.read_bytes()[:60])
    with pytest.raises(ValueError, match="ends inside its header"):
        read_header(tmp_path / "cut")


PRINTED = """
llama_model_loader: loaded meta data with 29 key-value pairs and 39 tensors from m.gguf
[   1/  39] output_norm.weight                   - [  256,     1,     1,     1], type =    f32, size =    0.001 MiB
[   2/  39] blk.0.ffn_down.weight                - [  768,   256,     1,     1], type =   bf16, size =     0.38 MiB ->     0.11 MiB (q4_K)
[  10/  39] blk.0.ffn_gate_inp.weight            - [  256,     8,     1,     1], type =   bf16, size =    0.004 MiB
llama_model_quantize_impl: model size  =     8.07 MiB (16.00 BPW)
"""  # noqa: E501


def test_types_and_order_are_those_that_llama_quantize_prints():
    assert read_targets(PRINTED.splitlines()) == [
        TypeChange(name="output_norm.weight", kind="F32", target="F32"),
        TypeChange(name="blk.0.ffn_down.weight", kind="BF16", target="Q4_K"),
        TypeChange(name="blk.0.ffn_gate_inp.weight", kind="BF16", target="BF16"),
    ]


NAME = "blk.0.ffn_up.weight"


@pytest.mark.parametrize(
    ("targets", "file_type", "says"),
    [
        ([(NAME, "MXFP4", "Q4_K")], 15, "already quantized"),
        ([(NAME, "BF16", "IQ2_XXS")], 15, "no importance, which IQ2_XXS needs"),
        ([(NAME, "BF16", "Q2_K")], 21, "no importance, which Q2_K needs"),
        ([], 15, "--dry-run differ in"),
        ([(NAME, "BF16", "Q4_K"), ("other", "BF16", "Q4_K")], 15, "--dry-run differ in"),
    ],
)
def test_what_llama_quantize_refuses_is_refused_before_a_file_is_begun(
    tmp_path, targets, file_type, says
):
    entry = GgufTensorInfo(name=NAME, shape=(256, 8), kind=30, offset=0)
    header = GgufHeader(values={}, tensors={NAME: entry}, size=32)
    source = GgufSource(header=header, rows=None, stored=lambda *_: np.zeros(0))
    changes = [TypeChange(name=name, kind=kind, target=to) for name, kind, to in targets]
    output = GgufOutput(path=tmp_path / "demo.gguf", targets=changes, file_type=file_type)

    with pytest.raises((InputRefused, ValueError), match=says):
        write_files(source, [output], 1)

    assert not list(tmp_path.iterdir())


def test_nothing_counts_as_finished_after_a_fault_of_the_disk(tmp_path, monkeypatch):
    """The system tells of a lost write once, whoever's it was: the next call succeeds."""
    faults = iter([None, OSError(errno.EIO, "Input/output error"), None, None])

    def sync(_file):
        if fault := next(faults):
            raise fault

    monkeypatch.setattr(os, "fdatasync", sync)
    writer, journal = gguf_pass._Writer(1), tmp_path / "journal"
    with journal.open("wb") as log:
        file = SimpleNamespace(out=0, log=log.fileno())
        writer._note("first", [], [file])
        for name in ("second", "third"):
            with pytest.raises(OSError, match="Input/output"):
                writer._note(name, [], [file])

    assert [json.loads(line) for line in journal.read_text().splitlines()] == [["first"]]
