"""The recipe that a command builds: a file's, Python's, that of --base, or of an image (--from)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath

import yaml
from pydantic import BaseModel

from weightsmith.api.commands.requests import RecipeCommand
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.files import sibling_folder
from weightsmith.core.ports import Progress
from weightsmith.core.safe_parse import PART, parse
from weightsmith.core.trees import discard
from weightsmith.core.values import Digest, FileEntry, Json, JsonValue, tree_digest
from weightsmith.evaluating.items import check_documents, read_corpus, read_items
from weightsmith.evaluating.metrics import check_metric
from weightsmith.evaluating.pictures import FOLDER, KINDS, MOST_BYTES
from weightsmith.evaluating.replay import EARLIER
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.oci.registry import Registry, open_location
from weightsmith.provenance import evidence, signing
from weightsmith.provenance.chain import trace
from weightsmith.provenance.evidence import (
    ADAPTER_TYPE,
    DRAFTED,
    EVALUATION_TYPE,
    NUMBER,
    UNMERGED,
)
from weightsmith.provenance.proofs import replay_in
from weightsmith.provenance.statements import Statement
from weightsmith.provenance.withdrawal import withdrawn_in
from weightsmith.recipe.file import RecipeFile, check_recipe, read_recipe, with_settings
from weightsmith.recipe.schema import Recipe, Suite
from weightsmith.recipe.sources import is_remote, last_name
from weightsmith.recipe.user_text import require_plain
from weightsmith.serving.options import not_to_be_stated

_NAMES = re.compile(r"[A-Za-z0-9._-]{1,255}(/[A-Za-z0-9._-]{1,255}){0,15}")
"""Maximum depth of a model folder."""
_METRICS = (
    "contains", "exact", "regex", "choice", "numeric", "tool-call", "label", "embedding", "rerank",
)  # fmt: skip
"""Metrics that run no program chosen by the image's publisher, and validate no schema of theirs."""
_HUB = re.compile(r"(?P<name>hf://([\w.-]+/)?[\w.-]+)@(?P<revision>[0-9a-f]{40})", re.ASCII)
"""The oldest models on the hub, such as gpt2, have no owner."""
_WHEEL = re.compile(r"(?P<name>pypi://[\w.-]+==[\w.!+]+)#sha256=(?P<sha256>[0-9a-f]{64})", re.ASCII)
_KEPT_KEYS = (
    "name", "version", "merge", "evaluate", "quantize", "quality", "targets", "serve", "card",
    "replay",
)  # fmt: skip
"""Keys of a recorded recipe that define the model and its serving; `evaluate` only in part."""
_DRAFTED_BY = ("draft", "eagle3")
"""Methods of `serve.speculative` that have a model of their own."""
_OF_ADAPTERS = ("version", "run_id", "weight")
_REPLACED = ("base", "adapters", "adapters[].source", "adapters[].revision", "adapters[].sha256")
"""Keys that are derived from the statement about base and adapters instead."""


def recipe_of(asked: RecipeCommand) -> RecipeFile:
    """Return the checked recipe, changed by --set and then by flags; raises UsageError."""
    flags = [
        *given("serve", asked.serve),
        *given("quantize", asked.quantize),
        *given("image", asked.image),
    ]
    flags += [f"outputs.kinds=[{', '.join(asked.kinds)}]"] if asked.kinds else []
    settings, recipe = [*asked.settings, *flags], asked.recipe
    if asked.base:
        if recipe:
            hint = "use --set base.source=…"
            raise UsageError("--recipe and --base exclude each other", hint=hint)
        source = asked.adapters[-1] if asked.adapters else asked.base
        last = last_name(source).partition("==")[0].lower()
        words = "".join(c if c.isascii() and c.isalnum() else " " for c in last).split()
        recipe = {
            "name": "-".join(words) or "model",
            "base": {"source": asked.base},
            "adapters": [{"source": source} for source in asked.adapters],
        }
    elif asked.adapters:
        raise UsageError("--adapter needs --base", hint="or name both in a recipe")
    elif recipe is None or isinstance(recipe, str | Path):
        return read_recipe(Path(recipe or "recipe.yaml"), settings)
    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(by_alias=True, exclude_unset=True)
    where = "the command line" if asked.base else "the recipe"
    require_plain(recipe, where, "docs/reference/recipe.md lists every key")
    return RecipeFile(recipe=check_recipe(with_settings(recipe, settings), where), folder=Path())


