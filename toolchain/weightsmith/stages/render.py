"""Artifact facts -> ServingConfig: plan the memory and render the serving files.

The manifests of a volume take program, variables, memory and probes of the tested image, so that
both ways serve alike. For llama.cpp on CPUs their engine is upstream's image, because ours exists
only below weights; an image of its own would be a second thing to sign, scan and update.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from pathlib import Path

from jinja2 import (
    Environment,
    FileSystemLoader,
    StrictUndefined,
    TemplateError,
    TemplateNotFound,
    UndefinedError,
)

from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.core.ports import AnySigner, Signer
from weightsmith.core.resources import templates
from weightsmith.core.thin import FOLDER, SERVED, SPARE
from weightsmith.core.values import (
    Artifact,
    Checkpoint,
    Digest,
    JsonValue,
    Published,
    Sources,
    Writable,
)
from weightsmith.models.facts import ModelFacts, read_facts
from weightsmith.models.gguf_config import gguf_models
from weightsmith.models.templates import has_tools
from weightsmith.oci.layout import is_layout
from weightsmith.oci.references import DOCKER_HUB, Reference
from weightsmith.provenance.attest import ImageMaterials, ThinParts
from weightsmith.provenance.labels import reference
from weightsmith.provenance.statements import LEVEL, TEST_RESULT, VSA, WITHDRAWAL
from weightsmith.quantizers import legacy_of
from weightsmith.quantizers.checkpoints import inputs_per_scale
from weightsmith.recipe.schema import Suite
from weightsmith.serving import engines
from weightsmith.serving.architectures import DONE_HERE, check_served
from weightsmith.serving.compatibility import check_adapters, check_support
from weightsmith.serving.devices import CPU, is_cpu
from weightsmith.serving.engine import Engine, Projector, ServedModel, ServeOptions, projector_in
from weightsmith.serving.healthcheck import health_command, startup_replay
from weightsmith.serving.memory import human
from weightsmith.serving.parsers import AUTO, NONE, ParserChoice
from weightsmith.serving.plan import (
    DRAIN_SECONDS,
    GRACE_SECONDS,
    NOTICE_SECONDS,
    ServingConfig,
    ServingPlan,
)
from weightsmith.serving.pooling import ASKED, bases
from weightsmith.serving.speculation import check_speculation
from weightsmith.serving.targets import Target
from weightsmith.steps.bases import OWN, base_reference
from weightsmith.steps.destinations import is_written, write_files
from weightsmith.steps.drafting import FILE as DRAFT_FILE
from weightsmith.steps.drafting import FOLDER as DRAFT
from weightsmith.steps.drafting import check_drafter, draft_path
from weightsmith.steps.healthcheck import probes_replay, reads_weights, wants_probe
from weightsmith.steps.serve_options import serve_options
from weightsmith.steps.served_adapters import base_weight_bytes, unmerged_adapters
from weightsmith.steps.sizes import ForeseenTree, expected_projector
from weightsmith.steps.stage_result import StageResult, Timer, unrecorded
from weightsmith.steps.step import (
    Foreseen,
    ForeseenWeights,
    Foresight,
    Results,
    Step,
    TargetStep,
    UnforeseenStep,
)
from weightsmith.steps.thin import THIN
from weightsmith.steps.tools import Tools

USER_ID = 65532
"""The unprivileged user of images, the same as in distroless images."""

VOLUME_FOLDER = "volume"
"""Where manifests for an image of weights are in a target's results."""
_IVPOL = "kyverno-ivpol.yaml.j2"
POLICIES = "policies"
"""Where policies that admit an image are in a target's results, and their templates' folder."""
_OF_LORA = frozenset({"enable-lora", "max-loras", "max-lora-rank"})
"""Settings that KServe makes of `spec.model.lora`."""
_SLOWEST_DISK = 50_000_000
_ESCAPED = re.compile(r'["\\]|[^ -~]')
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def render(
    *,
    target: Target,
    name: str,
    version: str,
    model: ModelFacts,
    model_file: str,
    weight_bytes: int,
    options: ServeOptions,
    image: str,
    made_from: tuple[Digest, ...],
    projector: Projector | None = None,
    notes: tuple[str, ...] = (),
    replays: bool = False,
    whole_weights: bool = False,
) -> ServingConfig:
    """Plan the memory and render every file of a target, without writing them.

    `weight_bytes` are with a `projector`, which lies beside the model. `image` is a reference, or
    "" if it is not known yet; manifests then use `name:version`. The caller's `notes` precede the
    plan's own. With `replays`, the image has the program that asks its replay set, and manifests
    call it; with `whole_weights`, it compares all their bytes before.
    Raises UsageError if the options do not fit or a template does not render, InputRefused for
    a model that no target serves, and for wrong numbers in config.json.
    """
    check_served(model)
    engine = target.engine
    _check_task(model, engine, options)
    for key in ("tool_parser", "reasoning_parser"):
        if getattr(options, key) not in ("", AUTO, NONE) and not engine.has_parsers:
            notes = (
                *notes,
                f"serve.{key} is for other targets: {engine.title} reads calls and thoughts itself",
            )
    size = projector.size if projector else 0
    format_ = target.format.without_adapters
    options = replace(options, format=format_, projector_bytes=size)
    if wanted := options.speculation:
        known, apart = engine.speculates, engine.most_apart
        check_speculation(
            model, wanted, engine.title, known, options.extra, apart, engine.drafts_unplanned
        )
        notes = (*notes, wanted.note)
    plan = engine.plan(model, weight_bytes, options)
    told = filter(None, (engine.legacy, legacy_of(target.format)))
    legacy = [f"{target.name} is {why}" for why in told]
    plan = replace(plan, notes=(*notes, *plan.notes, *legacy))
    shown = engine.fixed_name or options.served_model_name or name
    served = _served(engine, shown, model_file, weight_bytes, projector)
    paths = {a.name or served.name: f"{engine.model_dir}/{a.folder}" for a in options.adapters}
    served = replace(served, adapters=paths)
    config = replace(
        _config(target, plan, served), made_from=made_from, manifests=options.manifests
    )
    image = image or f"{repository_name(name)}:{version}"
    asked, request = ASKED[model.task.kind]
    body: dict[str, JsonValue] = {"model": served.name, **request}
    facts: dict[str, Writable] = {
        "kind": model.task.kind,
        "labels": model.task.labels,
        "prompts": [row for row in model.task.sentence.prompts if row[1]],
        "asked": asked,
        "body": body,
        "name": name,
        "version": version,
        "image": image,
        "image_parts": _parts(image),
        "env": config.env,
        "healthcheck": list(config.healthcheck),
        "model_path": served.path,
        "served_name": served.name,
        "adapters": served.adapters,
        "kserve_lora": _kserve_lora(options, served),
        "startup_seconds": served.startup_seconds,
        "replay": startup_replay(engine, plan, whole_weights=whole_weights) if replays else None,
        "manifests": list(options.manifests),
        **_engine_facts(engine, plan, served),
    }
    files = render_files((templates() / engine.name, templates() / "deploy"), facts)
    files |= _more_manifests(engine, options.manifests, facts)
    whole, portable = (
        json.dumps(one, indent=2, sort_keys=True) + "\n"
        for one in (plan.to_json(), plan.portable())
    )
    inside = {path: files[file] for path, file in engine.image_files.items()}
    return replace(
        config,
        files={**files, "plan.json": whole},
        image_files={**inside, "/etc/weightsmith/plan.json": portable},
    )


