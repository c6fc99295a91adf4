"""What is said to be shared is: packed files are compared between two fine-tunes of one base."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from weightsmith.core.values import Digest, FileEntry, Format, Tree
from weightsmith.models.reshard import Resharded, reshard
from weightsmith.quantizers import formats
from weightsmith.quantizers.rounded import quantize
from weightsmith.quantizers.schemes import SCHEMES
from weightsmith.steps.sharing import depends_on_adapters

pytestmark = pytest.mark.slow

WIDTH, LAYERS = 256, 3
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_hidden_layers": LAYERS,
    "vocab_size": 256,
    "tie_word_embeddings": False,
}
KINDS = (
    *(f"self_attn.{one}_proj" for one in "qkvo"),
    *(f"mlp.{one}_proj" for one in ("gate", "up", "down")),
)


def model(folder: Path, changed: tuple[str, ...], seed: int) -> frozenset[str]:
    """Write a fine-tune; return the tensors that it changed."""
    same, other = np.random.default_rng(0), np.random.default_rng(seed)
    square = WIDTH, WIDTH
    found = {
        f"{name}.weight": same.normal(0, 0.02, square) for name in ("model.embed_tokens", "lm_head")
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.{kind}.weight": same.normal(0, 0.02, square) for kind in KINDS}
        found[f"{prefix}.input_layernorm.weight"] = same.normal(1, 0.1, WIDTH)
    names = frozenset(name for name in found for kind in changed if f".{kind}.weight" in name)
    for name in names:
        found[name] = found[name] + other.normal(0, 0.02, square)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file({n: v.astype(np.float32) for n, v in found.items()}, folder / "model.safetensors")
    return names


def packed(source: Path, out: Path, format_: Format) -> Resharded:
    out.mkdir()
    quantize(SCHEMES[format_.name], source, out, ())
    files = [
        FileEntry(path=p.name, size=p.stat().st_size, digest=Digest.of(p.read_bytes()))
        for p in sorted(out.iterdir())
    ]
    tree = Tree(root=out, files=tuple(files))
    return reshard(tree, lambda _: 10**9, lambda _, make: make(), strict=False)


@pytest.mark.grid(3)
@pytest.mark.parametrize("format_", sorted(SCHEMES))
@pytest.mark.parametrize("changed", [("self_attn.q_proj",), ("mlp.down_proj",)])
def test_files_that_do_not_depend_on_adapters_are_equal(
    tmp_path: Path, format_: str, changed: tuple[str, ...]
) -> None:
    format_of = formats()[format_]
    names = [model(tmp_path / f"{n}", changed, seed=n) for n in (1, 2)]
    one, two = (packed(tmp_path / f"{n}", tmp_path / f"{n}-packed", format_of) for n in (1, 2))
    depends = depends_on_adapters(format_of, names[0])

    assert one.tensors.keys() == two.tensors.keys()
    assert len(one.tensors) >= len(KINDS) + 2
    digests = [{file.path: file.digest for file in made.tree.files} for made in (one, two)]
    differ = {path for path in digests[0] if digests[0][path] != digests[1][path]}
    own = {path for path, some in one.tensors.items() if any(map(depends, some))}
    assert differ == own
    # NVFP4 has one scale for matrices that engines fuse.
    fused = format_.startswith("nvfp4a16") and changed == ("self_attn.q_proj",)
    assert len(own) == (3 if fused else 1)