def given(key: str, section: BaseModel) -> list[str]:
    """Return what was given of a section as `key.path=value` settings of a recipe."""
    values = section.model_dump(mode="json", exclude_unset=True)
    return [f"{key}.{name}={json.dumps(value)}" for name, value in values.items()]


def recipe_of_image(
    source: str,
    base: str,
    check: signing.Check | None,
    dist: Path,
    registry: Registry,
    progress: Progress,
    settings: Sequence[str] = (),
) -> Path:
    """Write a recipe that rebuilds the image's model to a folder in `dist`, and return it.

    It uses the adapters attached to the image. Its lock has the digests from the image's
    statement, so a different base or adapter is refused. `base` is the path of a base that was a
    folder. What `settings` (`key.path=value`) replace of the engine's options is not taken from the
    image. Raises InputRefused if the image has no statement about how it was made, or none that
    the key or identity signed, and for options of the engine that only the caller may set.
    """
    place = open_location(source, registry)
    image = place.image()
    attachments = evidence.read_attached(place, image.digest)
    found = (evidence.read_statement(p, check) for p in evidence.own_statements(attachments))
    statements = [one for one in found if check is None or one.signed]
    if not statements:
        raise InputRefused(
            f"{source} has no statement" + (f" signed by {signing.whom(check)}" if check else ""),
            hint="only images that `build` pushed or wrote have a statement of how they were made",
        )
    lineage = trace(image.digest, statements)
    stated = [one for one in statements if lineage.holds(one)]
    if check is None:
        progress.warn(f"{source}: its build statement's signature was not verified; give --key")
    if why := withdrawn_in(statements, image.digest):
        progress.warn(f"{source} was withdrawn: {why}; of the same inputs, the same image is built")
    recipe, adapters = _recipe(stated, source, progress, settings)
    _check_options(recipe, source, settings)
    drafted = next((one for one in stated if one.kind == DRAFTED), None)
    merged = next((one for one in stated if one.kind in ("merge", UNMERGED)), None)
    if merged is None:
        raise InputRefused(
            f"{source} has no statement about its base and adapters, so it cannot be rebuilt",
            hint="build from the base and adapters with your own recipe",
        )
    uris, digests = merged.dependency_uris, merged.dependencies
    sources = {name: (uris.get(name, ""), digest) for name, digest in digests.items()}
    documents = [*filter(lineage.names, evidence.documents_in(attachments))]
    folder = dist / "from" / image.digest.short
    with sibling_folder(folder) as partial:
        partial.chmod(0o755)
        locked = _with_base(recipe, base, sources.get("base", ("", "")))
        locked |= _with_adapters(adapters, documents, sources, partial)
        locked |= _with_draft(recipe, drafted, settings)
        _with_questions(recipe, documents, partial, progress)
        with suppress(InputRefused):  # it has none, or only digests
            (partial / f"recipe{EARLIER}").write_bytes(replay_in(image, source).data)
        _check(recipe, source, progress)
        lock = {"bases": {}, "sources": locked}
        (partial / "recipe.lock").write_text(json.dumps(lock, indent=2, sort_keys=True) + "\n")
        (partial / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        discard(folder)
        partial.rename(folder)
    progress.note(f"the recipe of {source} is in {folder}")
    return folder / "recipe.yaml"


def _recipe(
    stated: Sequence[Statement], source: str, progress: Progress, settings: Sequence[str]
) -> tuple[dict[str, JsonValue], list[dict[str, JsonValue]]]:
    """Return the trusted keys of the recipe in an image's statement, and of them its adapters.

    The publisher defines the model, but not what this machine runs, reads, names or pushes: how it
    was calibrated counts if `settings` name the texts.
    """
    texts = [one for one in settings if one.startswith("calibration.data=")]
    for one in stated:
        recipe = one.parameters.get("recipe")
        if one.kind == "bake" and isinstance(recipe, dict):
            rows = recipe.get("adapters") or []
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise _malformed(source, "its adapters are not a list of mappings")
            kept = {key: recipe[key] for key in _KEPT_KEYS if key in recipe}
            if texts and isinstance(calibration := recipe.get("calibration"), dict):
                kept |= with_settings({"calibration": calibration}, texts)
            if isinstance(quantize := kept.get("quantize"), dict):
                # Any other value names a file that is not attached.
                named = quantize.get("imatrix") not in ("auto", "walk", "off")
                files = {"mix", *(("imatrix",) if named else ())}
                kept["quantize"] = {k: v for k, v in quantize.items() if k not in files}
            if isinstance(replay := kept.get("replay"), dict):  # its questions are not attached
                kept["replay"] = {k: v for k, v in replay.items() if k != "data"}
            adapters = [{k: row[k] for k in _OF_ADAPTERS if k in row} for row in rows]
            kept["adapters"] = adapters
            given = {*recipe, *(f"adapters[].{key}" for row in rows for key in row)}
            known = {*_KEPT_KEYS, *kept, *_REPLACED, *(f"adapters[].{key}" for key in _OF_ADAPTERS)}
            if left := ", ".join(sorted(map(str, given - known))):
                progress.warn(f"{source}: ignored these keys of its recipe: {left[:200]}")
            return kept, adapters
    raise InputRefused(
        f"{source} was made by `bake` from a finished model: it names no base and no adapters",
        hint="`build --from` needs an image that `build` made",
    )


def _check(recipe: Mapping[str, JsonValue], source: str, progress: Progress) -> None:
    """Refuse a recipe with values of the wrong type; warn about checks that it weakens."""
    try:
        whole = check_recipe(recipe, source)
    except UsageError as error:
        raise _malformed(source, error.message) from None
    gate = whole.quality.gate
    opened = [] if gate is True else [f"quality.gate: {gate or 'false'}"]
    opened += ["quality.limits"] if whole.quality.limits else []
    for suite in whole.evaluate:
        if suite.is_bar:
            opened.append(f"evaluate.min_score: {suite.min_score}, without max_drop")
        elif suite.allowed_drop > Suite(data="x").allowed_drop:
            opened.append(f"evaluate.max_drop: {suite.allowed_drop}")
    if opened:
        progress.warn(f"{source}: its recipe weakens checks: {', '.join(opened)}")


def _check_options(recipe: dict[str, JsonValue], source: str, settings: Sequence[str]) -> None:
    """Leave out options of the engine that `settings` replace; refuse those that no image sets."""
    serve = recipe.get("serve")
    if not isinstance(serve, dict) or not isinstance(extra := serve.get("extra"), dict):
        return  # the recipe's own check says what is wrong with it
    replaced = {setting.partition("=")[0].strip() for setting in settings}
    kept = {
        key: value
        for key, value in extra.items()
        if not {"serve", "serve.extra", f"serve.extra.{key}"} & replaced
    }
    recipe["serve"] = {**serve, "extra": kept}
    if places := not_to_be_stated(kept):
        raise InputRefused(
            f"{source}: its recipe sets options of the server that no image may set here: "
            f"{', '.join(places)[:300]}",
            hint="they may name files, addresses, programs or code; if you want one, set it"
            " yourself (--set serve.extra.OPTION=VALUE), or all (--set 'serve.extra={…}')",
        )


def _malformed(source: str, why: str) -> InputRefused:
    return InputRefused(
        f"{source} has an invalid recipe in its statement: {why[:300]}",
        hint="do not use the image, or build from its sources with your own recipe",
    )


def _with_base(
    recipe: dict[str, JsonValue], base: str, stated: tuple[str, str]
) -> dict[str, dict[str, str]]:
    """Set the base in the recipe; return its entry for the lock."""
    if not stated[1]:
        raise InputRefused(
            "the image's statement about the merge names no base",
            hint="do not use the image: every build records its base",
        )
    named = base if is_remote(base) or not base else str(Path(base).absolute())
    row, locked = _stated_source("base", "--base ", {"source": named} if named else {}, stated)
    recipe["base"] = row
    return locked


def _with_draft(
    recipe: dict[str, JsonValue], drafted: Statement | None, settings: Sequence[str]
) -> dict[str, dict[str, str]]:
    """Set what drafts, by the statement about it and not by the recipe; return its lock entry.

    `settings` may name it, or leave it out. Raises InputRefused if nothing is stated about it.
    """
    serve = recipe.get("serve")
    stated_so = serve.get("speculative") if isinstance(serve, dict) else None
    if not isinstance(serve, dict) or not isinstance(stated_so, dict):
        return {}  # none, or the recipe's own check says what is wrong
    said = stated_so.pop("draft", None)
    own = [one for one in settings if one.startswith("serve.speculative")]
    drafting = with_settings({"serve": {"speculative": stated_so}}, own)["serve"]["speculative"]
    serve["speculative"] = drafting
    if said is None or not isinstance(drafting, dict) or drafting.get("method") not in _DRAFTED_BY:
        return {}
    mine = drafting.get("draft")
    if drafted is None:
        raise InputRefused(
            "the image has no statement about what drafts its tokens",
            hint="do not use the image: every build records it",
        )
    stated = drafted.dependency_uris.get("draft", ""), drafted.dependencies.get("draft", "")
    given = mine if isinstance(mine, dict) else {"source": mine} if mine else {}
    row, locked = _stated_source("draft", "--set serve.speculative.draft=", given, stated)
    license_ = said.get("license") if isinstance(said, dict) else None
    drafting["draft"] = {**row, **({"license": license_} if license_ else {})}
    return locked


def _stated_source(
    what: str, flag: str, given: Mapping[str, JsonValue], stated: tuple[str, str]
) -> tuple[dict[str, JsonValue], dict[str, dict[str, str]]]:
    """Return a source as a recipe has it, and its lock entry, with what was stated of it.

    `given` is it as the user names it with the `flag`, or empty. Raises UsageError for one that
    only the user may name.
    """
    pin, digest = stated
    row: dict[str, JsonValue]
    if given:
        row = dict(given)
    elif hub := _HUB.fullmatch(pin):
        row = {"source": hub["name"], "revision": hub["revision"]}
    elif wheel := _WHEEL.fullmatch(pin):
        row = {"source": wheel["name"], "sha256": wheel["sha256"]}
    elif is_remote(pin):  # with the user's credentials, only at the user's own word
        raise UsageError(
            f"the image's {what} is {pin[:300]}",
            hint=f"it is fetched only if you name it: {flag.strip()} and the source without its"
            " pin",
        )
    else:
        raise UsageError(
            f"the image's {what} was a folder ({digest[7:19]})",
            hint=f"give its path with {flag}DIR; the build fails if its content is different",
        )
    name = str(row["source"])
    return row, {name: {"pin": pin if is_remote(name) else digest, "digest": digest}}


def _with_adapters(
    adapters: Sequence[dict[str, JsonValue]],
    documents: Sequence[Attachment],
    stated: Mapping[str, tuple[str, str]],
    folder: Path,
) -> dict[str, dict[str, str]]:
    """Write the attached adapters and name them in the recipe; return their lock entries."""
    attached = {
        d.annotations.get(NUMBER, "0"): d for d in documents if d.artifact_type == ADAPTER_TYPE
    }
    locked = {}
    for number, row in enumerate(adapters):
        digest = stated.get(f"adapter:{number}", ("", ""))[1]
        document = attached.get(str(number))
        if document is None or evidence.document_digest(document) != digest:
            raise InputRefused(
                f"adapter {number} of the image's statement is not attached, or was changed",
                hint="do not use the image: its attachments do not match its statement",
            )
        row["source"] = name = f"./adapters/{number}"
        read = str(_write(document, folder / name))
        locked[name] = {"pin": read, "digest": read}
    return locked


def _write(document: Attachment, folder: Path) -> Digest:
    files = []
    for part in document.parts:
        if not _NAMES.fullmatch(part.title) or ".." in PurePosixPath(part.title).parts:
            raise InputRefused(
                f"an attached adapter has an unsafe file name: {part.title[:200]!r}",
                hint="do not use the image: builds never attach such a file",
            )
        path = folder / part.title
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.writelines(part.open())
        files.append(FileEntry(path=part.title, size=part.blob.size, digest=part.blob.digest))
    return tree_digest(files)


def _with_questions(
    recipe: dict[str, JsonValue],
    documents: Sequence[Attachment],
    folder: Path,
    progress: Progress,
) -> None:
    said = recipe.pop("evaluate", None)
    suites = [said] if isinstance(said, dict) else said if isinstance(said, list) else []
    found = [d.parts for d in documents if d.artifact_type == EVALUATION_TYPE]
    parts = [some[0] for some in found if some]
    pictures = _write_pictures([one for some in found[:1] for one in some[1:]], folder)
    items: dict[str, list[dict[str, Json]]] = {}
    corpora: Mapping[str, Json] = {}
    without = set[str]()
    try:
        document: Json = parse(parts[0].read(), largest=PART) if parts else {"items": ()}
        corpora = dict(document.get("corpora", {}))
        for item in document["items"]:
            if not isinstance(item, dict):
                raise TypeError("a question is no object")
            of = str(item.get("suite", ""))
            items.setdefault(of, []).append(_asked_again(item))
            if {str(one["file"]) for one in item.get("pictures", ())} - pictures:
                without.add(of)
    except (ValueError, LookupError, TypeError, AttributeError):  # one is invalid
        items = {}
    kept = []
    for number, suite in enumerate(suites, start=1):
        several = len(suites) > 1
        suite = suite if isinstance(suite, dict) else {}
        # What the build called it.
        by_file = PurePosixPath(str(suite.get("data"))).stem if several else ""
        name = str(suite.get("name") or by_file)
        asked, metric = items.get(name), str(suite.get("metric", "contains"))
        lacks = metric == "embedding" and not corpora.get(name)
        if not asked or metric not in _METRICS or lacks or name in without:
            why = ", for its corpus is not attached" if lacks else ""
            why = ", for its pictures are not attached" if name in without else why
            progress.warn(
                f"the image's evaluation cannot be repeated{why}: the new recipe has no `evaluate`"
                if not several
                else f"suite {number} of the image's evaluation cannot be repeated{why}: it is left"
                " out"
            )
            continue
        data = f"eval-{number}.jsonl" if several else "eval.jsonl"
        corpus = f"corpus-{number}.jsonl" if metric == "embedding" else ""
        try:
            if metric == "tool-call":  # answers have the expected calls as text
                asked = [{**row, "expected": parse(row["expected"][0]) or "none"} for row in asked]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in asked)
            (folder / data).write_text(text, "utf-8")
            asked_again = read_items(folder / data, metric)
            check_metric(metric, asked_again)
            if corpus:
                rows = [json.dumps(row, ensure_ascii=False) for row in corpora[name]]
                (folder / corpus).write_text("\n".join(rows), "utf-8")
                check_documents(asked_again, read_corpus(folder / corpus), data, corpus)
        except (UsageError, ValueError, LookupError, TypeError) as error:
            raise InputRefused(
                f"the image's evaluation has invalid questions: {str(error)[:300]}",
                hint="do not use the image, or build from its sources with your own recipe",
            ) from None
        named = {**({"name": name} if name else {}), **({"corpus": corpus} if corpus else {})}
        again = {key: suite[key] for key in _KEPT_OF_SUITES if key in suite}
        kept.append({"data": data, **named, **again})
    if kept:
        recipe["evaluate"] = kept if len(suites) > 1 else kept[0]