def _more_manifests(
    engine: Engine, wanted: Sequence[str], facts: Mapping[str, Writable]
) -> dict[str, str]:
    """Return what `serve.manifests` asks for; raises UsageError for what an engine cannot have."""
    lacks = "" if engine.load_metrics else "has no metrics for Prometheus"
    missing = {
        "pod-monitor": lacks,
        "keda": lacks,
        "inference-pool": ""
        if engine.can_be_picked
        else "has no metrics that an endpoint picker reads",
    }
    for name in wanted:
        if why := missing[name]:
            raise UsageError(
                f"serve.manifests: no {name} for target {engine.name}: {engine.title} {why}",
                hint=f"leave {name} out, or build this target by a recipe of its own",
            )
    environment = _environment((templates() / "manifests",))
    return {f"{name}.yaml": _one(environment, f"{name}.yaml.j2", facts) for name in wanted}


def _check_task(model: ModelFacts, engine: Engine, options: ServeOptions) -> None:
    """Refuse a model that does not chat where the engine does not serve it as it was trained."""
    task = model.task
    if task.kind == "generate":
        return
    if why := engine.lacks(model):
        others = [one.name for one in engines().values() if not one.lacks(model)]
        served = f"target {others[0]} serves it" if others else f"no target serves it{bases(model)}"
        raise InputRefused(
            f"{model.architecture} {task.does}: {engine.title} {why}",
            hint=f"{served}; {DONE_HERE}",
        )
    if options.adapters:
        raise UsageError(
            f"{model.architecture} {task.does}: adapters beside it are not planned here",
            hint=f"merge them: choose target {engine.name}",
        )


