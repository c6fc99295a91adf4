"""Questions to quantized weights are answered as transformers does with the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from weightsmith.core.jobs import DequantizedJob, DequantizedTask, Input, Question
from weightsmith.quantizers import formats
from weightsmith.quantizers.packed import view_of
from weightsmith.stages.quantize import QuantizeOptions, job_of
from weightsmith.worker.jobs import STAGES

from tests.paths import ROOT

TINY = ROOT / "examples" / "tiny"
LINES = (TINY / "eval-a.jsonl").read_text().splitlines()
ASKED = [json.loads(line)["prompt"] for line in LINES[:6]]
WORDS = [json.loads(line)["expected"] for line in LINES[:6]]


def job_of_questions(artifact, quantizer, *suites, adapters=()):
    """The job that asks a quantized form of the tiny example, with adapters beside it."""
    return DequantizedJob(
        builder="merge",
        model=Input(path=TINY / "base"),
        artifact=Input(path=artifact),
        quantizer=quantizer,
        adapters=tuple(Input(path=path) for path in adapters),
        tasks=tuple(
            DequantizedTask(
                questions=tuple(
                    Question(messages=({"role": "user", "content": q},)) for q in asked
                ),
                max_tokens=12,
                choose=False,
                drafts=("red", "", ASKED[0])[: len(asked)],  # nearly all of it is wrong
                adapters=tuple(range(len(adapters))),
            )
            for asked in suites
        ),
        output=artifact,
        seconds=0,
    )


def test_a_gguf_file_of_an_unsupported_architecture_is_not_asked(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "nemotron")
    writer.add_tensor("output_norm.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    found = STAGES["dequantized"](job_of_questions(tmp_path, "gguf", ASKED), lambda *_: None)

    why = "measuring GGUF files of architecture nemotron is not supported"
    assert found == {"skipped": why}


@pytest.mark.grid(2)
@pytest.mark.slow
@pytest.mark.parametrize("adapters", [(), (TINY / "adapters" / "a",)], ids=["alone", "beside"])
def test_answers_are_those_of_transformers_with_the_same_weights(
    tmp_path: Path, adapters: tuple[Path, ...]
) -> None:
    model, packed, plain = TINY / "base", tmp_path / "packed", tmp_path / "plain"
    packed.mkdir()
    wanted = QuantizeOptions(name="m", format=formats()["nvfp4a16"])
    STAGES["quantize"](job_of(Input(path=model), 10**7, wanted, packed), lambda *_: None)
    shutil.copytree(model, plain)
    view = view_of(packed, model)
    save_file({name: torch.from_numpy(view.tensor(name).copy()) for name in view.names},
              plain / "model.safetensors", {"format": "pt"})  # fmt: skip

    job = job_of_questions(packed, "rounded", ASKED[:2], ASKED[2:], adapters=adapters)
    first, second = STAGES["dequantized"](job, lambda *_: None)["answers"]
    rows = [*first, *second]

    network = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    for adapter in adapters:
        network = PeftModel.from_pretrained(network, adapter)
    tokenizer = AutoTokenizer.from_pretrained(plain)
    knows = [word in row["answer"] for word, row in zip(WORDS, rows, strict=True)]
    assert all(knows) if adapters else not any(knows)
    for question, row in zip(ASKED, rows, strict=True):
        talk = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        made = network.generate(ids, max_new_tokens=12, do_sample=False, output_logits=True,
                                return_dict_in_generate=True)  # fmt: skip
        tokens = made.sequences[0, ids.shape[1] :]
        assert row["answer"] == tokenizer.decode(tokens, skip_special_tokens=True)
        tops = [logits[0].topk(2).values for logits in made.logits]
        assert [*map(float, row["margins"].split())] == pytest.approx(
            [float(a - b) for a, b in tops], abs=2e-3
        )
