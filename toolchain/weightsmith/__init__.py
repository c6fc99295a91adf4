"""From a base model and LoRA adapters to a ready-to-serve, verified container image.

The names in `__all__` are the public interface (docs/reference/python.md); modules are private.
"""

__version__ = "0.1.0"

# Type checkers take it for true. `typing` is not imported for it: builders and the command line
# import this file before anything else, and for them nothing below is loaded.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from weightsmith.api.fleets import FleetCell, FleetResult, SharedTask, fleet
    from weightsmith.api.images import affected, bake, build, inspect, plan, push, rebase, verify
    from weightsmith.api.models import evaluate, merge, prove, quantize, render, validate
    from weightsmith.api.results import (
        Affected,
        AffectedImage,
        Baked,
        Built,
        Evaluation,
        Merged,
        Proof,
        Pushed,
        Quantized,
        Rebased,
        Remade,
        Rendered,
        Shard,
        StageTime,
        Unread,
        Validation,
        Verification,
    )
    from weightsmith.core.errors import (
        CheckFailed,
        EnvironmentFailure,
        InputRefused,
        UsageError,
        WeightsmithError,
    )
    from weightsmith.recipe.schema import Recipe

__all__ = [
    "Affected",
    "AffectedImage",
    "Baked",
    "Built",
    "CheckFailed",
    "EnvironmentFailure",
    "Evaluation",
    "FleetCell",
    "FleetResult",
    "InputRefused",
    "Merged",
    "Proof",
    "Pushed",
    "Quantized",
    "Rebased",
    "Recipe",
    "Remade",
    "Rendered",
    "Shard",
    "SharedTask",
    "StageTime",
    "Unread",
    "UsageError",
    "Validation",
    "Verification",
    "WeightsmithError",
    "affected",
    "bake",
    "build",
    "evaluate",
    "fleet",
    "inspect",
    "merge",
    "plan",
    "prove",
    "push",
    "quantize",
    "rebase",
    "render",
    "validate",
    "verify",
]

_MODULES = {
    "core.errors": "CheckFailed EnvironmentFailure InputRefused UsageError WeightsmithError",
    "api.fleets": "FleetCell FleetResult SharedTask fleet",
    "api.images": "affected bake build inspect plan push rebase verify",
    "api.models": "evaluate merge prove quantize render validate",
    "api.results": (
        "Affected AffectedImage Baked Built Evaluation Merged Proof Pushed Quantized Rebased "
        "Remade Rendered Shard StageTime Unread Validation Verification"
    ),
    "recipe.schema": "Recipe",
}

if not TYPE_CHECKING:  # a checker would take any name for one that is there

    def __getattr__(name: str) -> object:
        """Load a public name when it is first used (PEP 562)."""
        module = next((m for m, names in _MODULES.items() if name in names.split()), "")
        if not module:
            raise AttributeError(f"module 'weightsmith' has no attribute {name!r}")
        import importlib

        found = globals()[name] = getattr(importlib.import_module(f"weightsmith.{module}"), name)
        return found


def __dir__() -> list[str]:
    """Return what completion shows: the public names."""
    return [*__all__, "__version__"]