def _check_similarity(suite: Suite, model: ModelFacts, engine: Engine) -> None:
    """Refuse a suite that compares vectors as the engine would not serve a model that does so."""
    if not suite.similarity:
        return
    sentence = replace(model.task.sentence, similarity=suite.similarity)
    if why := engine.lacks(replace(model, read_task=replace(model.task, sentence=sentence))):
        raise InputRefused(
            f"{suite.data}: similarity {suite.similarity}: {engine.title} {why}",
            hint="compare by cosine, or build this target by a recipe of its own",
        )


def check_calls(model: ModelFacts, engine: Engine, plan: ServingPlan, data: str) -> None:
    """Raise UsageError for a question file of tool calls that a server could not make."""
    if not has_tools(model.chat_template):
        why = "no chat template that says which tools may be called"
        hint = "take a base with such a template, or put a chat_template.jinja beside the adapter"
    elif engine.has_parsers and "tool-call-parser" not in plan.settings:
        why = "no parser for its calls, and would refuse every question"
        hint = f"name a parser of {engine.title} for this template: serve.tool_parser"
    else:
        return
    raise UsageError(f"{data} asks for tool calls, and the server has {why}", hint=hint)


def render_volume(
    config: ServingConfig,
    engine: Engine,
    name: str,
    version: str,
    *,
    volume: str,
    engine_image: str,
    merged: bool,
) -> dict[str, str]:
    """Return manifests that mount an image of weights beside the engine's own image.

    `volume` is the image of weights, by digest. `config` is the tested image's: the same program,
    settings and memory. Adapters beside their base (not `merged`) have fewer manifests.
    """
    plan, weights = config.plan, config.env.get("LLAMA_ARG_MODEL", "")
    served = ServedModel(
        path=weights or engine.model_dir,
        name=config.served_name,
        startup_seconds=startup_seconds(plan.weight_bytes),
    )
    inside = sorted(path for path in config.image_files if path in config.command)
    arguments = {k: v for k, v in engine.file_settings(plan, served).items() if k != "model"}
    facts = {
        "name": name,
        "version": version,
        "volume": volume,
        "image": volume,
        "engine_image": engine_image,
        "env": {
            key: value
            for key, value in config.env.items()
            if key not in (engine.threads_variable, engine.key_variable)
        },
        "model_dir": engine.model_dir,
        "model_path": served.path,
        "served_name": config.served_name,
        "startup_seconds": served.startup_seconds,
        "replay": None,
        "manifests": list(config.manifests),
        "settings": [
            {"path": path, "key": path.rpartition("/")[2], "text": config.image_files[path]}
            for path in inside
        ],
        "server_arguments": _as_arguments(arguments),
        **_engine_facts(engine, plan, served),
        "start_command": [*config.entrypoint, *config.command],
    }
    own = templates() / f"volume-{engine.name}"
    routed = merged and plan.gpus and "runner" not in plan.settings  # llm-d routes chats
    folders = [templates() / "volume", *([own] if routed and own.is_dir() else [])]
    environment = _environment((*folders, templates() / "deploy"))
    names = sorted(path.name for folder in folders for path in folder.glob("*.j2"))
    return {name.removesuffix(".j2"): _one(environment, name, facts) for name in names}


def render_policies(
    name: str, version: str, *, repository: str, signer: AnySigner, proven_on: Sequence[str]
) -> dict[str, str]:
    """Return policies of Kyverno and sigstore's policy-controller for a repository's images.

    They admit only what the key or the identity of `signer` signed, and whose test result it signed
    too, as passed; with `proven_on`, also proven on these node types. Kyverno's newer kind reads
    statements in bundles alone, so a key that signs none has no such policy.
    """
    bundles = not isinstance(signer, Signer) or signer.format != "cosign"
    facts: dict[str, Writable] = {
        "name": name,
        "version": version,
        "images": [f"{repository}{one}" for one in (":*", "@*")],
        "key": signer.public.decode().strip() if isinstance(signer, Signer) else "",
        "identity": "" if isinstance(signer, Signer) else signer.identity,
        "issuer": "" if isinstance(signer, Signer) else signer.issuer,
        "repositories": _spellings(repository),
        "passed": TEST_RESULT,
        "withdrawal": WITHDRAWAL,
        "summary": VSA,
        "levels": [f"{LEVEL}_ON_{one}" for one in proven_on],
    }
    environment = _environment((templates() / POLICIES,))
    names = [each for each in sorted(environment.list_templates()) if bundles or each != _IVPOL]
    return {each.removesuffix(".j2"): _one(environment, each, facts) for each in names}


