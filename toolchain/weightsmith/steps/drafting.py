"""What drafts the tokens of an image's answers: checks, and its files beside the model's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import read_json
from weightsmith.core.values import Artifact, Snapshot, Tree
from weightsmith.models.facts import read_facts
from weightsmith.models.gguf_config import gguf_models
from weightsmith.models.predicting import predicting_tensors
from weightsmith.models.safetensors import open_checkpoint
from weightsmith.recipe.schema import Speculative
from weightsmith.steps.beside import BesideTree
from weightsmith.steps.sizes import ForeseenTree

FOLDER = "draft"
"""Below the model's folder in the image."""
FILE = f"{FOLDER}/draft.gguf"
"""A GGUF file there: one name for all, so that images of one draft share its layer."""
_ANOTHER = "choose a draft of the same family, or method ngram, which needs none"


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


def check_draft(wanted: Speculative, draft: Snapshot, model: Tree, model_bytes: int) -> None:
    """Refuse a draft of another vocabulary, one that is not smaller, and one of another method.

    `model` is the target's checkpoint, of which its vocabulary is read; `model_bytes` are its
    weights.
    """
    name, facts = draft.source, read_facts(draft.tree.texts)
    is_head = "eagle3" in facts.architecture.lower()
    if is_head != (wanted.method == "eagle3"):
        what = "is an EAGLE-3 head" if is_head else f"is a {facts.architecture or 'model'}"
        raise InputRefused(
            f"serve.speculative: {name} {what}, which method {wanted.method} does not draft with",
            hint=f"choose method {'eagle3' if is_head else 'draft'}",
        )
    if facts.task.kind != "generate" and not is_head:
        raise InputRefused(
            f"serve.speculative: {name} {facts.task.does}, and drafts no tokens", hint=_ANOTHER
        )
    if draft.tree.weight_bytes >= model_bytes > 0:
        raise InputRefused(
            f"serve.speculative: the draft {name} has {draft.tree.weight_bytes} bytes of weights,"
            f" and the model {model_bytes}: it would take longer than the model itself",
            hint="choose a smaller draft: a tenth of the model or less is usual",
        )
    if is_head and not (draft.tree.has("tokenizer.json") or draft.tree.has("tokenizer.model")):
        return  # it has the model's
    if why := different(model.texts, draft.tree.texts):
        raise InputRefused(
            f"serve.speculative: the draft {name} has another vocabulary: {why}", hint=_ANOTHER
        )


def different(model: Path, draft: Path) -> str:
    """Return how two folders' vocabularies differ; "" if each token has the same number in both."""
    if not (model / "tokenizer.json").is_file() or not (draft / "tokenizer.json").is_file():
        mine, other = (folder / "tokenizer.model" for folder in (model, draft))
        if not (mine.is_file() and other.is_file()):
            return "there is no file of the same kind to compare (tokenizer.json)"
        return "" if mine.read_bytes() == other.read_bytes() else "tokenizer.model is another file"
    here, there = (_tokens(folder / "tokenizer.json") for folder in (model, draft))
    odd = [token for token in here.keys() | there.keys() if here.get(token) != there.get(token)]
    if not odd:
        return ""
    last = 1 << 30
    token = min(odd, key=lambda one: (min(here.get(one, last), there.get(one, last)), one))
    ours, its = (found.get(token, "missing") for found in (here, there))
    more = f", and {len(odd) - 1} others differ" if odd[1:] else ""
    return f"{token[:40]!r} is {ours} in the model and {its} in the draft{more}"


def _tokens(path: Path) -> Mapping[str, int]:
    """Return each token's number; raises InputRefused for a file that has none."""
    data = read_json(path)
    model, added = data.get("model"), data.get("added_tokens")
    words = model.get("vocab") if isinstance(model, Mapping) else None
    try:
        if isinstance(words, Mapping):
            found = {str(word): int(number) for word, number in words.items()}
        else:  # of unigrams: words with their scores, in order
            found = {str(word): number for number, (word, _) in enumerate(words or ())}
        found |= {str(one["content"]): int(one["id"]) for one in added or ()}
    except (TypeError, ValueError, KeyError) as error:
        raise InputRefused(
            f"{path} has no readable vocabulary ({error})", hint="download it again"
        ) from None
    return found


def beside(model: Artifact, draft: Artifact) -> Artifact:
    """Return a model's files with the draft's below `draft/`."""
    weights = gguf_models(file.path for file in draft.tree.files)
    names = {
        FILE if weights == [file.path] else f"{FOLDER}/{file.path}": file.path
        for file in draft.tree.files
    }
    return replace(model, tree=BesideTree(model.tree, draft.tree, names))


def draft_path(draft: Artifact) -> str:
    """Return where an image has what drafts, below the model's folder: a file, or a folder."""
    files = gguf_models(file.path for file in draft.tree.files)
    if not files:
        return FOLDER
    return FILE if len(files) == 1 else f"{FOLDER}/{files[0]}"
