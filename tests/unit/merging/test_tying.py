"""Which weight embedding and head share, and what the head is called, as transformers has it."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
import weightsmith.merging.tying as module
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from weightsmith.merging.tying import find_tie

from tests.unit.merging.tensors import close, delta, random, run

FILE = Path(module.__file__).with_name("tied_heads.json")
TASKS = (
    *("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"),
    "IMAGE_TEXT_TO_TEXT",
)
RENAMED = {"gpt_neox": "embed_out"}
"""Files have the name of transformers 4, which 5 renames when it loads them."""
OTHERS = ("embed_tokens", "embedding", "relative", "patches", "entity", "\\")
"""Parts of names of other tied weights, such as the embeddings of decoders, and patterns."""


def heads_of(model: str, classes: Any) -> set[str]:
    """Return the tied heads of a model's classes."""
    names = [classes] if isinstance(classes, str) else list(classes)
    tied = [getattr(getattr(transformers, n, None), "_tied_weights_keys", None) for n in names]
    keys = [key for each in tied if isinstance(each, dict) for key in each]
    heads = {key.removesuffix(".weight") for key in keys if key.endswith(".weight")}
    words = {head for head in heads if not any(part in head for part in OTHERS)}
    return {RENAMED.get(model, head) for head in words}


def told_by_transformers() -> dict[str, tuple[str, bool]]:
    """Return model type -> head, and whether it is tied by default."""
    found = {}
    for task in TASKS:
        for model, classes in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            heads = heads_of(model, classes)
            if not heads:
                continue
            (head,) = heads
            try:
                tied = getattr(CONFIG_MAPPING[model](), "tie_word_embeddings", False)
            except StrictDataclassError:  # a class whose own defaults it refuses
                continue
            assert found.setdefault(model, (head, tied)) == (head, tied), model
    return {model: row for model, row in sorted(found.items()) if row != ("lm_head", False)}


@pytest.mark.slow
def test_the_heads_are_those_of_transformers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = told_by_transformers()
    if os.environ.get("UPDATE_GOLDEN"):
        rows = [f"{json.dumps(kind)}: {json.dumps(row)}" for kind, row in told.items()]
        FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", "utf-8")
    written = {kind: tuple(row) for kind, row in json.loads(FILE.read_text("utf-8")).items()}
    assert written == told, f"transformers {transformers.__version__}: UPDATE_GOLDEN=1 writes it"


@pytest.mark.parametrize(
    ("config", "names", "head"),
    [
        # Whisper's default is tied, and its file has no head.
        ({"model_type": "whisper"}, ["model.decoder.embed_tokens.weight"], "proj_out.weight"),
        # RWKV's is not tied: its head is in the file, under a name of its own.
        ({"model_type": "rwkv"}, ["rwkv.embeddings.weight", "head.weight"], None),
        # The class ties, although the file has a copy of the head.
        (
            {"model_type": "opt", "architectures": ["OPTForCausalLM"]},
            ["model.decoder.embed_tokens.weight", "lm_head.weight"],
            "lm_head.weight",
        ),
        ({"model_type": "llama"}, ["model.embed_tokens.weight", "lm_head.weight"], None),
        (
            {"model_type": "bert-generation", "architectures": ["BertGenerationDecoder"]},
            ["bert.embeddings.word_embeddings.weight", "lm_head.bias"],
            "lm_head.decoder.weight",
        ),
    ],
)
def test_the_shared_weight_and_its_head(
    config: dict[str, Any], names: list[str], head: str | None
) -> None:
    tie = find_tie(config, dict.fromkeys(names))

    assert (tie and tie.head) == head


def test_a_layer_with_the_name_of_another_models_head_is_no_head(tmp_path: Path) -> None:
    """Janus ties its head, and has layers called `proj_out`, as Whisper's head is."""
    name, table = "model.generation_head.proj_out", "model.language_model.embed_tokens"
    base = {f"{name}.weight": random(6, 4), f"{table}.weight": random(8, 4)}
    a, b = random(2, 4), random(6, 2)

    found = run(
        tmp_path,
        base,
        {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b},
        {"target_modules": [name]},
        model_type="janus",
        architectures=["JanusForConditionalGeneration"],
        tie_word_embeddings=True,
    )

    assert found.keys() == base.keys()
    close(found[f"{name}.weight"], base[f"{name}.weight"].double() + delta(a, b))