def _spellings(repository: str) -> list[str]:
    """Return every way in which a pod may write a repository's name: Docker Hub has several."""
    host, _, path = repository.partition("/")
    if host != DOCKER_HUB:
        return [repository]
    short = [path, *([path.removeprefix("library/")] if path.startswith("library/") else [])]
    return [
        f"{one}{name}" for name in short for one in (f"{DOCKER_HUB}/", f"index.{DOCKER_HUB}/", "")
    ]


def render_thin(
    config: ServingConfig,
    engine: Engine,
    name: str,
    version: str,
    *,
    image: str,
    parts: ThinParts,
    replays: bool = False,
) -> dict[str, str]:
    """Return manifests and README of an image that merges where it starts.

    `config` is the thin image's. Limits of time and memory are those of merging and serving.
    """
    plan, size = config.plan, parts.model.size
    served = ServedModel(
        path=SERVED, name=config.served_name, startup_seconds=2 * startup_seconds(size)
    )
    facts = {
        "name": name,
        "version": version,
        "image": image,
        "env": config.env,
        "healthcheck": list(config.healthcheck),
        "startup_seconds": served.startup_seconds,
        "replay": startup_replay(engine, plan) if replays else None,
        "manifests": list(config.manifests),
        **_engine_facts(engine, plan, served),
        "merged_bytes": size,
        "merged_spare": SPARE,
        "merge_memory": parts.model.memory_bytes,
        "merge_limit": ServingPlan(host_bytes=parts.model.memory_bytes).memory_limit_bytes,
        "merge_command": list(parts.entrypoint),
        "base_image": parts.model.mounted,
        "base_folder": FOLDER,
        "model_dir": parts.model.base,
    }
    environment = _environment((templates() / THIN, templates() / "deploy"))
    names = ["compose.yaml.j2", *(path.name for path in (templates() / THIN).glob("*.j2"))]
    return {each.removesuffix(".j2"): _one(environment, each, facts) for each in sorted(names)}


def render_unplanned(
    target: Target,
    name: str,
    model_file: str,
    weight_bytes: int,
    projector: Projector | None = None,
) -> ServingConfig:
    """Return a configuration with the engine's defaults, for a target without a memory plan.

    The image gets only the files that the process reads.
    """
    engine = target.engine
    plan = ServingPlan(device=CPU if engine.base.cpu else "gpu")
    served = _served(engine, name, model_file, weight_bytes, projector)
    config, settings = _config(target, plan, served), engine.file_settings(plan, served)
    facts: dict[str, Writable] = {"name": name, "version": "0", "plan": plan, "kind": "generate"}
    facts["file_settings"] = settings
    environment = _environment((templates() / engine.name, templates() / "deploy"))
    inside = {
        path: _one(environment, f"{file}.j2", facts)
        for path, file in engine.image_files.items()
        if path in config.command
    }
    return replace(config, image_files=inside)


def _config(target: Target, plan: ServingPlan, served: ServedModel) -> ServingConfig:
    engine = target.engine
    return ServingConfig(
        target=target.name,
        files={},
        image_files={},
        entrypoint=engine.entrypoint,
        command=engine.command(plan, served),
        env=dict(engine.env(plan, served)),
        port=engine.port,
        health_path=engine.health_path,
        # Upstream's GPU images have their own check.
        healthcheck=health_command(engine) if is_cpu(plan.device) else (),
        served_name=served.name,
        plan=plan,
        made_from=(),
    )


def _served(
    engine: Engine, name: str, model_file: str, weight_bytes: int, projector: Projector | None
) -> ServedModel:
    """Return the model as the image serves it; `model_file` is "" for a folder."""
    return ServedModel(
        path=f"{engine.model_dir}/{model_file}".rstrip("/"),
        name=name,
        projector=f"{engine.model_dir}/{projector.file}".rstrip("/") if projector else "",
        startup_seconds=startup_seconds(weight_bytes),
    )


