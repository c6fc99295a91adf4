"""What a build is asked to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from weightsmith.recipe_file import RecipeFile
from weightsmith.serving.targets import Target
from weightsmith.stages.publish import Outputs


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """A recipe, the targets wanted of it, and where results go."""

    file: RecipeFile
    targets: tuple[Target, ...]
    outputs: Outputs
    dist: Path
    """Folder that gets NAME/VERSION/TARGET/."""
    engine_answers: bool
    """Images are started in the container engine, else from a layout."""
    locked: bool = False
    """Sources that are not as in the recipe's lock are refused."""
    update_lock: bool = False
    """Sources and bases are pinned anew."""

    def folder(self, target: Target) -> Path:
        """Where a target's results go."""
        recipe = self.file.recipe
        return self.dist / recipe.name / recipe.version / target.name

    def outputs_of(self, target: Target) -> Outputs:
        """Return the outputs of one target; several get a folder each below one layout folder."""
        layout = self.outputs.layout
        if layout is not None and len(self.targets) > 1:
            layout = layout / target.name
        if not (layout or self.outputs.load or self.outputs.push):
            layout = None if self.engine_answers else self.folder(target) / "image"
            load = self.engine_answers
        else:
            load = self.outputs.load
        return replace(self.outputs, load=load, layout=layout)

    def candidate_layout(self, target: Target) -> Path | None:
        """Where the image is started from: None for the engine, else beside this layout."""
        if self.engine_answers:
            return None
        return self.outputs_of(target).layout or self.folder(target) / "image"
