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
merged.seconds = 1.0  # type: ignore[misc]  # results are frozen
weightsmith.marge  # type: ignore[attr-defined]  # a name that is not there is an error  # noqa: B018