def _kserve_lora(options: ServeOptions, served: ServedModel) -> Mapping[str, Writable]:
    """Return `spec.model.lora` of KServe's LLMInferenceService; {} if it cannot load an adapter.

    It takes hf://, s3:// and pvc://, and no oci:// yet:
    https://github.com/kserve/kserve/blob/aaac4e29/docs/samples/llmisvc/lora-adapters/README.md
    """
    if not options.adapters or not all(one.uri for one in options.adapters):
        return {}
    rows = [{"name": one.name or served.name, "uri": one.uri} for one in options.adapters]
    return {"adapters": rows}


def _engine_facts(engine: Engine, plan: ServingPlan, served: ServedModel) -> Mapping[str, Writable]:
    return {
        "engine_title": engine.title,
        "start_command": [*engine.entrypoint, *engine.command(plan, served)],
        "file_settings": engine.file_settings(plan, served),
        "plan_arguments": _as_arguments(plan.settings),
        "arguments_without_lora": _as_arguments(
            {key: value for key, value in plan.settings.items() if key not in _OF_LORA}
        ),
        "gpu_resource": "amd.com/gpu" if plan.device.startswith("amd-") else "nvidia.com/gpu",
        "plan": plan,
        "drains": engine.lets_requests_end(plan),
        "grace_seconds": GRACE_SECONDS,
        "notice_seconds": NOTICE_SECONDS,
        "drain_seconds": DRAIN_SECONDS,
        "port": engine.port,
        "load_metrics": list(engine.load_metrics),
        "health_path": engine.health_path,
        "memory_limit": plan.memory_limit_bytes,
        "user_id": USER_ID,
        "probe_seconds": engine.probe_seconds,
        "key_variable": engine.key_variable,
        "cpu_count_variable": engine.threads_variable,
    }


def _as_arguments(settings: Mapping[str, JsonValue]) -> list[str]:
    """Return settings as command-line arguments, for manifests that take only arguments."""
    words: list[str] = []
    for key, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{key}" if value else f"--no-{key}")
        else:
            text = json.dumps(value) if isinstance(value, Mapping | list | tuple) else str(value)
            words += [f"--{key}", text]
    return words


def _parts(image: str) -> Mapping[str, JsonValue]:
    """Return a reference as repository and tag; the tag includes the digest: `a/b`, `1@sha256:…`.

    Charts join them as `repository:tag`; a digest without a tag gets one, which has no effect.
    """
    name, at, digest = image.partition("@")
    repository, colon, tag = name.rpartition(":")
    if not colon or "/" in tag:
        repository, tag = name, "latest"
    return {"repository": repository, "tag": f"{tag}{at}{digest}"}