def _asked_again(item: Mapping[str, Json]) -> dict[str, Json]:
    """Return a recorded question as a line of a data file."""
    expected = item.get("grades", item["expected"])
    if "parts" in item and "grades" in item:
        return {"query": item["prompt"], "documents": item["parts"], "expected": expected}
    if "is_set" in item:
        return {"text": item["prompt"], "labels": expected}
    if "parts" in item:
        return {"words": item["parts"], "expected": expected}
    keys = ["messages" if "messages" in item else "prompt"]
    keys += [key for key in ("choices", "tolerance", "tools") if key in item]
    return {**{key: item[key] for key in keys}, "expected": expected}


def _write_pictures(parts: Sequence[AttachmentPart], folder: Path) -> frozenset[str]:
    """Write attached pictures beside the questions; return their files' names.

    Raises InputRefused for a name that no build gives to one.
    """
    written = set[str]()
    if sum(part.blob.size for part in parts) > _MOST_PICTURES:
        raise InputRefused(
            "the image's attached pictures are larger than any build attaches",
            hint="do not use the image",
        )
    for part in parts:
        name = part.title.removeprefix(f"{FOLDER}/")
        if name.partition(".")[0] != part.blob.digest.hex or not _PICTURES.fullmatch(part.title):
            raise InputRefused(
                f"an attached picture has another name than its digest: {part.title[:200]!r}",
                hint="do not use the image: builds never attach such a file",
            )
        if part.blob.size <= MOST_BYTES:
            (folder / FOLDER).mkdir(exist_ok=True)
            (folder / part.title).write_bytes(part.read())
            written.add(name)
    return frozenset(written)


_MOST_PICTURES = 1 << 30
"""Bytes of all pictures together; builds attach a quarter of that at most."""
_PICTURES = re.compile(rf"{FOLDER}/[0-9a-f]{{64}}\.({'|'.join(KINDS)})")
_KEPT_OF_SUITES = (
    "metric", "tolerance", "recall_at", "similarity", "query_prompt", "document_prompt", "against",
    "max_drop", "min_score", "max_tokens", "require",
)  # fmt: skip
