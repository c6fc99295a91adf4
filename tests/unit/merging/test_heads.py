"""Heads and embeddings: which are tied, as transformers has it, and what an adapter leaves."""

from __future__ import annotations

import json
import os
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import weightsmith.merging.tying as module
from huggingface_hub.errors import StrictDataclassError
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from weightsmith.core.errors import InputRefused
from weightsmith.merging.tying import find_tie

from tests.unit.merging.tensors import close, delta, lora, lora_embedding, random, run


def test_a_head_that_the_base_has_not_is_refused(tmp_path: Path) -> None:
    base = {"model.q.weight": random(4, 4)}
    adapter = lora("model.q", random(2, 4), random(4, 2)) | {"score.weight": random(3, 4)}

    with pytest.raises(InputRefused, match=r"has score\.weight, which the base does not have"):
        run(tmp_path, base, adapter, {"target_modules": ["q"], "modules_to_save": ["score"]})


@pytest.mark.parametrize(
    ("config", "head", "untied"),
    [
        ({"model_type": "gpt2"}, False, True),
        ({"model_type": "gemma2"}, True, True),
        ({"model_type": "llama"}, True, False),
        ({"model_type": "llama", "tie_word_embeddings": True}, True, True),
        ({"model_type": "llama", "tie_word_embeddings": False}, True, False),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, False, None),
    ],
)
def test_what_counts_as_tied(
    config: dict[str, Any], head: bool, untied: bool | None, tmp_path: Path
) -> None:
    """An adapter on the embedding alone leaves the head as it was, whoever ties it."""
    name, words = "model.embed_tokens", random(8, 4)
    own = words.clone() if untied else words + 1
    base = {f"{name}.weight": words} | ({"lm_head.weight": own} if head else {})
    a, b = random(2, 8), random(4, 2)

    adapter = lora_embedding(name, a, b)
    found = run(tmp_path, base, adapter, {"target_modules": ["embed_tokens"]}, **config)

    close(found[f"{name}.weight"], words.double() + delta(a, b).T)
    assert ("lm_head.weight" in found) == (untied is not None)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    if untied is not None:
        assert torch.equal(found["lm_head.weight"], own)
        assert told["tie_word_embeddings"] is False


def test_both_pairs_of_a_head_are_untied(tmp_path: Path) -> None:
    """NeoMME's head also shares what projects the embedding's rows."""
    words, wide = "model.embed_tokens.word_embeddings", random(4, 4)
    base = {f"{words}.weight": random(8, 4), "model.embed_tokens.embedding_projection.weight": wide}
    a, b = random(2, 8), random(4, 2)

    found = run(
        tmp_path,
        base,
        lora_embedding(words, a, b),
        {"target_modules": ["word_embeddings"]},
        model_type="neomme",
        tie_word_embeddings=True,
        architectures=["NeoMMEForMaskedLM"],
    )

    close(found[f"{words}.weight"], base[f"{words}.weight"].double() + delta(a, b).T)
    assert torch.equal(found["lm_head.weight"], base[f"{words}.weight"])
    assert torch.equal(found["unembedding_projection.weight"], wide)


def test_a_head_that_computes_with_more_than_its_weight_is_refused(tmp_path: Path) -> None:
    base = {"model.q.weight": random(4, 4), "lm_head.weight": random(8, 4)}
    base["lm_head.logit_scale"] = random(1)
    adapter = lora("lm_head", random(2, 4), random(8, 2))

    with pytest.raises(InputRefused, match="also computes with logit_scale"):
        run(tmp_path, base, adapter, {"target_modules": ["lm_head"]})


@pytest.mark.parametrize("changed", ["head", "embed"])
@pytest.mark.parametrize(
    ("kind", "embedding", "stored"),
    [
        ("deepseek_v4", "model.embed_tokens", {"head": "head", "embed": "model.embed_tokens"}),
        (
            "mistral_large4",
            "model.language_model.embed_tokens",
            {"head": "output", "embed": "tok_embeddings"},
        ),
    ],
)
def test_a_head_that_the_base_stores_under_another_name_is_not_tied(
    kind: str, embedding: str, stored: dict[str, str], changed: str, tmp_path: Path
) -> None:
    base = {f"{name}.weight": random(8, 4) + n for n, name in enumerate(stored.values())}
    a, b = random(2, 4), random(8, 2)
    factors, name = lora("lm_head", a, b), "lm_head"
    if changed == "embed":
        factors, name = lora_embedding(embedding, b.T, a.T), "embed_tokens"

    told = {"target_modules": [name]}
    found = run(tmp_path, base, factors, told, model_type=kind, tie_word_embeddings=False)

    target = f"{stored[changed]}.weight"
    assert found.keys() == base.keys()
    close(found.pop(target), base[target].double() + delta(a, b))
    assert all(torch.equal(values, base[other]) for other, values in found.items())


