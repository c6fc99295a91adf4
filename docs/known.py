"""Lists the models that generate text in both the pinned transformers and the pinned vLLM.

    python docs/known.py DIST-PACKAGES >toolchain/weightsmith/quantizers/vllm_architectures.json

DIST-PACKAGES is the folder that has vLLM's package, in its image or in the store. vLLM's registry
is parsed, not imported: it needs nothing that vLLM needs.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

_REGISTRY = "vllm/model_executor/models/registry.py"
_TABLES = {"_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS", "_TRANSFORMERS_SUPPORTED_MODELS"}


def listed(packages: Path) -> dict[str, str]:
    """Return architecture -> `own` for a class of vLLM's, `transformers` for transformers' own."""
    known = _in_transformers()
    served = dict(_in_vllm(ast.parse((packages / _REGISTRY).read_text("utf-8"))))
    return {name: served[name] for name in sorted(known & served.keys())}


def _in_vllm(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=table)], value=ast.Dict() as rows):
                if table in _TABLES:
                    for key, value in zip(rows.keys, rows.values, strict=True):
                        if isinstance(key, ast.Constant):
                            module, _ = ast.literal_eval(value)
                            kind = "transformers" if module == "transformers" else "own"
                            yield str(key.value), kind


def _in_transformers() -> set[str]:
    from transformers.models.auto import modeling_auto as auto

    tables = (
        auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
    )
    rows = [row for table in tables for row in table.values()]
    return {name for row in rows for name in ([row] if isinstance(row, str) else row)}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(listed(Path(sys.argv[1])), indent=2) + "\n")
