"""What each command is asked: its flags, and the keywords of its Python function.

A field's name is the keyword, and the flag unless its `Flag` says another; type, limits, default
and help are written only here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from pydantic import Field, SkipValidation

from weightsmith.core.errors import UsageError
from weightsmith.core.merge_options import Merge
from weightsmith.core.values import Score, Writable
from weightsmith.recipe.schema import ImageNames, Quantize, Recipe, Scoring, Serve
from weightsmith.recipe.section import Flag, FlagFields, PathUse
from weightsmith.recipe.user_config import RunOptions, WantedIdentity

Said: TypeAlias = tuple[Mapping[str, Writable], str]
"""What a command says: its JSON object, and the text for people."""
READ, WRITTEN = PathUse.READ, PathUse.WRITTEN
_RUN, _MERGE, _QUANTIZE, _SCORING = RunOptions(), Merge(), Quantize(), Scoring()
_WANTED = WantedIdentity()
_SERVE, _IMAGE_NAMES = Serve(), ImageNames()

_IDENTITY = ("keyless", "trust_config")
SIGNING = ("sign_key", *_IDENTITY, "signature_format")
Jobs: TypeAlias = Annotated[RunOptions, FlagFields(without=SIGNING)]
SignedJobs: TypeAlias = Annotated[RunOptions, FlagFields(without=("signature_format",))]
"""How a command runs that starts jobs and publishes nothing."""
AnyRecipe: TypeAlias = str | Path | Recipe | Mapping[str, Any]
"""A recipe file, a Recipe, or a mapping with a recipe file's keys."""
Force: TypeAlias = Annotated[bool, "move a tag that already names another image"]
_SOURCE = "registry reference, or an OCI layout: a folder, oci:DIR or oci:DIR:NAME"
_KEY = "public key as a PEM file, such as cosign.pub"
SERVED = ("gpu", "gpu_memory", "gpu_count", "max_model_len", "max_num_seqs")
"""Fields of `serve` that are flags; `--set serve.KEY=VALUE` sets the others."""
Seconds: TypeAlias = Annotated[
    float, Field(ge=0.001, allow_inf_nan=False), "seconds to wait for one answer"
]
_IMAGE = "image to start: a name in the engine, a reference in a registry, or oci:DIR"
_URL = "URL of an OpenAI-compatible server"
_SERVED = "the model's name on the server; default: the first that the server lists"
UpdateLock: TypeAlias = Annotated[
    bool,
    "ignore the lock file next to the recipe: use sources and bases as they are now, and rewrite "
    "the file",
]
_KIND = "form: image, modelcar, volume, modelpack, modelpack-tar or ollama"
_TARGET = "engine and format, such as llamacpp-q4_k_m"
_ADAPTER = "adapter, in the order of merging: a folder, hf://owner/name, or another source"
_ADAPTER_FOLDER = "adapter folder, in the order of merging"
_BASE = "base model: a folder, hf://owner/name, pypi://package==version, or another source"
_MODEL = "model folder or .gguf file"
_NAMED = "its digest, source, name, revision or version, or a folder"
_OUT = "where the result goes; it must not exist yet"


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError:
        raise ValueError("expected numbers separated by commas") from None


