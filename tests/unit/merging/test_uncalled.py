"""Layers whose weights a model reads without calling them: PEFT's adapters have no effect there."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from weightsmith.core.errors import InputRefused
from weightsmith.merging.uncalled import computes_more, shared, uncalled

from tests.unit.merging.oracle import MakeBase, check, merged, run, train, unmerged

MAMBA = {"state_size": 6, "time_step_rank": 5}


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["x_proj", "in_proj", "dt_proj"]},
        {"target_modules": ["x_proj", "dt_proj"], "bias": "lora_only"},
        {"target_modules": ["x_proj"], "modules_to_save": ["dt_proj"]},
    ],
    ids=["factors", "trained-bias", "saved"],
)
def test_mamba_is_merged_as_unmerged(
    options: dict[str, Any], bases: MakeBase, tmp_path: Path
) -> None:
    from peft import LoraConfig

    base = bases("mamba", **MAMBA)
    lora = train(base, "mamba", tmp_path / "lora", LoraConfig(r=3, lora_alpha=5, **options))

    report = run(base, lora, tmp_path / "out")

    told = [text for text in report["findings"] if "reads these layers' weights" in text]
    assert bool(told) == ("dt_proj" in options["target_modules"])
    wanted, found = unmerged(base, "mamba", lora), merged(tmp_path / "out", "mamba")
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))


def test_an_adapter_of_such_layers_alone_is_refused(bases: MakeBase, tmp_path: Path) -> None:
    from peft import LoraConfig

    base = bases("mamba", **MAMBA)
    lora = train(base, "mamba", tmp_path / "lora", LoraConfig(r=3, target_modules=["dt_proj"]))

    with pytest.raises(InputRefused, match=r"changes nothing: 4 tensors .*mixer\.dt_proj") as said:
        run(base, lora, tmp_path / "out")
    assert said.value.hint == "train the adapter again, on layers that the model calls"


PLACES = ("", "router.", "attention.", "bbox_attention.", "tdnn.0.", "conv.", "linear_attn.")
PLACES += ("head.", "query_transformer.")
"""What is above such layers."""


def read_uncalled() -> Iterator[tuple[str, str]]:
    """Yield model type and attribute of the matrices that a class of transformers only reads."""
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text("utf-8")
        for node in ast.walk(ast.parse(text)) if "conv" in text or ".weight" in text else ():
            if isinstance(node, ast.Assign) and "nn.MultiheadAttention(" in ast.unparse(node.value):
                places = (t.attr for t in node.targets if isinstance(t, ast.Attribute))
                yield from ((path.parent.name, f"{place}.out_proj") for place in places)
            if isinstance(node, ast.ClassDef):
                yield from ((path.parent.name, name) for name in read_uncalled_by(node))


def read_uncalled_by(kind: ast.ClassDef) -> set[str]:
    layers: set[str] = set()
    read: set[str] = set()
    called: set[str] = set()
    for method in kind.body:
        inside = ast.walk(method) if isinstance(method, ast.FunctionDef) else ()
        name = getattr(method, "name", "")
        for node in inside:
            if name == "__init__" and isinstance(node, ast.Assign):
                made = ast.unparse(node.value)
                if made.startswith(("nn.Linear(", "nn.Conv")):
                    layers |= {t.attr for t in node.targets if isinstance(t, ast.Attribute)}
            elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("self."):
                called.add(ast.unparse(node.func).removeprefix("self."))
            elif isinstance(node, ast.Attribute) and node.attr == "weight" and "init" not in name:
                read.add(ast.unparse(node.value).removeprefix("self."))
    return layers & read - called


# It compares a table with the pinned transformers, and can change with that pin alone.
@pytest.mark.full
def test_the_layers_are_those_of_transformers() -> None:
    found = set(read_uncalled())

    assert {("mamba", "dt_proj"), ("wavlm", "q_proj"), ("longcat_flash", "classifier")} <= found
    unknown = {
        (kind, name)
        for kind, name in found
        if not any(
            uncalled({"model_type": kind})(place)
            for place in (
                name,
                *(f"a.{above}{name}" for above in PLACES),
                f"cls.predictions.{name}",
            )
        )
    }
    assert not unknown, f"transformers {transformers.__version__}: add them to uncalled.py"


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("layoutlmv3", "encoder.rel_pos_x_bias"),
        ("maskformer", "mask_embedder.1.0"),
        ("maskformer", "model.pixel_level_module.decoder.fpn.layers.0.block.0"),
        ("mask2former", "model.transformer_module.decoder.mask_predictor.mask_embedder.0.0"),
        ("oneformer", "model.task_encoder.task_mlp.layers.0.0"),
        ("oneformer", "model.text_mapper.text_encoder.transformer.layers.0.self_attn.out_proj"),
    ],
)
def test_layers_that_peft_cannot_change(kind: str, module: str) -> None:
    assert uncalled({"model_type": kind})(module)


@pytest.mark.parametrize(
    ("kind", "module"),
    [
        ("llama", "model.layers.0.self_attn.q_proj"),
        ("mobilebert", "mobilebert.encoder.layer.0.output.dense"),
        ("zamba", "model.layers.0.mamba.dt_proj"),
        ("detr", "model.decoder.layers.0.self_attn.k_proj"),
        ("siglip", "vision_model.encoder.layers.0.self_attn.out_proj"),
        ("oneformer", "model.transformer_module.decoder.layers.0.self_attn.self_attn.out_proj"),
    ],
)
def test_layers_that_are_called_are_not_left_out(kind: str, module: str) -> None:
    assert not uncalled({"model_type": kind})(module)


def own_lookups() -> Iterator[tuple[str, str, str]]:
    """Yield model type, class and attribute of embeddings with a forward pass of their own."""
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text("utf-8")
        tree = ast.parse(text) if "(nn.Embedding)" in text else ast.Module([], [])
        for kind in tree.body:
            if not isinstance(kind, ast.ClassDef) or "nn.Embedding" not in map(
                ast.unparse, kind.bases
            ):
                continue
            methods = [m for m in kind.body if getattr(m, "name", "") == "forward"]
            # PEFT knows `embed_scale`.
            if methods and "embed_scale" not in ast.unparse(methods[0]):
                for node in ast.walk(tree):
                    if isinstance(node, ast.Assign) and f"{kind.name}(" in ast.unparse(node.value):
                        places = (t.attr for t in node.targets if isinstance(t, ast.Attribute))
                        yield from ((path.parent.name, kind.name, place) for place in places)


@pytest.mark.full
def test_embeddings_that_compute_more_are_those_of_transformers() -> None:
    found = set(own_lookups())

    # A plain lookup for tokens of the base; floats; and shapes, for which PEFT's layer fails.
    plain = {
        "IdeficsDecoupledEmbedding",
        "Ovis2VisualEmbeddingTable",
        "ProphetNetPositionalEmbeddings",
    }
    assert {("opt", "OPTLearnedPositionalEmbedding", "embed_positions")} <= found
    unknown = {
        (model, kind, name)
        for model, kind, name in found
        if kind not in plain and not computes_more({"model_type": model})(f"model.decoder.{name}")
    }
    assert not unknown, f"transformers {transformers.__version__}: add them to uncalled.py"


@pytest.mark.parametrize("where", ["target_modules", "trainable_token_indices"])
def test_what_a_weight_cannot_express_is_refused(
    where: str, bases: MakeBase, tmp_path: Path
) -> None:
    from peft import LoraConfig

    base = bases("biogpt")
    targets = ["v_proj", "embed_positions"] if where == "target_modules" else ["v_proj"]
    tokens = {} if where == "target_modules" else {where: {"embed_positions": [3]}}
    lora = train(
        base, "biogpt", tmp_path / "lora", LoraConfig(r=3, target_modules=targets, **tokens)
    )

    with pytest.raises(InputRefused, match=r"embed_positions, whose class computes more"):
        run(base, lora, tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "deformable_detr"}, "bbox_embed.0.layers.0.lora_A.weight"),
        ({"model_type": "rt_detr_v2"}, "model.decoder.class_embed.1.lora_B.weight"),
        ({"model_type": "d_fine"}, "model.decoder.bbox_embed.0.layers.0.weight"),
        ({"model_type": "deimv2"}, "class_embed.0.lora_A.weight"),
        ({"model_type": "mm-grounding-dino"}, "bbox_embed.2.layers.1.bias"),
        ({"model_type": "dab-detr"}, "bbox_predictor.layers.0.weight"),
        ({"model_type": "zamba2"}, "model.layers.1.shared_transformer.self_attn.q_proj.lora_A"),
        ({"model_type": "granite_speech5_ctc"}, "ctc_head.lora_A.weight"),
        ({"model_type": "fine_acoustics"}, "lm_heads.0.lora_A.weight"),
        ({"model_type": "blt", "tie_word_embeddings": True}, "lm_head.lora_A.weight"),
        ({"model_type": "udop", "tie_word_embeddings": False}, "patch_embed.proj.lora_A.weight"),
    ],
)
def test_layers_with_one_weight_for_two(config: dict[str, Any], name: str) -> None:
    assert shared(config)(name)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "detr"}, "bbox_predictor.layers.0.weight"),
        ({"model_type": "rt_detr_v2", "tie_word_embeddings": False}, "class_embed.0.lora_A.weight"),
        ({"model_type": "zamba2"}, "model.layers.1.linear.lora_A.weight"),
        ({"model_type": "fine_acoustics"}, "input_embeds_layers.0.lora_embedding_A"),
        ({"model_type": "blt"}, "lm_head.lora_A.weight"),
        ({"model_type": "csm", "tie_codebooks_embeddings": False}, "a.embed_audio_tokens.weight"),
    ],
)
def test_layers_with_a_weight_of_their_own(config: dict[str, Any], name: str) -> None:
    assert not shared(config)(name)


# Also of layers inside parts that are tied whole, and of parameters that no adapter has.
SHARED = {"rt_detr_v2", "d_fine", "deimv2", "deformable_detr", "grounding_dino", "dab_detr", "csm"}
SHARED |= {"mm_grounding_dino", "pp_doclayout_v3", "granite_speech5", "udop", "diffusion_gemma"}
SHARED |= {"pe_audio_video", "blt", "sam", "sam_hq", "openai", "t5gemma2"}


@pytest.mark.full
def test_the_ties_of_other_layers_are_those_of_transformers() -> None:
    found = {kind for kind, ties in all_ties() if ties and not plain_tie(ties)}

    unknown = found - SHARED
    assert not unknown, f"transformers {transformers.__version__}: add them to uncalled.py"


def all_ties() -> Iterator[tuple[str, dict[str, str]]]:
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        text = path.read_text("utf-8")
        for node in ast.walk(ast.parse(text)) if "_tied_weights_keys = {" in text else ():
            names = map(ast.unparse, node.targets) if isinstance(node, ast.Assign) else ()
            if "_tied_weights_keys" in names:
                yield path.parent.name, ast.literal_eval(node.value) or {}


def plain_tie(ties: dict[str, str]) -> bool:
    """Return whether it is one of a table of words and its heads."""
    word = re.compile(r"(?:.*\.)?(?:\w*embed\w*|wte|w|shared|word_embedding)\.weight\$?")
    return all(word.fullmatch(name) or name.endswith("bias") for name in ties.values())


def test_a_position_table_of_an_unknown_model_is_an_embedding() -> None:
    assert not computes_more({"model_type": "own"})("model.embed_positions")
    assert not computes_more({"model_type": "whisper"})("model.encoder.embed_positions")


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        {"target_modules": ["in_proj"], "modules_to_save": ["down_proj"]},
    ],
    ids=["factors", "saved"],
)
def test_a_layer_that_lends_its_weight_is_refused(
    options: dict[str, Any], bases: MakeBase, tmp_path: Path
) -> None:
    """Zamba2's layers 1 and 3 share a block, and PEFT changes one of the two."""
    from peft import LoraConfig

    base = bases("zamba2")
    lora = train(base, "zamba2", tmp_path / "lora", LoraConfig(r=3, **options))

    with pytest.raises(InputRefused, match=r"shared_transformer.*has one weight for this") as said:
        run(base, lora, tmp_path / "out")
    assert "exclude_modules" in said.value.hint


def test_a_head_whose_untying_would_untie_more_is_refused(bases: MakeBase, tmp_path: Path) -> None:
    """`tie_word_embeddings: false` would leave Zamba2's shared block without weights."""
    from peft import LoraConfig

    base = bases("zamba2")
    lora = train(base, "zamba2", tmp_path / "lora", LoraConfig(r=3, target_modules=["lm_head"]))

    with pytest.raises(InputRefused, match="how this model's head is untied"):
        run(base, lora, tmp_path / "out")


def test_the_rest_of_such_a_model_is_merged(bases: MakeBase, tmp_path: Path) -> None:
    check(bases("zamba2"), "zamba2", tmp_path, {"target_modules": ["in_proj", "linear"]}, room=5e-6)