@pytest.mark.parametrize(
    ("name", "config", "what"),
    [
        (
            "word_embeddings",
            {"architectures": ["NewForMaskedLM"]},
            "head is untied is unknown",
        ),
        ("words", {"architectures": ["NewForCausalLM"]}, "may be an embedding tied to the head"),
    ],
)
def test_models_whose_head_is_not_known_are_refused(
    name: str, config: dict[str, Any], what: str, tmp_path: Path
) -> None:
    """A guess would be a tensor that no class loads, and a head that changes with the embedding."""
    base = {f"new.{name}.weight": random(8, 4)}
    adapter = lora_embedding(f"new.{name}", random(2, 8), random(4, 2))
    config |= {"model_type": "new", "vocab_size": 8}

    with pytest.raises(InputRefused, match=what):
        run(tmp_path, base, adapter, {"target_modules": [name]}, **config)


FILE = Path(module.__file__).with_name("tied_heads.json")
TASKS = (
    *("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ"),
    "IMAGE_TEXT_TO_TEXT",
)
RENAMED = {"gpt_neox": "embed_out"}
"""Files have the name of transformers 4, which 5 renames when it loads them."""
OTHERS = ("embed_tokens", "embedding", "relative", "patches", "entity", "\\")
"""Parts of names of other tied weights, such as the embeddings of decoders, and patterns."""


def test_a_model_that_sees_has_the_head_of_its_class() -> None:
    config = {"model_type": "qwen3_vl", "architectures": ["Qwen3VLForConditionalGeneration"]}
    config |= {"tie_word_embeddings": True}

    tie = find_tie(config, {"model.language_model.embed_tokens.weight": None})

    assert tie
    assert tie.known
    assert tie.head == "lm_head.weight"


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
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return {
        model: row
        for model, row in sorted(found.items())
        if row != ("lm_head", False) or model not in causal
    }


# It compares a table with the pinned transformers, and can change with that pin alone.
@pytest.mark.full
def test_the_classes_that_tie_nothing_are_those_of_transformers() -> None:
    untied = set()
    for task in TASKS:
        for model, names in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").items():
            for name in [names] if isinstance(names, str) else names:
                kind = getattr(transformers, name, None)
                if (
                    kind
                    and name not in module._OWN
                    and not getattr(kind, "_tied_weights_keys", None)
                ):
                    with suppress(StrictDataclassError):
                        config = CONFIG_MAPPING[model]()
                        untied |= {name} if getattr(config, "tie_word_embeddings", 0) else set()

    assert untied == module._NEVER_TIED


@pytest.mark.full  # only another transformers changes them
def test_the_heads_are_those_of_transformers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = told_by_transformers()
    if os.environ.get("UPDATE_GOLDEN"):
        rows = [f"{json.dumps(kind)}: {json.dumps(row)}" for kind, row in told.items()]
        FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n", "utf-8")
    written = {kind: tuple(row) for kind, row in json.loads(FILE.read_text("utf-8")).items()}
    assert written == told, f"transformers {transformers.__version__}: UPDATE_GOLDEN=1 writes it"


def test_classes_whose_tied_tensors_have_names_of_their_own() -> None:
    """`all_tied_weights_keys` also has the ties of parts."""
    small = {"encoder_layers": 1, "decoder_layers": 1, "vocab_size": 16}
    sizes = {
        "ProphetNetForCausalLM": {"num_encoder_layers": 1, "num_decoder_layers": 1},
        "SeamlessM4Tv2ForSpeechToText": small | {"speech_encoder_layers": 1},
        "MarianMTModel": small | {"decoder_vocab_size": 16, "pad_token_id": 0},
    }
    for name, size in sizes.items():
        kind = getattr(transformers, name)
        config = kind.config_class(**size, tie_word_embeddings=True)
        with torch.device("meta"):
            model = kind(config)
        tied = model.all_tied_weights_keys
        told = config.to_dict() | {"architectures": [name]}

        tie = find_tie(told, {key: None for key in model.state_dict() if key not in tied})

        assert tie
        assert {tie.head: tie.embedding} | dict(tie.also) == tied
        assert tie.known
        assert not tie.follows


