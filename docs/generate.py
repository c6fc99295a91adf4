"""Writes the reference pages from the code; `--check` fails where one is out of date."""

from __future__ import annotations

import ast
import inspect
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from invoke.parser import Argument
from invoke.parser.context import to_flag
from pydantic.fields import FieldInfo
from weightsmith.building.targets import all_targets
from weightsmith.cli import namespace
from weightsmith.core.errors import InputRefused
from weightsmith.core.json_objects import is_inline, is_omitted, part_of, types_of
from weightsmith.core.values import Digest
from weightsmith.evaluating.build_record import BuildRecord
from weightsmith.fleets.file import SECTIONS, Fleet, FleetAdapter
from weightsmith.merging.adapter_config import REFUSED, SETTINGS, UNMERGED
from weightsmith.merging.families import families
from weightsmith.models.facts import ModelFacts
from weightsmith.models.task import Kind
from weightsmith.oci.limits import REGISTRIES
from weightsmith.outside.docker_images import read_bases
from weightsmith.quantizers import formats, legacy_of, of_format
from weightsmith.quantizers.architectures import (
    DENSE,
    EXPERTS,
    FURTHER_EXPERTS,
    JOINED,
    NAMED,
    ROUNDED,
    SEEING,
    STACKED_MXFP4,
    gguf_architectures,
    gguf_projectors,
    vllm_architectures,
)
from weightsmith.quantizers.schemes import SCHEMES
from weightsmith.recipe.schema import Recipe
from weightsmith.recipe.section import fields_of, is_section
from weightsmith.serving.architectures import NOT_PLANNED
from weightsmith.serving.devices import AMX, CPUS, GPUS, Gpu
from weightsmith.serving.pooling import BY_TOKENS, LLAMACPP_PAIRS, VLLM_CLASSES

K = TypeVar("K")

_TYPES = {
    str: "text",
    int: "integer",
    float: "number",
    bool: "boolean",
    Any: "any value",
}
"""How the recipe's reference page names the types of values."""

REFERENCE = Path(__file__).parent / "reference"
_GENERATED = "<!-- Written by docs/generate.py; `make generate` writes it again. -->\n\n"


def pages() -> dict[str, str]:
    """Return every generated file by its name."""
    schema = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "weightsmith recipe",
        **Recipe.model_json_schema(),
    }
    return {
        "recipe.schema.json": json.dumps(schema, indent=2) + "\n",
        "build.schema.json": json.dumps(_build_schema(), indent=2) + "\n",
        "fleet.schema.json": json.dumps(_fleet_schema(), indent=2) + "\n",
        "fleet.md": _GENERATED + "# Fleet file\n\n" + "\n".join(_fleet()) + "\n",
        "recipe.md": _GENERATED + "# Recipe\n\n" + "\n".join(_recipe(Recipe)) + "\n",
        "commands.md": _GENERATED + "# Commands\n\n" + "\n".join(_commands()) + "\n",
        "architectures.md": _GENERATED
        + "# Architectures and packed formats\n\n"
        + "\n".join(_architectures())
        + "\n",
        "adapters.md": _GENERATED + "# Adapters\n\n" + "\n".join(_adapters()) + "\n",
        "registries.md": _GENERATED + "# Registries\n\n" + "\n".join(_registries()) + "\n",
        "targets.md": _GENERATED + "# Targets\n\n" + "\n".join(_targets()) + "\n",
    }


def _build_schema() -> dict[str, Any]:
    """Return the JSON Schema of build.json as this version writes it."""
    definitions: dict[str, Any] = {}
    root = _object_schema(BuildRecord, definitions)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "weightsmith build.json",
        **root,
        "$defs": dict(sorted(definitions.items())),
    }


def _fleet_schema() -> dict[str, Any]:
    """Return the JSON Schema of a fleet file: its sections are the recipe's, with nothing required."""
    schema = Fleet.model_json_schema()
    recipe = Recipe.model_json_schema()
    definitions = {name: dict(one) for name, one in recipe["$defs"].items()}
    for one in definitions.values():
        one.pop("required", None)
    properties = schema["$defs"]["FleetAdapter"]["properties"]
    for key in SECTIONS:
        shape = recipe["properties"][key]
        found = shape.get("$ref") or next(row["$ref"] for row in shape["anyOf"] if "$ref" in row)
        properties[key] = {"$ref": found, "description": properties[key]["description"]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "weightsmith fleet file",
        "$defs": {**definitions, **schema["$defs"]},
    }


