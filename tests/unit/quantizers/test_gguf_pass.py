"""What is read and refused before a quantized file is begun; tests/builds has the files."""

import errno
import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from weightsmith.core.errors import InputRefused
from weightsmith.quantizers import gguf_pass
from weightsmith.quantizers.gguf_header import GgufHeader, GgufTensorInfo
from weightsmith.quantizers.gguf_pass import (
    GgufOutput,
    GgufSource,
    TypeChange,
    read_targets,
    write_files,
)

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