def test_a_tie_inside_a_decoder_is_not_untied() -> None:
    config = {"model_type": "vision-encoder-decoder", "decoder": {"model_type": "bert"}}
    name = "bert.embeddings.word_embeddings.weight"

    tie = find_tie(config, {"encoder.layers.0.q_proj.weight": None, f"decoder.{name}": None})

    assert tie
    assert (tie.embedding, tie.known) == (f"decoder.{name}", False)


@pytest.mark.parametrize(
    ("kind", "words", "known"),
    [
        ("Pix2Struct", ("decoder.embed_tokens.weight", "decoder.lm_head.weight"), True),
        ("Kosmos2_5", ("text_model.model.embed_tokens.weight", "text_model.lm_head.weight"), True),
        (
            "InstructBlip",
            ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
            False,
        ),
    ],
)
def test_a_part_s_head(kind: str, words: tuple[str, str], known: bool) -> None:
    config = {"model_type": "new", "architectures": [f"{kind}ForConditionalGeneration"]}
    names = {words[0]: None, "qformer.embeddings.word_embeddings.weight": None}

    tie = find_tie(config | {"tie_word_embeddings": True}, names)

    assert tie
    assert (tie.embedding, tie.head, tie.known, tie.follows) == (*words, known, False)


def test_tokens_that_a_head_with_factors_follows_are_merged_first(tmp_path: Path) -> None:
    base = {"model.embed_tokens.weight": random(8, 4)}
    tokens = {"model.embed_tokens.token_adapter.trainable_tokens_delta": random(1, 4)}
    listed = {"trainable_token_indices": {"embed_tokens": [3]}}
    head, config = {"target_modules": ["lm_head"]}, {"tie_word_embeddings": True}
    factors = lora("lm_head", a := random(2, 4), b := random(8, 2))
    both, tokens_alone, rest = (tmp_path / name for name in ("both", "tokens", "rest"))
    for folder in (both, tokens_alone, rest):
        folder.mkdir()
    with pytest.raises(
        InputRefused, match=r"trains tokens of lm_head\.weight and has factors"
    ) as told:
        run(both, base, tokens | factors, listed | head, **config)
    assert "merge it first" in told.value.hint

    first = run(tokens_alone, base, tokens, listed, **config)
    found = run(rest, first, factors, head, **config)
    close(found["lm_head.weight"], first["model.embed_tokens.weight"].double() + delta(a, b))


@pytest.mark.parametrize("kind", ["MarianMTModel", "T5ForSequenceClassification"])
def test_tokens_of_a_table_that_no_stack_reads_by_its_name_are_refused(
    kind: str, tmp_path: Path
) -> None:
    base = {"shared.weight": random(8, 4), "encoder.layers.0.q_proj.weight": random(4, 4)}
    adapter = {"shared.token_adapter.trainable_tokens_delta": random(1, 4)}
    config = {"is_encoder_decoder": True, "architectures": [kind], "vocab_size": 8}

    with pytest.raises(InputRefused, match="no effect in training"):
        run(tmp_path, base, adapter, {"trainable_token_indices": {"shared": [3]}}, **config)


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
        # This class ties nothing, unlike others of its type.
        (
            {
                "model_type": "bigbird_pegasus",
                "architectures": ["BigBirdPegasusForCausalLM"],
                "tie_word_embeddings": True,
            },
            ["model.decoder.embed_tokens.weight", "lm_head.weight"],
            None,
        ),
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
        lora(name, a, b),
        {"target_modules": [name]},
        model_type="janus",
        architectures=["JanusForConditionalGeneration"],
        tie_word_embeddings=True,
    )

    assert found.keys() == base.keys()
    close(found[f"{name}.weight"], base[f"{name}.weight"].double() + delta(a, b))