def _fleet() -> Iterator[str]:
    yield (
        "Paths start from the file's folder. Keys of an adapter's sections are "
        "[the recipe's](recipe.md); what is not named keeps the recipe's value.\n"
    )
    for prefix, section in (("", Fleet), ("adapters[].", FleetAdapter)):
        for attribute, field in fields_of(section).items():
            name = field.alias or attribute
            if field.description == f"What differs in `{name}`.":
                continue
            kind = "list of globs and entries" if name == "adapters" else None
            kind = kind or ("mapping" if name in SECTIONS else _type(field.annotation))
            yield f"- `{prefix}{name}` ({kind}{_default(field)}): {_oneline(field.description)}"
    names = ", ".join(f"`{name}`" for name in SECTIONS)
    yield f"\nAn entry may also have {names}: what differs in that section."


def _object_schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a dataclass; what it refers to goes to the definitions."""
    told, properties, required = _attribute_docs(kind), {}, []
    for one in fields(kind):
        hint = types_of(kind)[one.name]
        if is_inline(one):
            properties |= _object_schema(part_of(hint), definitions)["properties"]
            continue
        properties[one.name] = _value_schema(hint, definitions)
        if one.name in told:
            properties[one.name]["description"] = told[one.name]
        if not is_omitted(one):
            required.append(one.name)
    return {
        "type": "object",
        "description": " ".join((inspect.getdoc(kind) or "").split()),
        "properties": properties,
        "required": required,
    }


def _attribute_docs(kind: type) -> dict[str, str]:
    """Return the docstrings below a dataclass's fields, those of its bases too."""
    found: dict[str, str] = {}
    for one in reversed([each for each in kind.__mro__ if is_dataclass(each)]):
        (tree,) = ast.parse(inspect.cleandoc(inspect.getsource(one))).body
        body = tree.body if isinstance(tree, ast.ClassDef) else []
        for first, second in pairwise(body):
            match first, second:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = " ".join(text.split())
    return found