def startup_seconds(weight_bytes: int) -> int:
    """Return the start's time limit in seconds: ten minutes, or more for large weights."""
    return max(600, 60 + weight_bytes // _SLOWEST_DISK // 10 * 10)


def render_files(folders: tuple[Path, ...], facts: Mapping[str, Writable]) -> dict[str, str]:
    """Render every template of these folders; files in earlier folders take precedence."""
    environment = _environment(folders)
    names = sorted(environment.list_templates(extensions=["j2"]))
    known = {**facts, "files": [name.removesuffix(".j2") for name in names]}
    return {name.removesuffix(".j2"): _one(environment, name, known) for name in names}


@cache
def _environment(folders: tuple[Path, ...]) -> Environment:
    """Return the environment for these folders' templates, each compiled once for all targets."""
    environment = Environment(
        loader=FileSystemLoader(folders),
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701  # not HTML; every value goes through a filter of its format
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        comment=lambda value: _CONTROL.sub(" ", value),
        dnslabel=_dns_label,
        envvalue=_env_value,
        json=lambda value: json.dumps(value, ensure_ascii=False),
        labelvalue=lambda value: re.sub(r"[^A-Za-z0-9_.-]+", "-", value)[:63].strip("-_."),
        literal=_literal,
        shell=shlex.quote,
        size=human,
        yaml=_yaml,
    )
    return environment


def _one(environment: Environment, template: str, facts: Mapping[str, Writable]) -> str:
    try:
        return environment.get_template(template).render(facts)
    except UndefinedError as error:
        raise UsageError(
            f"template {template}: {error.message}",
            hint=f"available variables: {', '.join(sorted(facts))}",
        ) from None
    except TemplateNotFound as error:
        raise UsageError(
            f"template {template} includes {error.name}, which does not exist",
            hint="add it to the engine's template folder",
        ) from None
    except TemplateError as error:
        where = f", line {error.lineno}" if hasattr(error, "lineno") else ""
        raise UsageError(
            f"template {template}{where}: {error.message}", hint="fix the template"
        ) from None


def _yaml(value: JsonValue) -> str:
    """Return a value in YAML's flow style, with double-quoted and escaped strings."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_yaml(str(k))}: {_yaml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    return f'"{_ESCAPED.sub(_escape, str(value))}"'


def _escape(found: re.Match[str]) -> str:
    # YAML 1.2, section 5.7: \x, \u and \U escapes; JSON's surrogate pairs mean something else.
    code = ord(found[0])
    if found[0] in {'"', "\\"}:
        return "\\" + found[0]
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _env_value(value: str, key: str) -> str:
    """Return a value for an env file, which has no quoting and cannot hold line breaks."""
    if _CONTROL.search(value):
        raise UsageError(
            f"{key} has a line break or another control character, which an env file cannot hold",
            hint=f"remove it from the value: {value!r}",
        )
    return value


def _dns_label(value: str, longest: int = 60) -> str:
    """Return the nearest valid name of a Kubernetes Service (RFC 1035, 63 characters).

    A smaller `longest` leaves room for what a controller adds to the name.
    """
    label = re.sub(r"[^a-z0-9]+", "-", value.lower()).strip("-")
    label = label if label[:1].isalpha() else f"m-{label}"
    return label[:longest].rstrip("-")


def _literal(value: JsonValue) -> JsonValue:
    """Return a text, or a list of texts, that Kubernetes expands to the given one.

    It reads `$$` as a dollar sign and `$(NAME)` as a variable in commands, arguments and `env`:
    https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/
    """
    if isinstance(value, list | tuple):
        return [_literal(item) for item in value]
    return str(value).replace("$", "$$")


def repository_name(name: str) -> str:
    """Return the nearest valid image name for a model's name."""
    return re.sub(r"[^a-z0-9._-]+|[._-]{2,}", "-", name.lower()).strip("._-") or "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drafting:
    """A model that drafts, as it lies in the image."""

    model: ModelFacts
    size: int
    """Bytes of its weights."""
    path: str
    """Below the model's folder."""


def _drafting(seen: ForeseenWeights, target: Target) -> _Drafting:
    path = DRAFT_FILE if "gguf" in target.engine.accepts else DRAFT
    return _Drafting(model=seen.model, size=seen.weight_bytes, path=path)


def _with_draft(options: ServeOptions, draft: _Drafting | None, target: Target) -> ServeOptions:
    if draft is None or options.speculation is None:
        return options
    place = f"{target.engine.model_dir}/{draft.path}"
    found = replace(options.speculation, draft=draft.model, weight_bytes=draft.size, path=place)
    return replace(options, speculation=found)


@dataclass(frozen=True, eq=False, kw_only=True)
class RenderStep(TargetStep[ServingConfig, ServingPlan]):
    """Plans the memory of the server, and renders its files."""

    name = "render"

    sources: Step[Sources, Sources]
    checkpoint: Step[Checkpoint, ForeseenWeights]
    weights: Step[Artifact, ForeseenWeights]
    served: Step[Artifact, ForeseenWeights]
    """The same weights, with what lies beside them in the image."""
    parsers: Step[ParserChoice, ParserChoice]
    draft: Step[Artifact, ForeseenWeights] | None = None
    """Of a model that drafts."""

    @property
    def options(self) -> Writable:
        """How it is served."""
        recipe = self.file.recipe
        probe = [wants_probe(recipe), reads_weights(recipe)]
        return [self.target, recipe.serve.model_dump(mode="json"), *probe]

    def foresee(self, seen: Foresight) -> Foreseen[ServingPlan]:
        """Return the plan; refuses weights that do not fit, or that the engine cannot load.

        An error's details have a plan that does not fit, by target name.
        """
        target, weights = self.of.target, seen[self.weights]
        tree, base = weights.tree, seen[self.sources].base.tree
        made = tree if tree and gguf_models(file.path for file in tree.files) else None
        # Not in the image's plan, whose bytes must not tell what else is on this machine.
        notes = (
            base.note if isinstance(base, ForeseenTree) else "",
            weights.note,
            seen[self.parsers].note,
        )
        try:
            config = self._config(
                weights.model,
                weights.weight_bytes,
                seen[self.sources],
                projector=projector_in(made) if made else expected_projector(target, weights.model),
                parsers=seen[self.parsers],
                notes=tuple(note for note in notes if note),
                draft=_drafting(seen[self.draft], target) if self.draft else None,
            )
        except UsageError as error:
            if "plan" not in error.details:
                raise
            raise UsageError(
                f"{target.name}: {error.message}",
                hint=error.hint,
                details={"plan": {target.name: error.details["plan"]}},
            ) from None
        device = config.plan.device
        check_support(target.engine, target.format.without_adapters, device, weights.model)
        check_adapters(target.engine, target.format, device, weights.model)
        if not seen[self.parsers].asks:
            self._check_calls(weights.model, config.plan)
        for suite in self._suites:
            _check_similarity(suite, weights.model, target.engine)
        self.weights.permit(seen)
        return Foreseen(value=config.plan)

    def run(self, have: Results, tools: Tools) -> StageResult[ServingConfig]:
        """Plan and render for the finished weights."""
        timer = Timer(self.name, self.target, tools)
        config = self.rendered(have, self.of.target)
        self._check_calls(read_facts(have[self.checkpoint].tree.texts), config.plan)
        return timer.done(config, cached=is_written(config.files, self.of.folder))

    @property
    def _suites(self) -> Iterator[Suite]:
        recipe = self.file.recipe
        return chain(recipe.evaluate, *(one.evaluate for one in recipe.adapters))

    def _check_calls(self, model: ModelFacts, plan: ServingPlan) -> None:
        """Raise UsageError for a suite of tool calls that the server would not make."""
        for suite in self._suites:
            if suite.metric == "tool-call":
                check_calls(model, self.of.target.engine, plan, suite.data)

    def rendered(self, have: Results, target: Target) -> ServingConfig:
        """Plan and render for the finished weights, which may lie elsewhere for this `target`."""
        sources, artifact = have[self.sources], have[self.served]
        model = have[self.checkpoint]
        # A GGUF model is served as a file, a checkpoint as a folder.
        files = gguf_models(one.path for one in artifact.tree.files if "/" not in one.path)
        return self._config(
            read_facts(model.tree.texts),
            base_weight_bytes(artifact),
            sources,
            parsers=have[self.parsers],
            weights=files[0] if files else "",
            made_from=(artifact.digest,),
            projector=projector_in(artifact.tree),
            target=target,
            draft=self._made_draft(have),
        )

    def _made_draft(self, have: Results) -> _Drafting | None:
        sources, made = have[self.sources], have[self.draft] if self.draft else None
        if made is None or sources.draft is None:
            return None
        facts = read_facts(sources.draft.tree.texts)
        return _Drafting(model=facts, size=made.tree.weight_bytes, path=draft_path(made))

    def _config(
        self,
        model: ModelFacts,
        weight_bytes: int,
        sources: Sources,
        *,
        parsers: ParserChoice,
        weights: str = "",
        made_from: tuple[Digest, ...] = (),
        projector: Projector | None = None,
        notes: tuple[str, ...] = (),
        target: Target | None = None,
        draft: _Drafting | None = None,
    ) -> ServingConfig:
        """Plan and render; `weights` is the served file, "" if it does not exist yet.

        `weight_bytes` are with the projector, and without the adapters.
        """
        recipe, target = self.file.recipe, target or self.of.target
        adapters = unmerged_adapters(self.file, target, sources)
        if recipe.serve.speculative:
            check_drafter(recipe.serve.speculative, sources.base.tree)
        format_ = target.format.without_adapters
        group = inputs_per_scale(format_, model, recipe.quantize.group_size)
        options = replace(serve_options(recipe.serve), adapters=adapters, group_size=group)
        if parsers.tools:
            options = replace(options, tool_parser=parsers.tools)
        if parsers.thoughts:
            options = replace(options, reasoning_parser=parsers.thoughts)
        return render(
            target=target,
            name=recipe.name,
            version=recipe.version,
            model=model,
            model_file=weights,
            weight_bytes=weight_bytes + sum(adapter.weight_bytes for adapter in adapters),
            options=_with_draft(options, draft, target),
            image=reference(recipe, target.name),
            made_from=made_from,
            projector=projector,
            notes=notes,
            replays=probes_replay(recipe, model),
            whole_weights=reads_weights(recipe),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class ThinConfigStep(UnforeseenStep[ServingConfig]):
    """Renders the files of an image that serves a model from where it is merged at the start."""

    name = "thin-config"

    rendered: RenderStep

    def run(self, have: Results, tools: Tools) -> StageResult[ServingConfig]:
        """Plan and render as for the tested image; raises what that does."""
        del tools
        target, engine = self.of.target, self.of.target.engine
        named = SERVED if engine.fixed_name == engine.model_dir else engine.fixed_name
        moved = replace(engine, model_dir=SERVED, fixed_name=named)
        return unrecorded(self.rendered.rendered(have, replace(target, engine=moved)))


@dataclass(frozen=True, eq=False, kw_only=True)
class ThinManifestsStep(UnforeseenStep[None]):
    """Writes manifests of an image that merges where it starts, with the sizes that this takes."""

    name = "thin-manifests"

    config: ThinConfigStep
    form: Step[tuple[ImageMaterials, ...], None]
    thin: Step[Published, None]
    pushed: bool
    """Whether a registry has it, under its digest."""

    def run(self, have: Results, tools: Tools) -> StageResult[None]:
        """Write them."""
        del tools
        recipe, inputs = self.file.recipe, have[self.form][0].inputs
        if inputs.thin is None or inputs.checkpoint is None:
            raise AssertionError("it is an image of another kind")
        digest, name = have[self.thin].digest, f"{reference(recipe, self.target)}-{inputs.kind}"
        files = render_thin(
            have[self.config],
            self.of.target.engine,
            recipe.name,
            recipe.version,
            image=f"{name}@{digest}" if self.pushed else name,
            parts=inputs.thin,
            replays=probes_replay(recipe, read_facts(inputs.checkpoint.tree.texts)),
        )
        write_files(files, self.of.folder / THIN)
        return unrecorded(None)


@dataclass(frozen=True, eq=False, kw_only=True)
class VolumeManifestsStep(UnforeseenStep[None]):
    """Writes manifests that mount an image of weights beside the engine's own image."""

    name = "volume-manifests"

    config: Step[ServingConfig, ServingPlan]
    image: Step[tuple[ImageMaterials, ...], Mapping[str, str]]
    volume: Step[Published, None]

    def run(self, have: Results, tools: Tools) -> StageResult[None]:
        """Write them, or note why there are none."""
        config, volume = have[self.config], have[self.volume]
        target, recipe = self.of.target, self.file.recipe
        # The engine without weights; "" if there is none in a registry.
        engine = base_reference(target.engine, config.plan.device, recipe.image.base)
        if engine.startswith(OWN):
            engine = target.engine.base.stock_cpu
        if not engine or is_layout(engine):
            tools.progress.note(
                f"{target.name}: no manifests for the volume, because {target.engine.title} has no "
                f"image of its own for {config.plan.device} in a registry; image.base names one"
            )
            return unrecorded(None)
        image = have[self.image][0].inputs
        if "@" not in engine and engine == image.base_name and len(image.bases) == 1:
            engine = f"{engine}@{image.bases[0].digest}"
        files = render_volume(
            config,
            target.engine,
            recipe.name,
            recipe.version,
            volume=f"{reference(recipe, target.name)}-volume@{volume.digest}",
            engine_image=engine,
            merged=not target.format.unmerged,
        )
        write_files(files, self.of.folder / VOLUME_FOLDER)
        return unrecorded(None)


@dataclass(frozen=True, eq=False, kw_only=True)
class PoliciesStep(UnforeseenStep[None]):
    """Writes policies with which a cluster admits the image, if the build signs it."""

    name = "policies"

    image: Step[Published, None]
    materials: Step[tuple[ImageMaterials, ...], None]

    def run(self, have: Results, tools: Tools) -> StageResult[None]:
        """Write them, or note why there are none."""
        recipe, platforms = self.file.recipe, len(have[self.materials])
        if tools.signer is None:
            return unrecorded(None)
        if platforms > 1:
            tools.progress.note(
                f"{self.target}: no policies, because clusters look for statements on the digest "
                f"that a tag names: an index of {platforms} platforms, which has none of its own"
            )
            return unrecorded(None)
        files = render_policies(
            recipe.name,
            recipe.version,
            repository=Reference.parse(reference(recipe, self.target)).name,
            signer=tools.signer,
            proven_on=recipe.image.proven_on,
        )
        write_files(files, self.of.folder / POLICIES)
        return unrecorded(None)
