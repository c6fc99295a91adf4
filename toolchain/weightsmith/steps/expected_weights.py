"""A base of which only the configuration is here: its files as they will be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from weightsmith.core.safe_parse import INDEX, parse_file
from weightsmith.core.values import FileEntry, Sources, Tree, UnreadDigest
from weightsmith.models.facts import ModelFacts, read_facts
from weightsmith.models.folder import check_model_folder, pickles_in
from weightsmith.serving.architectures import check_served
from weightsmith.serving.parameters import NO_WEIGHTS, weights_from_config

INDEX_FILE = "model.safetensors.index.json"
FROM_INDEX = f"{NO_WEIGHTS}{INDEX_FILE}'s"
FROM_CONFIG = f"{NO_WEIGHTS}worked out from config.json, an estimate"
_SHARD = 5_000_000_000
"""The largest file that transformers writes."""


class ForeseenTree(Tree):
    """A folder without weights, and the files that will hold them."""

    __slots__ = ()

    @property
    def note(self) -> str:
        """Where the size of the weights is from."""
        return expected_weights(self.root, read_facts(self.root))[1]


def foreseen(sources: Sources) -> tuple[Sources, str]:
    """Return the sources with the base's weights by their expected size, and where that is from.

    They are returned as they are, with "", if the weights are there. Raises InputRefused for a size
    that cannot be worked out, and for weights that are there as pickles.
    """
    tree = sources.base.tree
    if tree.weight_bytes:
        return sources, ""
    if pickles_in(tree.root):
        check_model_folder(tree.root)
    size, note = expected_weights(tree.root, read_facts(tree.root))
    count = -(-size // _SHARD)
    weights = tuple(
        FileEntry(
            path=f"model-{number:05}-of-{count:05}.safetensors",
            size=size * number // count - size * (number - 1) // count,
            digest=UnreadDigest.of(b"%d of %d" % (number, size)),
        )
        for number in range(1, count + 1)
    )
    whole = ForeseenTree(root=tree.root, files=(*tree.files, *weights), places=tree.places)
    return replace(sources, base=replace(sources.base, tree=whole)), note


def expected_weights(folder: Path, model: ModelFacts) -> tuple[int, str]:
    """Return the bytes of the weights that a folder lacks, and a note that says how it is known.

    Raises InputRefused for a model that no target serves, and if neither its index nor its
    config.json says.
    """
    check_served(model)  # what it is comes before what its config.json lacks
    if size := _indexed_bytes(folder / INDEX_FILE):
        return size, FROM_INDEX
    return weights_from_config(model), FROM_CONFIG


def _indexed_bytes(path: Path) -> int:
    """Return the size of the shards in bytes from the index; 0 if the index does not have it."""
    try:
        size = parse_file(path, largest=INDEX)["metadata"]["total_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0
    return size if isinstance(size, int) and not isinstance(size, bool) and size > 0 else 0