def _counts(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError("expected positive whole numbers separated by commas")
    return tuple(map(int, parts))


def layout_folder(text: str) -> str:
    """Return the folder of `--layout DIR` or `oci:DIR`, as references to layouts begin.

    Raises UsageError for `oci:DIR:NAME`: a layout that is written holds one image, which is read
    without a name.
    """
    folder = text.removeprefix("oci:")
    if folder != text and ":" in folder:
        place = folder.partition(":")[0]
        raise UsageError(
            f"--layout {text}: the image in the layout cannot be named",
            hint=f"give oci:{place}: its only image is read without a name. If the folder's name"
            " has a colon, leave out oci:",
        )
    return folder


Layout: TypeAlias = Annotated[
    Path | None, WRITTEN, Flag(read=layout_folder), "write an OCI layout into this folder"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighted:
    """A base, and adapters with their weights."""

    base: Annotated[str, READ, _BASE]
    adapters: Annotated[
        tuple[str, ...],
        READ,
        Flag("adapter", needed=lambda given: "keep_adapter" in given),
        _ADAPTER,
    ] = ()
    weights: Annotated[
        tuple[float, ...] | None,
        Flag(read=_numbers),
        "one weight per adapter, separated by commas: 0.7,0.3",
    ] = None

    @property
    def factors(self) -> Sequence[float]:
        """One weight per adapter, by default 1; raises UsageError if their number differs."""
        count = len(self.adapters)
        if self.weights is None:
            return (1.0,) * count
        if len(self.weights) != count:
            raise UsageError(
                f"--weights has {len(self.weights)} numbers for {count} adapter(s)",
                hint="give one weight for each --adapter, in the same order",
            )
        return self.weights


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeCommand(Weighted):
    """What `merge` is asked."""

    out: Annotated[
        Path | None, WRITTEN, Flag(needed=lambda given: "keep_adapter" not in given), _OUT
    ] = None
    options: Annotated[Merge, FlagFields()] = _MERGE
    keep_adapter: Annotated[
        Path | None,
        WRITTEN,
        "folder to write the combined adapter to; without --out, nothing is merged",
    ] = None
    run: SignedJobs = _RUN


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidateCommand(Weighted):
    """What `validate` is asked; the options say how the checkpoint was merged."""

    adapters: Annotated[tuple[str, ...], READ, Flag("adapter"), _ADAPTER]
    merged: Annotated[Path, READ, "merged checkpoint folder"]
    options: Annotated[Merge, FlagFields(without=("seed", "dtype", "precision"))] = _MERGE
    probes: Annotated[Path | None, "JSON Lines of chats to probe with; default: built-in ones"] = (
        None
    )
    run: Jobs = _RUN


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeCommand:
    """What `quantize` is asked."""

    model: Annotated[Path, READ, _MODEL]
    format: Annotated[str, "weight format, such as q4_k_m"] = "q4_k_m"
    out: Annotated[Path, WRITTEN, _OUT]
    calibration: Annotated[
        Path | None,
        "calibration text as JSON Lines; part of it is held out for the quality gate",
    ] = None
    settings: Annotated[Quantize, FlagFields(without=("fit",))] = _QUANTIZE
    gate: Annotated[bool, "fail for a loss over the limits; --no-gate only reports it"] = True
    run: SignedJobs = _RUN


@dataclass(frozen=True, slots=True, kw_only=True)
class RenderCommand:
    """What `render` is asked."""

    model: Annotated[Path, READ, _MODEL]
    target: Annotated[str, _TARGET]
    out: Annotated[Path, WRITTEN, "folder for the files; files of the same names are replaced"]
    name: Annotated[str, "the model's name; default: its folder's name"] = ""
    serve: Annotated[Serve, FlagFields(only=SERVED)] = _SERVE
    settings: Annotated[
        tuple[str, ...], Flag("set"), "set a key of the recipe's serve: serve.KEY=VALUE"
    ] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class BakeCommand:
    """What `bake` is asked."""

    model: Annotated[Path, READ, _MODEL]
    target: Annotated[str, _TARGET]
    config: Annotated[Path | None, READ, "folder that `render` wrote"] = None
    name: Annotated[str, "the model's name; default: its file's name"] = ""
    image: Annotated[
        ImageNames, FlagFields(only=("base", "platforms", "order", "max_layer_size"))
    ] = _IMAGE_NAMES
    kind: Annotated[str, _KIND] = "image"
    push: Annotated[str, "reference to push the image to"] = ""
    load: Annotated[str, "load the image into the container engine under this name"] = ""
    layout: Layout = None
    force: Force = False
    run: Annotated[RunOptions, FlagFields()] = _RUN


@dataclass(frozen=True, slots=True, kw_only=True)
class PushCommand:
    """What `push` is asked."""

    source: Annotated[
        str,
        Flag(positional=True),
        f"{_SOURCE}; for a hub also a checkpoint's folder, a .gguf file or the folder of a build's "
        "results",
    ]
    to: Annotated[str, "reference to push to, or hf://OWNER/NAME for a model hub"]
    force: Annotated[
        bool,
        "move a tag that already names another image; replace what a hub's repository has",
    ] = False
    public: Annotated[bool, "let everybody read a new repository on a hub; default: private"] = (
        False
    )
    dry_run: Annotated[bool, "show what would be sent, and of a hub the card; change nothing"] = (
        False
    )
    run: Annotated[RunOptions, FlagFields(only=("insecure", *SIGNING))] = _RUN


@dataclass(frozen=True, slots=True, kw_only=True)
class RebaseCommand:
    """What `rebase` is asked."""

    source: Annotated[str, Flag(positional=True), _SOURCE]
    onto: Annotated[
        str,
        "engine base to move the image to: a reference, oci:DIR, or engine:llamacpp for the one "
        "that comes with this version",
    ]
    to: Annotated[str, "reference to push to"]
    smoke: Annotated[
        bool, "start the new image once if a container engine is running; --no-smoke skips this"
    ] = True
    force: Force = False
    run: Annotated[
        RunOptions, FlagFields(without=("runner", "allow_network_in_jobs", "memory"))
    ] = _RUN


@dataclass(frozen=True, slots=True, kw_only=True)
class InspectCommand:
    """What `inspect` is asked."""

    source: Annotated[str, Flag(positional=True), _SOURCE]
    platform: Annotated[
        str, "platform of an index to show, such as linux/amd64; default: this machine's"
    ] = ""
    run: Annotated[RunOptions, FlagFields(only=("insecure",))] = _RUN


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyCommand:
    """What `verify` is asked."""

    source: Annotated[str, Flag(positional=True), _SOURCE]
    key: Annotated[str, _KEY] = ""
    signed_by: Annotated[WantedIdentity, FlagFields()] = _WANTED
    proven_on: Annotated[
        tuple[str, ...],
        "device or node type on which the image must be proven, such as nvidia-l4",
    ] = ()
    proof_key: Annotated[
        str, "public key that proofs must be signed with, as a PEM file; default: --key"
    ] = ""
    run: Annotated[RunOptions, FlagFields(only=("insecure",))] = _RUN


@dataclass(frozen=True, slots=True, kw_only=True)
class AffectedCommand:
    """What `affected` is asked; exactly one of the things that an image may be made from."""

    in_: Annotated[
        tuple[str, ...],
        "where to look: REGISTRY, REGISTRY/PREFIX, one image, oci:DIR, the folder of a fleet's "
        "results, hf://OWNER or hf://OWNER/NAME",
    ]
    adapter: Annotated[str, f"adapter: {_NAMED}"] = ""
    base: Annotated[str, f"base model: {_NAMED}"] = ""
    engine: Annotated[
        str, "engine, such as vllm, 'vllm<0.33' or llamacpp@b8000, or its base image or digest"
    ] = ""
    builder: Annotated[
        str, "builder, such as merge, its digest, or a version of ours: 'weightsmith<0.2'"
    ] = ""
    dataset_run: Annotated[
        str, "training run, or calibration or evaluation data, by name or digest"
    ] = ""
    license: Annotated[str, "licence of anything in it, as an SPDX identifier"] = ""
    cve_package: Annotated[
        str, "package in a bill of materials, with versions: 'openssl>=3.0,<3.0.14'"
    ] = ""
    keys: Annotated[tuple[str, ...], Flag("key"), f"{_KEY}; what it signed is believed"] = ()
    signed_by: Annotated[WantedIdentity, FlagFields()] = _WANTED
    withdraw: Annotated[
        bool,
        "mark the images of the first list as withdrawn, by statements that --sign-key signs: "
        "`verify` then refuses them",
    ] = False
    reason: Annotated[str, "why they are withdrawn; default: what they were made from"] = ""
    rebuild: Annotated[
        bool, "write a fleet file that builds the images of the first list again"
    ] = False
    rebase: Annotated[
        str,
        "engine base to move the images of the first list to, each to its tag with -on- and the "
        "base's; with --out, write a fleet file that builds them on it",
    ] = ""
    out: Annotated[
        Path | None, WRITTEN, "the fleet file; default of --rebuild: affected/fleet.yaml"
    ] = None
    force: Force = False
    run: Annotated[RunOptions, FlagFields(only=("insecure", *SIGNING))] = _RUN


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateCommand:
    """What `evaluate` is asked."""

    data: Annotated[
        Path | None,
        Flag(needed=lambda given: "tasks" not in given),
        "questions as JSON Lines: prompt or messages, expected, and image for a picture",
    ] = None
    scoring: Annotated[Scoring, FlagFields(without=("max_drop", "require"))] = _SCORING
    image: Annotated[str, READ, _IMAGE] = ""
    url: Annotated[str, _URL] = ""
    model: Annotated[Path | None, READ, "checkpoint folder to load"] = None
    adapters: Annotated[tuple[Path, ...], READ, Flag("adapter"), _ADAPTER_FOLDER] = ()
    served_name: Annotated[str, _SERVED] = ""
    tasks: Annotated[
        str,
        "names of lm-evaluation-harness tasks, separated by commas; the harness must be installed",
    ] = ""
    tokenizer: Annotated[str, "tokenizer folder, for tasks that compare likelihoods"] = ""
    include: Annotated[str, "folder with your own lm-evaluation-harness tasks"] = ""
    limit: Annotated[
        int, Field(ge=0), "maximum number of questions, a sample, or per task; 0 for all"
    ] = 0
    concurrency: Annotated[int, Field(ge=1), "number of requests at once"] = 1
    timeout: Seconds = 120.0
    retries: Annotated[int, Field(ge=0), "how often a failed request is retried"] = 2
    calibration: Annotated[
        Path | None,
        "JSON Lines that the model was calibrated on; questions that appear in it are reported",
    ] = None
    against: Annotated[
        str | Score,
        "output of an earlier `evaluate --json` to compare with, question by question",
    ] = ""
    max_drop: Annotated[
        float | None,
        Field(ge=0, le=1),
        "largest accepted drop in score compared with --against, from 0 to 1",
    ] = None
    answers: Annotated[
        Path | None,
        "file that keeps a server's answers: a run with the same file asks only the others. For "
        "another model, give another file",
    ] = None
    run: Jobs = _RUN


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchCommand:
    """What `bench` is asked."""

    image: Annotated[str, _IMAGE] = ""
    url: Annotated[str, _URL] = ""
    served_name: Annotated[str, _SERVED] = ""
    concurrency: Annotated[
        tuple[int, ...],
        Flag(read=_counts, many=False),
        "numbers of requests at once, separated by commas; one run for each",
    ] = (1, 4, 16)
    requests: Annotated[int, Field(gt=0), "number of requests per concurrency"] = 32
    max_tokens: Annotated[int, Field(gt=0), "maximum tokens of an answer"] = 64
    data: Annotated[Path | None, "JSON Lines as for `evaluate`; default: built-in questions"] = None
    timeout: Seconds = 120.0
    out: Annotated[Path | None, "folder of a build, whose report gets the result"] = None
    run: Annotated[RunOptions, FlagFields(only=("runner", "insecure", "cache", "cache_from"))] = (
        _RUN
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProveCommand:
    """What `prove` is asked."""

    image: Annotated[
        str,
        READ,
        f"{_IMAGE}; with --url, the image that the server there runs, which is not started",
    ] = ""
    url: Annotated[str, _URL] = ""
    replay: Annotated[
        Path | None,
        READ,
        "file of the replay set, for secret questions: replay.json of the build's results",
    ] = None
    statement: Annotated[
        Path | None, "file to write the statements to, one a line: what was shown, and its summary"
    ] = None
    key: Annotated[
        str,
        "private key to sign the statements with; a proof is then attached to the image, in its "
        "registry or layout",
    ] = ""
    attach: Annotated[
        bool, "attach a signed proof to the image; --no-attach only writes --statement"
    ] = True
    device: Annotated[
        str, "name of what a server elsewhere runs on, such as nvidia-l4; default: what is here"
    ] = ""
    node_type: Annotated[
        str,
        "kind of the node, as node.kubernetes.io/instance-type says; default: the variable "
        "WEIGHTSMITH_NODE_TYPE",
    ] = ""
    timeout: Seconds = 120.0
    retries: Annotated[
        int, Field(ge=0), "how often a failed request is retried, as while a server starts"
    ] = 4
    run: Annotated[
        RunOptions, FlagFields(only=("runner", "insecure", "cache", "cache_from", *_IDENTITY))
    ] = _RUN


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeCommand:
    """What commands are asked that build a recipe, or would."""

    targets: Annotated[tuple[str, ...], Flag("target"), _TARGET] = ()
    recipe: Annotated[AnyRecipe | None, SkipValidation, "recipe file; default recipe.yaml"] = None
    push: Annotated[bool, "push the image"] = False
    load: Annotated[bool, "load the image into the container engine"] = False
    layout: Layout = None
    base: Annotated[str, READ, _BASE] = ""
    adapters: Annotated[tuple[str, ...], READ, Flag("adapter"), _ADAPTER] = ()
    serve: Annotated[Serve, FlagFields(only=SERVED, over_recipe=True)] = _SERVE
    settings: Annotated[tuple[str, ...], Flag("set"), "set a recipe key: key.path=value"] = ()
    kinds: Annotated[
        tuple[str, ...], Flag("kind"), f"{_KIND}; also thin, and adapter (the tested adapter alone)"
    ] = ()
    quantize: Annotated[
        Quantize, FlagFields(only=("allow_low_bits", "allow_text_only"), over_recipe=True)
    ] = _QUANTIZE
    image: Annotated[ImageNames, FlagFields(only=("sbom",), over_recipe=True)] = _IMAGE_NAMES
    force: Force = False
    locked: Annotated[bool, "refuse sources that differ from the lock file next to the recipe"] = (
        False
    )
    update_lock: UpdateLock = False
    bench_results: Annotated[
        tuple[Path, ...],
        READ,
        "results file of guidellm (benchmarks.json) or AIPerf (profile_export_aiperf.json) that "
        "measured this very image, kept as evidence of its speed",
    ] = ()
    dist: Annotated[Path, WRITTEN, "folder for the results"] = Path("dist")
    run: Annotated[RunOptions, FlagFields()] = _RUN


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildCommand(RecipeCommand):
    """What `build` is asked."""

    from_: Annotated[
        str, "image to rebuild from the sources it names and the adapters attached to it"
    ] = ""
    key: Annotated[str, _KEY] = ""
    signed_by: Annotated[WantedIdentity, FlagFields()] = _WANTED
    keep_replay: Annotated[
        bool,
        "write the image's replay set beside the recipe, as recipe.replay.json: where its answers"
        " hold, builds keep it, and so the image's digest",
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanCommand(RecipeCommand):
    """What `plan` is asked."""

    measure: Annotated[
        bool,
        "time one layer of the model here, with random weights, and estimate each stage's time",
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetCommand:
    """What `fleet` is asked."""

    file: Annotated[Path | Mapping[str, Any], "fleet file: a recipe, adapters and targets"] = Path(
        "fleet.yaml"
    )
    on: Annotated[str, "where tasks run: local (this machine), ray or slurm"] = "local"
    address: Annotated[
        str, "address of a Ray cluster's head, HOST:PORT; default: the cluster on this machine"
    ] = ""
    plan: Annotated[bool, "print cells, shared tasks and what they need, and do nothing"] = False
    watch: Annotated[bool, "keep a table on the terminal up, with rate and time left"] = False
    print_: Annotated[
        str,
        "print the cells as a matrix for another scheduler, and do nothing: github, gitlab or argo",
    ] = ""
    adapters: Annotated[
        tuple[str, ...],
        Flag("adapter"),
        "name of an adapter of the fleet; only its cells are built",
    ] = ()
    targets: Annotated[tuple[str, ...], Flag("target"), "only cells of this target are built"] = ()
    cpus: Annotated[int, "CPUs of each task; default: by the size of the model"] = 0
    push: Annotated[bool, "push the image"] = False
    load: Annotated[bool, "load the image into the container engine"] = False
    layout: Annotated[
        Path | None,
        WRITTEN,
        Flag(read=layout_folder),
        "write OCI layouts into ADAPTER/TARGET of this folder",
    ] = None
    settings: Annotated[
        tuple[str, ...], Flag("set"), "set a key of the shared recipe: key.path=value"
    ] = ()
    force: Force = False
    update_lock: UpdateLock = False
    dist: Annotated[Path, WRITTEN, "folder for the results"] = Path("dist")
    run: Annotated[RunOptions, FlagFields()] = _RUN


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheCommand:
    """What `cache` is asked."""

    action: Annotated[str, Flag(positional=True), "push, pull, prune or stat"]
    cache: Annotated[
        str,
        "the cache: oci://REGISTRY/REPOSITORY, s3://BUCKET/PREFIX or a folder; default: that of "
        "the environment or the configuration",
    ] = ""
    keep: Annotated[
        str,
        "for prune: maximum size of the cache afterwards, such as 200GiB; what was used least "
        "recently goes first, in a registry or in S3 what was written first",
    ] = ""
    sign_key: Annotated[str, "for push: private key to sign results with"] = ""
    run: Annotated[RunOptions, FlagFields(only=("insecure",))] = _RUN
