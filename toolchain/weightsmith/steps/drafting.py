"""What drafts the tokens of an image's answers."""

from __future__ import annotations

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import read_json
from weightsmith.core.values import Tree
from weightsmith.models.predicting import predicting_tensors
from weightsmith.models.safetensors import open_checkpoint
from weightsmith.recipe.schema import Speculative
from weightsmith.steps.sizes import ForeseenTree


def check_drafter(wanted: Speculative, base: Tree) -> None:
    """Refuse the method `mtp` for a base whose files lack the layers that config.json states.

    A checkpoint that transformers saved has lost them. Reads headers; those of weights that are not
    here are read when they are.
    """
    if wanted.method != "mtp" or isinstance(base, ForeseenTree):
        return
    config = read_json(base.root / "config.json")
    if not predicting_tensors(config, open_checkpoint(base.root).tensors):
        raise InputRefused(
            f"serve.speculative: {base.root} has no tensors of layers for further tokens (MTP),"
            " which transformers leaves out when it saves a model",
            hint="start from the published checkpoint, or choose ngram",
        )
