"""What a type checker knows of the public interface; mypy reads this, nothing runs it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, assert_type

import weightsmith

merged = weightsmith.merge("base", [Path("a"), "b"], out="merged", weights=[0.7, 0.3])
assert_type(merged, weightsmith.Merged)
assert_type(merged.shards, tuple[weightsmith.Shard, ...])
assert_type(merged.tensors, Mapping[str, int])
assert_type(weightsmith.validate("base", "a", merged.path), weightsmith.Validation)
assert_type(weightsmith.quantize(merged.path, "q.gguf").quality, Mapping[str, Any])
assert_type(weightsmith.bake("q.gguf", "llamacpp-q4_k_m", layout="image"), weightsmith.Baked)
assert_type(weightsmith.build("recipe.yaml"), Mapping[str, weightsmith.Built])
assert_type(weightsmith.plan(weightsmith.Recipe.model_validate({})), Mapping[str, Any])
assert_type(weightsmith.inspect("oci:image"), Mapping[str, Any])
assert_type(weightsmith.verify("oci:image", key=Path("key.pub")), weightsmith.Verification)
rendered = weightsmith.render("merged", "vllm", "config", max_model_len=4096)
assert_type(rendered.files, tuple[Path, ...])
score = weightsmith.evaluate("eval.jsonl", model=merged.path, adapters="a")
assert_type(weightsmith.evaluate("eval.jsonl", image="oci:image", against=score).n, int)
assert_type(weightsmith.push("oci:image", "hf://owner/name").digest, str)
assert_type(weightsmith.rebase("oci:image", "engine:2", "app:2"), weightsmith.Rebased)
assert_type(weightsmith.build("recipe.yaml")["vllm"].forms, Mapping[str, str])
merged.seconds = 1.0  # type: ignore[misc]  # results are frozen
weightsmith.marge  # type: ignore[attr-defined]  # a name that is not there is an error  # noqa: B018
