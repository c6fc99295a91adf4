"""The smallest model that every target of a build takes, and adapters for it; without torch."""

import json
from functools import cache
from pathlib import Path

import numpy as np
from weightsmith.core.values import Digest, FileEntry, Snapshot, Tree
from weightsmith.models.safetensors import build_header


def write_model(folder: Path) -> Path:
    """Write a base model that takes K-quants: one layer, 256 wide, all weights small numbers."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": 32,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    layer = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (32, 256),
        "lm_head.weight": (32, 256),
        "model.norm.weight": (256,),
        f"{layer}input_layernorm.weight": (256,),
        f"{layer}post_attention_layernorm.weight": (256,),
        f"{layer}self_attn.q_proj.weight": (256, 256),
        f"{layer}self_attn.k_proj.weight": (128, 256),
        f"{layer}self_attn.v_proj.weight": (128, 256),
        f"{layer}self_attn.o_proj.weight": (256, 256),
        f"{layer}mlp.gate_proj.weight": (256, 256),
        f"{layer}mlp.up_proj.weight": (256, 256),
        f"{layer}mlp.down_proj.weight": (256, 256),
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    (folder / "model.safetensors").write_bytes(tensors(tuple(shapes.items()), seed=0))
    return folder


def write_adapter(folder: Path, seed: int) -> Path:
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj"],
        "bias": "none",
    }
    stem = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    shapes = {f"{stem}A.weight": (2, 256), f"{stem}B.weight": (256, 2)}
    data = tensors(tuple(shapes.items()), seed=seed)
    (folder / "adapter_model.safetensors").write_bytes(data)
    return folder


def write_encoder(folder: Path) -> Path:
    """Write a BERT of one layer, without a head, as its class alone is saved."""
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 32,
        "max_position_embeddings": 512,
        "dtype": "float32",
    }
    layer = "encoder.layer.0."
    shapes = {
        "embeddings.word_embeddings.weight": (32, 256),
        f"{layer}attention.self.query.weight": (256, 256),
        f"{layer}output.dense.weight": (256, 256),
        "pooler.dense.weight": (256, 256),
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    (folder / "model.safetensors").write_bytes(tensors(tuple(shapes.items()), seed=0))
    return folder


def write_head(folder: Path, task: str, labels: int) -> Path:
    """Write an adapter of that PEFT task for such an encoder, which brings a head."""
    config = {
        "peft_type": "LORA",
        "task_type": task,
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["query"],
        "modules_to_save": ["classifier", "score"],
    }
    stem = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_"
    shapes: dict[str, tuple[int, ...]] = {
        f"{stem}A.weight": (2, 256),
        f"{stem}B.weight": (256, 2),
        "base_model.model.classifier.weight": (labels, 256),
        "base_model.model.classifier.bias": (labels,),
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    data = tensors(tuple(shapes.items()), seed=1)
    (folder / "adapter_model.safetensors").write_bytes(data)
    return folder


@cache
def tensors(shapes: tuple[tuple[str, tuple[int, ...]], ...], seed: int) -> bytes:
    """Return a safetensors file of numbers that the seed decides."""
    draw = np.random.default_rng(seed)
    header = build_header([(name, "F32", shape) for name, shape in shapes], {})
    data = [draw.normal(0, 0.02, shape).astype("<f4").tobytes() for _, shape in shapes]
    return header + b"".join(data)


def snapshot_of(folder: Path) -> Snapshot:
    """Return a folder of files as a source."""
    files = tuple(
        FileEntry(path=path.name, size=path.stat().st_size, digest=Digest.of(path.read_bytes()))
        for path in sorted(folder.iterdir())
    )
    tree = Tree(root=folder, files=files)
    return Snapshot(tree=tree, source=str(folder), pin="", pinned=True)