def _value_schema(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, parts = get_origin(hint), get_args(hint)
    if hint is Any:
        return {}
    if origin is Literal:
        return {"type": "string"}
    if origin is Annotated:
        return {"type": ["number", "null"]}
    if origin in (Union, UnionType):
        return {"anyOf": [_value_schema(part_of(hint), definitions), {"type": "null"}]}
    if origin is tuple and parts[-1] is Ellipsis:
        return {"type": "array", "items": _value_schema(parts[0], definitions)}
    if origin is tuple:
        inner = [_value_schema(part, definitions) for part in parts]
        return {"type": "array", "prefixItems": inner, "minItems": len(parts), "items": False}
    if origin is not None and issubclass(origin, Mapping):
        return {"type": "object", "additionalProperties": _value_schema(parts[1], definitions)}
    if is_dataclass(hint):
        name = hint.__name__  # type: ignore[union-attr]
        if name not in definitions:
            definitions[name] = {}
            definitions[name] = _object_schema(hint, definitions)
        return {"$ref": f"#/$defs/{name}"}
    if hint is Digest:
        return {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}
    names = {str: "string", int: "integer", float: "number", bool: "boolean"}
    return {"type": names[hint]}


def _registries() -> Iterator[str]:
    yield "Limits that registries document, in bytes and seconds; they were not measured here. A layer that is too large for the registry is refused before anything is sent; `bake --max-layer-size` splits safetensors files, `quantize --split-max-size` GGUF files. Every image has at most 125 layers, including the base's: Docker's overlay2 supports no more.\n"
    yield "| registry | largest layer | longest upload | layers | in chunks | notes | source |\n|---|---|---|---|---|---|---|"
    for limits in REGISTRIES:
        figures = [limits.largest_layer, limits.upload_seconds, limits.most_layers]
        cells = [f"{figure:,}" if figure else "" for figure in figures]
        chunks = "no" if limits.in_one_piece else "yes"
        yield f"| {limits.name} | {' | '.join(cells)} | {chunks} | {limits.note} | {limits.source} |"


def _recipe(
    section: type[Any], prefix: str = "", said: dict[str, str] | None = None
) -> Iterator[str]:
    """Yield a line for each key; what was said of another key is not said again."""
    said = {} if said is None else said
    if not prefix:
        yield "If a value is given in several places, the last of these counts: its default, the recipe (a file, or `--base` and `--adapter`), `--set`, a flag such as `--max-model-len`. A flag with [its default](commands.md) counts as not given. Of the values that a key may have, `auto` or else the first is the default.\n"
    # First what is no section, and in a section what it cannot do without.
    fields = sorted(
        fields_of(section).items(),
        key=lambda item: (
            not item[1].is_required() if prefix else bool(_inner(item[1].annotation)[0])
        ),
    )
    for attribute, field in fields:
        name = field.alias or attribute
        inner, many = _inner(field.annotation)
        place = f"{prefix}{name}" + ("[]" if many else "")
        if inner:
            told = _oneline(field.description or inner.__doc__)
            same = next((one for one, at in _SECTIONS if at is inner and one != place), "")
            if same and prefix:
                yield f"- `{place}`: {told} Its keys are those of `{same}`."
                continue
            yield f"- `{place}`: {told}" if prefix else f"\n## {name}\n\n{told}\n"
            any_key = "FORMAT." if get_origin(field.annotation) is dict else ""
            yield from _recipe(inner, f"{place}.{any_key}", said)
        else:
            told = _oneline(field.description)
            first = said.setdefault(told, place)
            told = told if first == place else f"As `{first}`."
            yield f"- `{place}` ({_type(field.annotation)}{_default(field)}): {told}"


def _default(field: FieldInfo) -> str:
    """Return what stands beside a key's type: nothing for no value, or the first of a choice."""
    if field.is_required():
        return ", required"
    value = field.get_default(call_default_factory=True)
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    if value in (None, "", (), [], {}) or value in choices[:1] or value == "auto":
        return ""
    return f", default `{json.dumps(value)}`"


def _inner(annotation: Any) -> tuple[type[Any] | None, bool]:
    choices = [annotation, *getattr(annotation, "__args__", ())]
    found = [choice for choice in choices if is_section(choice)]
    return (found[0] if found else None), getattr(annotation, "__origin__", None) is tuple


_SECTIONS = [
    (name, at) for name, field in fields_of(Recipe).items() if (at := _inner(field.annotation)[0])
]
"""The recipe's sections, whose keys are listed once."""


def _type(annotation: Any) -> str:
    kind, parts = get_origin(annotation), get_args(annotation)
    if kind is Literal:
        return ", ".join(f"`{value}`" for value in parts)
    if kind in (Union, UnionType):
        return " or ".join(_type(part) for part in parts if part is not NoneType)
    if kind is tuple:
        return f"list of {_type(parts[0])}"
    if kind is dict:
        return f"mapping of {_type(parts[0])} to {_type(parts[1])}"
    return _TYPES[annotation]


def _oneline(text: str | None) -> str:
    return " ".join((text or "").split())


def _commands() -> Iterator[str]:
    yield (
        "Run as `invoke NAME` from a checkout or `weightsmith NAME` where the package is "
        "installed. Flags marked * may be repeated. What sets a key of the recipe is explained "
        "[there](recipe.md), and by `weightsmith NAME --help`. Each command has:\n"
    )
    namespace["report"].positional = ("folder", "other")  # as many as a command line has words
    names = sorted(namespace.task_names)
    rows = {name: tuple(map(_flag_row, namespace[name].get_arguments())) for name in names}
    used = Counter(row for name in names for row in rows[name])
    yield from _described([row for row in used if used[row] == len(names)])
    common = [r for r in used if _COMMON <= used[r] < len(names) and r[0].startswith("--")]
    yield "## Flags of several commands\n\nEach command names those that it has, or their group.\n"
    groups = {name: [r for r in common if r[0] in flags.split()] for name, flags in _GROUPS.items()}
    grouped = {row for group in groups.values() for row in group}
    yield from _described([row for row in common if row not in grouped])
    for name, group in groups.items():
        yield f"{name[:1].upper()}{name[1:]}:\n"
        yield from _described(group)
    first = {row: name for name in reversed(names) for row in rows[name]}
    for name in names:
        yield f"\n## {name}\n\n{inspect.getdoc(namespace[name].body)}\n"
        own = [row for row in rows[name] if row not in common and used[row] < len(names)]
        yield from _described([row for row in own if first[row] == name], name != "bench")
        for other in sorted({first[row] for row in own} - {name}):
            same = [row for row in own if first[row] == other]
            yield f"As in [{other}](#{other}): {_named(same)}.\n"
        if also := [row for row in rows[name] if row in common]:
            whole = [name for name, group in groups.items() if {*group} <= {*also}]
            held = {row for name in whole for row in groups[name]}
            yield f"Also {', '.join(filter(None, [*whole, _named(r for r in also if r not in held)]))}."


def _described(flags: Sequence[tuple[str, str, str]], by_key: bool = True) -> Iterator[str]:
    """Yield a table of flags; if `by_key`, those that are keys of the recipe in a line."""
    keys = {flag: key for flag in flags if by_key and (key := _key_of(flag[2]))}
    if len(keys) < len(flags):
        yield from (
            f"- `{flag}`{star}: {told}"
            for flag, star, told in flags
            if (flag, star, told) not in keys
        )
        yield ""
    for section, names in _by((_setting(*flag[:2], key) for flag, key in keys.items())).items():
        yield f"Keys of the recipe's [`{section}`](recipe.md#{section}): {', '.join(names)}.\n"


def _setting(name: str, star: str, key: str) -> tuple[str, str]:
    """Return how a flag is named beside its section, with the key's name if it is another."""
    section, _, field = key.rpartition(".")
    other = "" if name == to_flag(field) else f" (`{field}`)"
    return f"`{name}`{star}{other}", section


@cache
def _keys() -> Mapping[str, str]:
    """Return the recipe's keys by what flags say of them."""
    found: dict[str, str] = {}
    for row in _recipe(Recipe):
        if row.startswith("- `") and "- `bench." not in row and "): " in row:
            key, told = row[3:].split("` (")[0], row.partition("): ")[2].replace("`", "")
            found.setdefault(told[:1].lower() + told[1:].removesuffix("."), key.replace("[]", ""))
    return found


def _key_of(meaning: str) -> str:
    """Return the recipe's key with this meaning, or ""."""
    told = meaning[:1].lower() + meaning[1:]
    return max(((k, key) for k, key in _keys().items() if told.startswith(k)), default=("", ""))[1]


def _named(flags: Iterable[tuple[str, str, str]]) -> str:
    return _spans(flag[0] for flag in flags)


_GROUPS = {
    "signing": "--sign-key --signature-format --keyless --trust-config",
    "identities": "--certificate-identity --certificate-identity-regexp --certificate-oidc-issuer "
    "--certificate-oidc-issuer-regexp --trusted-root",
    "jobs": "--runner --allow-network-in-jobs --memory",
    "caches": "--cache --cache-from",
}
"""Flags that most commands have together."""
_COMMON = 3
"""A flag that as many commands have is described once."""


def _flag_row(argument: Argument) -> tuple[str, str, str]:
    """Return a flag's name, a star if it may be repeated, and its meaning with its default."""
    name = argument.name.upper() if argument.positional else to_flag(argument.name)
    default = argument.default if argument.default not in (None, [], "") else ""
    shown = "" if default in ("", False, "0", "0.0") else f"; default `{default}`"
    meaning = _oneline(argument.help).removesuffix("; repeat for several") + shown
    return name, "*" if argument.kind is list else "", meaning


def _adapters() -> Iterator[str]:
    yield (
        "What PEFT can write, and what `merge` does with it. What is not merged is refused with "
        f"the reason; {UNMERGED}.\n"
    )
    merged = [row for family in families() for row in family.variants.items()]
    refused = [(f"`{name}`", why) for name, why in (SETTINGS | REFUSED).items()]
    for title, rows in (("Merged", merged), ("Refused", refused)):
        yield f"\n## {title}\n"
        for why, alike in _by(rows).items():
            yield f"- **{', '.join(alike)}**: {_oneline(why)}"
    yield (
        "- **PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ**, until they are converted: their initialisation "
        "[changed the base](../explanation/exact-merge.md#initialisations-that-change-the-base)"
    )


def _spans(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _by(pairs: Iterable[tuple[str, K]]) -> dict[K, list[str]]:
    """Return what has the same second value together, in the order of the first of each."""
    found: dict[K, list[str]] = {}
    for name, key in pairs:
        found.setdefault(key, []).append(name)
    return found


def _architectures() -> Iterator[str]:
    yield "This table says which architectures have which packed formats. Others are refused before the merge: serve them in 16 bits (target `vllm`), or as GGUF, whose converter knows more of them; [some models](#what-no-target-serves) no target serves.\n"
    yield "Of vision models, only the language model is quantized. Routers, gates of shared experts, the small projections of latent attention, embeddings and head stay in 16 bits, byte for byte.\n"
    packed = [*SCHEMES, *(n for n, f in formats().items() if n not in SCHEMES and f.kind != "gguf")]
    kinds = (
        (DENSE | JOINED | NAMED, ""),
        (EXPERTS | FURTHER_EXPERTS | STACKED_MXFP4, " (experts)"),
        (SEEING, " (vision)"),
    )
    known = {
        f"{name}{kind}": tuple(one for one in packed if _becomes(name, one))
        for names, kind in kinds
        for name in sorted(names)
    }
    had_by = ((one, tuple(name for name in known if one in known[name])) for one in packed)
    alike = {min(of, key=len): of for of in _by(had_by).values()}
    also = [
        f"`{one}` for {_spans(other for other in of if other != one)}"
        for one, of in alike.items()
        if of[1:]
    ]
    yield f"In the table, one format stands for others that the same architectures have: {'; '.join(also)}.\n"
    yield "| architectures | packed formats |\n|---|---|"
    for has, names in _by(known.items()).items():
        yield f"| {', '.join(names)} | {_spans(one for one in has if one in alike)} |"
    yield "\n## Models that see, as GGUF\n"
    yield "Of these, llama.cpp's converter can also write a [projector](../how-to/quantize.md#models-that-see), with which its server reads pictures, if the model has a vision tower. Of others, and of models that only hear, the file has the language model alone.\n"
    yield f"{', '.join(sorted(gguf_projectors() & gguf_architectures()))}.\n"
    yield "The same for these, if `text_config` in config.json names the language model's own class in `architectures`, as SmolVLM's published files do.\n"
    yield f"{', '.join(sorted(_by_their_text()))}.\n"
    yield "\n## What else transformers and vLLM know\n"
    yield "Models that generate text in the pinned transformers and the pinned vLLM ([`docs/known.py`](../known.py) lists them), and have no packed format here. Serve them in 16 bits (target `vllm`); those with a star run in vLLM with transformers' own class. A packed format of them is refused before the merge with exit code 3.\n"
    rest = [name for name in vllm_architectures() if name not in ROUNDED | NOT_PLANNED.keys()]
    as_gguf = gguf_architectures() | _by_their_text()
    for title, there in (("Also as GGUF", True), ("Not as GGUF", False)):
        names = [name for name in rest if (name in as_gguf) == there]
        yield f"{title}: {', '.join(map(_starred, names))}.\n"
    yield "\n## Models that do not chat\n"
    yield "What a model gives follows from its class, from sentence-transformers' files beside it (`modules.json`, `1_Pooling/config.json`), and from the head that an adapter brings. `plan` refuses what is not below, with the reason. Numbers were compared with transformers' for most of these; the others are in the engines' tables.\n"
    yield "| gives | target `vllm` | llama.cpp's targets |\n|---|---|---|"
    yield from _pooled()
    yield "\nDecoders are those that generate text above, as `ForCausalLM` or `Model` with a `modules.json`, or with a head of their own. Vectors are pooled by mean, cls or the last token: no engine has sentence-transformers' other ways (max, weighted means, several joined). vLLM also computes Dense modules behind that, if their folder has `model.safetensors`. SGLang, TensorRT-LLM and TGI are planned for chats alone. Such models get no importance matrix and no quality gate; of packed formats, decoders that give vectors have those above.\n"
    yield "\n## What no target serves\n"
    yield "`plan`, `build` and `render` refuse, with exit code 3 and before any work:\n"
    yield "- encoders with a decoder, such as T5, BART and Whisper;\n- models that fill gaps, mark answers or hear, and classes that are not in the table above, such as DistilBERT's classifiers;\n- rerankers by the logit of one token, or of two of another class than `Qwen3ForCausalLM` (as `ForSequenceClassification` with one label they are served);\n- decoders that keep states and no keys and values: Mamba, RWKV;\n- decoders whose cache is not planned here, and unknown ones whose `config.json` leaves doubt about it.\n"
    yield "vLLM knows these of the last two kinds:\n"
    yield "| no plan, because it | architectures |\n|---|---|"
    yield from (
        f"| {why} | {', '.join(sorted(names))} |" for why, names in _by(NOT_PLANNED.items()).items()
    )
    yield "\n`merge` and `validate` take them all, `push DIR --to hf://OWNER/NAME` publishes the result, and `bake --kind volume` makes an image of its files alone; `bake --kind image` makes one that is neither planned nor tested."


def _pooled() -> Iterator[str]:
    """Yield the rows of the table of models that do not chat."""
    vectors = "BertModel, DistilBertModel, ModernBertModel, RobertaModel, XLMRobertaModel, decoders"
    by_tokens = ", ".join(sorted(BY_TOKENS))
    pairs = f"{', '.join(sorted(LLAMACPP_PAIRS))}; by two tokens (LogitScore) {by_tokens}"
    rows: tuple[tuple[str, Kind, str], ...] = (
        ("vectors", "embed", vectors),
        ("scores of pairs (one label)", "classify", pairs),
        ("labels of texts", "classify", ""),
        ("labels of tokens", "token-classify", ""),
    )
    for what, kind, converted in rows:
        own = ", ".join(sorted(VLLM_CLASSES[kind]))
        decoders = "" if kind == "token-classify" else ", decoders"
        decoders += f"; by two tokens {by_tokens}" if what == rows[1][0] else ""
        yield f"| {what} | {own}{decoders} | {converted or 'no'} |"


def _by_their_text() -> set[str]:
    """Return the models with a projector whose language model has a class of its own."""
    seeing = gguf_projectors() - gguf_architectures()
    return {name for name in seeing if name.endswith("ForConditionalGeneration")}


def _starred(architecture: str) -> str:
    own = vllm_architectures()[architecture] == "own"
    return architecture if own else f"{architecture}*"


def _becomes(architecture: str, name: str) -> bool:
    """Return whether a model of even dimensions can have a format."""
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 4}
    shape |= {"num_hidden_layers": 2, "vocab_size": 512}
    model = ModelFacts.of({**shape, "architectures": [architecture]})
    try:
        of_format(name).check_input(formats()[name], model)
    except InputRefused:
        return False
    return True


def _targets() -> Iterator[str]:
    yield "A target is an engine and a weight format; the engine's name alone means 16 bits.\n"
    yield "| bits per weight | targets |\n|---|---|"
    every = all_targets()
    sizes = [(f"`{n}`", t.format.bits_per_weight) for n, t in every.items() if not t.format.base]
    for bits, names in sorted(_by(sizes).items(), reverse=True):
        yield f"| {bits:g} | {', '.join(names)} |"
    for engine in {t.engine.name: t.engine for t in every.values()}.values():
        if engine.legacy:
            yield f"\nTargets that begin with `{engine.name}` are {engine.legacy}."
    for format_ in sorted(formats().values(), key=lambda one: one.name):
        if legacy := legacy_of(format_):
            yield f"\nTargets that end in `{format_.name}` are {legacy}."
    engines = sorted({one.engine.title for one in every.values() if one.format.base})
    yield (
        f"\nEach target of {' and '.join(engines)} above that names a format of weights has another"
        " one for [adapters that are not merged](../explanation/when-not-to-merge.md"
        "#on-a-quantized-base): the same name with `-lora` at its end, such as"
        " `llamacpp-q4_k_m-lora` or `vllm-awq-lora`. Its base is in that format, its adapters in"
        " 16 bits."
    )
    yield "\n## Base images\n\n| purpose | image |\n|---|---|"
    for purpose, base in sorted(read_bases().items()):
        yield f"| {purpose} | `{base.reference}` |"
    yield (
        "\n## GPUs\n\nMemory is what a process sees on that GPU. "
        "Compute capabilities and types are from the CUDA C++ Programming Guide. "
        f"{_missing('BF16', lambda gpu: gpu.bf16)} {_missing('FP8', lambda gpu: gpu.fp8)}\n"
    )
    yield "| name | capability | memory |\n|---|---|---|"
    for name, gpu in sorted(GPUS.items()):
        numbers = gpu.compute_capability
        capability = ".".join(map(str, numbers)) if any(numbers) else gpu.generation
        yield f"| `{name}` | {capability} | {gpu.usable_bytes >> 20:,} MiB |"
    yield (
        "\n`cpu`, or no name, plans for `serve.memory`, or else this machine's memory. So does "
        f"`{AMX}`, for {CPUS[AMX]}: vLLM loads "
        "[more formats](../how-to/quantize-for-vllm.md#experts-on-a-cpu) on these."
    )


def _missing(kind: str, has: Callable[[Gpu], bool]) -> str:
    """Say which GPUs do not compute in a type."""
    names = [f"`{name}`" for name, gpu in sorted(GPUS.items()) if not has(gpu)]
    return f"Without {kind}: {', '.join(names)}."


def main(arguments: list[str]) -> int:
    """Write the pages, or say which are stale; the exit code is how many."""
    stale = []
    for name, text in pages().items():
        path = REFERENCE / name
        if path.is_file() and path.read_text("utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in arguments:
            REFERENCE.mkdir(parents=True, exist_ok=True)
            path.write_text(text, "utf-8")
    if stale and "--check" in arguments:
        print(f"out of date: {', '.join(stale)}: run `make generate`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
