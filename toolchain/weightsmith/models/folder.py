"""Safe scans of model and adapter folders: which files are used, which are refused.

Files are chosen by known endings and names, in matching case: weights, tables, texts, vocabularies,
licences. Exact names alone would miss indexes, chat templates and parts of sentence-transformers,
and a JSON or text file executes nothing; a list of bad names never ends.
"""

from __future__ import annotations

import json
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from weightsmith.core.errors import InputRefused
from weightsmith.core.safe_parse import SMALL, read_bytes, read_json
from weightsmith.core.trees import below
from weightsmith.models.foreign import refuse_foreign

_ALLOWED = re.compile(
    # Weights, tables and texts: nothing that is executed.
    r".+\.(safetensors|json|jinja|txt|md|ya?ml)"
    # Vocabularies of transformers' tokenizers; a test compares them with the names that those read.
    r"|.+\.(model|tiktoken|spm|vocab|bpe)|bpe\.codes|prophetnet\.tokenizer"
    r"|(LICEN[CS]E|License|COPYING|COPYRIGHT|NOTICE|Notice|USE_POLICY|TERMS)([-_.][A-Za-z0-9_-]*)?"
)
"""Names of a checkpoint's files (case-sensitive); all others are ignored."""
MAKERS_FOLDERS = ("original", "metal")
"""Folders with the same weights in the format of those who trained the model, as in gpt-oss."""
_JUNK_FOLDERS = re.compile(
    rf"__pycache__|checkpoint-\d+|global_step\d+|runs|wandb|logs|{'|'.join(MAKERS_FOLDERS)}"
)
_JUNK_FILES = re.compile(
    r"consolidated.*|trainer_state\.json|training_args\..*|all_results\.json|train_results\.json"
    r"|eval_results\.json|trainer_log\.jsonl|events\.out\.tfevents.*|latest"
    r"|.*\.(py|pyc|pyd|so|sh|gguf|ggml|onnx|onnx_data|h5|msgpack|tflite|lock|tmp|part|incomplete)"
)
"""Files left by training, and files that are not checked further."""
_PICKLES = re.compile(r".*\.(bin|pt|pth|pth\.tar|ckpt|pkl|pickle|joblib|dill)", re.IGNORECASE)
_TEMPLATE_CONFIGS = ("chat_template.json", "processor_config.json", "tokenizer_config.json")
_INTERNALS = re.compile(r"__[A-Za-z]+__|\\+(?:x5f|u005f|137)", re.IGNORECASE)
"""Names of Python's own attributes, and escapes that spell them.

SGLang rendered templates of rerankers without a sandbox, so that one in a model ran code
(CVE-2026-5760, github.com/sgl-project/sglang/pull/23660). The pinned version has a sandbox there;
`image.base` and whoever takes the files elsewhere may have none.
"""
_CODE_CONFIGS = (
    "config.json",
    "tokenizer_config.json",
    "adapter_config.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "generation_config.json",
)
_MODEL_WEIGHTS = re.compile(r"model(-.*)?\.safetensors|model\.safetensors\.index\.json")
MAX_DEPTH = 16
_SHOWN = 3
_REMOTE = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*):(?P<place>/.*|[a-z]+:/.*)")
"""A source that recipes name and that is no folder, as a path, which has one slash for two."""


def scan(root: Path, *, gguf: bool = False) -> list[str]:
    """Return the sorted relative POSIX paths of a model's files.

    These are weights, tables, texts and vocabularies with known names, and GGUF files if `gguf`.
    Everything else is ignored: hidden files, code, pickles, and leftovers of training. Links are
    followed to regular files inside the folder or inside the model's hub cache folder. Raises
    InputRefused for other links, devices, pipes, sockets, non-portable names, and a folder whose
    path is not UTF-8.
    """
    if not root.is_dir():
        raise no_folder(root, "give the folder with the files")
    real = root.resolve()
    try:
        str(real).encode()
    except UnicodeEncodeError:
        raise InputRefused(
            f"the path of {root.name} is not valid UTF-8: {str(real)!r}",
            hint="rename the folders in it, since jobs are told paths as text",
        ) from None
    names = sorted(_walk(real, "", _link_root(real), 0, gguf))
    seen: dict[str, str] = {}
    for name in names:
        folded = unicodedata.normalize("NFC", name).casefold()
        if folded in seen:
            raise InputRefused(
                f"{root}: {seen[folded]!r} and {name!r} differ only in case or Unicode form",
                hint="rename one of them: some file systems treat them as the same file",
            )
        seen[folded] = name
    return [
        name
        for name in names
        if _ALLOWED.fullmatch(PurePosixPath(name).name) or (gguf and name.endswith(".gguf"))
    ]


def is_used(path: str) -> bool:
    """Return whether a model's file of this relative POSIX path is read, GGUF files included."""
    *folders, name = path.split("/")
    if any(part.startswith(".") for part in (*folders, name)):
        return False
    if any(_JUNK_FOLDERS.fullmatch(folder) for folder in folders):
        return False
    if name.endswith(".gguf"):
        return True
    return bool(_ALLOWED.fullmatch(name)) and not _JUNK_FILES.fullmatch(name)


def is_pickle(path: str) -> bool:
    """Return whether a file of this name is one that can run code when it is read."""
    return bool(_PICKLES.fullmatch(path.rpartition("/")[2]))


def is_ignored(name: str) -> bool:
    """Return whether `scan` ignores files of this name: it neither checks nor digests them."""
    return name.startswith(".") or bool(_JUNK_FILES.fullmatch(name))


def ignored_files(root: Path) -> str:
    """Return a short list of the files that `scan` ignores, except hidden ones; "" if none."""
    used = set(scan(root))
    found = [path.relative_to(root) for path in below(root) if not path.is_dir()]
    shown = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    left = [name for path in shown if (name := path.as_posix()) not in used]
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    return ", ".join(repr(name) for name in left[:3]) + more


def pickles_in(root: Path) -> list[str]:
    """Return the folder's pickle files, by relative path, except hidden ones."""
    found = [path.relative_to(root) for path in below(root) if _PICKLES.fullmatch(path.name)]
    return sorted(p.as_posix() for p in found if not any(one.startswith(".") for one in p.parts))


def check_model_folder(root: Path) -> list[str]:
    """Return a base model's files; raise InputRefused if it lacks any or needs custom code."""
    names = scan(root)
    has_weights = any(_MODEL_WEIGHTS.fullmatch(name) for name in names)
    if not has_weights and "adapter_config.json" in names:
        base = read_json(root / "adapter_config.json").get("base_model_name_or_path")
        named = f", and as the base what it was trained on: {base}" if isinstance(base, str) else ""
        raise InputRefused(
            f"{root} is an adapter, not a whole model", hint=f"name it as an adapter{named}"
        )
    _require(root, names, "config.json", "give the folder of a Hugging Face checkpoint")
    check_no_code(root, names)
    if not has_weights:
        raise _no_weights(root, "model.safetensors")
    return names


def check_adapter_folder(root: Path) -> list[str]:
    """Return an adapter's files; raise InputRefused if it lacks any or needs custom code."""
    names = scan(root)
    hint = "give the folder that PEFT's save_pretrained wrote"
    if "config.json" in names and any(_MODEL_WEIGHTS.fullmatch(name) for name in names):
        hint = (
            "this is a whole model: if your training tool merged it already, name it as the base, "
            f"without adapters; else {hint}"
        )
    if not {"adapter_config.json", "adapter_model.safetensors"} <= {*names}:
        refuse_foreign(root)
    _require(root, names, "adapter_config.json", hint)
    check_no_code(root, names)
    if "adapter_model.safetensors" not in names:
        raise _no_weights(root, "adapter_model.safetensors")
    return names


def check_links(folder: Path, names: Iterable[str]) -> None:
    """Raise InputRefused for a file of a folder that is a link which `scan` would not follow."""
    real = folder.resolve()
    for name in names:
        if (real / name).is_symlink():
            _check_link(real, name, _link_root(real))


def _link_root(real: Path) -> Path:
    """Return the folder that links may not leave: `real`, or the hub cache folder it is in."""
    for place in (real, *real.parents):
        cache = place.parent.parent
        if place.parent.name == "snapshots" and cache.name.startswith("models--"):
            return cache
    return real


def _walk(root: Path, prefix: str, home: Path, depth: int, gguf: bool) -> Iterator[str]:
    if depth > MAX_DEPTH:
        raise InputRefused(
            f"{root} is nested deeper than {MAX_DEPTH} folders: {prefix!r}",
            hint="give the folder of a single model",
        )
    with os.scandir(root / prefix) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = prefix + entry.name
            # Undecodable bytes arrive as lone surrogates, which are not printable either.
            if not name.isprintable() or "\\" in name:
                raise InputRefused(
                    f"{root} has a file with an invalid name: {name!r}",
                    hint="rename it: control characters, backslashes and invalid UTF-8 are refused",
                )
            if entry.is_dir(follow_symlinks=False):
                if not _JUNK_FOLDERS.fullmatch(entry.name):
                    yield from _walk(root, f"{name}/", home, depth + 1, gguf)
            elif (gguf and entry.name.endswith(".gguf")) or not _JUNK_FILES.fullmatch(entry.name):
                if entry.is_symlink():
                    _check_link(root, name, home)
                elif not entry.is_file():
                    raise _irregular(root / name)
                yield name


def _check_link(root: Path, name: str, home: Path) -> None:
    path = root / name
    try:
        target = path.resolve(strict=True)
        mode = target.stat().st_mode
    except (OSError, RuntimeError) as error:
        raise InputRefused(
            f"{path} is a broken link", hint="download the model again, or remove the link"
        ) from error
    if not target.is_relative_to(home):
        raise InputRefused(
            f"{path} is a link to a file outside the folder: {target}",
            hint="copy the file into the folder if it belongs to the model",
        )
    if not stat.S_ISREG(mode):
        raise _irregular(path)


def no_folder(root: Path, hint: str) -> InputRefused:
    """Return the refusal of a path that is no folder, or that was the source of a recipe."""
    if found := _REMOTE.fullmatch(str(root)):
        slash = "/" if found["place"].startswith("/") else ""
        source = f"{found['scheme']}:{slash}{found['place']}"
        return InputRefused(
            f"{source} is not a folder, and this command downloads no models",
            hint="download it first, and give the folder with the files",
        )
    return InputRefused(f"{root} is not a folder", hint=hint)


def _irregular(path: Path) -> InputRefused:
    return InputRefused(
        f"{path} is not a regular file", hint="remove devices, pipes, sockets and folder links"
    )


def _require(root: Path, names: list[str], required: str, hint: str) -> None:
    if required in names:
        return
    if inside := _inside(root, required):
        hint += f": {inside}"
    elif converted := sorted(path.name for path in root.glob("*.gguf")):
        hint += f", or what {converted[0]!r} was made from; a GGUF base is given as its file"
    raise InputRefused(f"{root} has no {required}", hint=hint)


def _inside(root: Path, required: str) -> str:
    """Return the folders in a folder that have a file; of a training's checkpoints, the last."""
    found = [path.parent for path in root.glob(f"*/{required}")]
    found = [folder for folder in found if not folder.name.startswith(".")]
    saved = [folder for folder in found if _JUNK_FOLDERS.fullmatch(folder.name)]
    others = sorted(folder for folder in found if folder not in saved)
    saved.sort(key=lambda folder: int("".join(filter(str.isdecimal, folder.name)) or 0))
    return " or ".join(map(str, others[:_SHOWN] or saved[-1:]))


def check_no_code(root: Path, names: list[str]) -> None:
    """Raise InputRefused if a file of a model or adapter asks for custom code, or may run some."""
    for name in _CODE_CONFIGS:
        if name in names and read_json(root / name).get("auto_map"):
            raise InputRefused(
                f"{root / name} has an auto_map: the model needs custom code",
                hint="use a model with an architecture that transformers supports; if this is one, "
                "remove auto_map from the file",
            )
    check_templates(root, names)


def check_templates(root: Path, names: list[str]) -> None:
    """Raise InputRefused if a chat template among the files reaches into Python."""
    for name in names:
        if name.endswith(".jinja") or name in _TEMPLATE_CONFIGS:
            if name.endswith(".jinja"):
                text = read_bytes(root / name, SMALL).decode("utf-8", "replace")
            else:
                text = json.dumps(read_json(root / name).get("chat_template"), ensure_ascii=False)
            check_template(text, root / name)


def check_template(text: str, file: Path) -> None:
    """Raise InputRefused if a chat template, from this file, reaches into Python."""
    if found := _INTERNALS.search(text):
        raise InputRefused(
            f"{file} has {found[0]} in its chat template, which reaches into Python:"
            " an engine that renders it without a sandbox would run its code",
            hint="take the template from the model's makers; no template needs such names",
        )


def _no_weights(root: Path, required: str) -> InputRefused:
    pickles = sorted(p.name for p in root.iterdir() if _PICKLES.fullmatch(p.name))
    weights = [name for name in pickles if name.startswith(("pytorch_model", "adapter_model"))]
    found = (weights or [n for n in pickles if n.endswith((".pt", ".pth", ".ckpt"))])[:3]
    if not found:
        inside = _inside(root, required)
        return InputRefused(
            f"{root} has no weights: {required} is missing",
            hint="check that the download is complete"
            + (f", or give one that has them: {inside}" if inside else ""),
        )
    convert = (
        "import sys,torch;from safetensors.torch import save_file;"
        "w=torch.load(sys.argv[1],weights_only=True,map_location='cpu');"
        "save_file({k:v.clone().contiguous() for k,v in w.items()},sys.argv[2],{'format':'pt'})"
    )
    return InputRefused(
        f"{root} has only pickle files, which can run code: {', '.join(found)}",
        hint=f'convert them: python -c "{convert}" {found[0]} {required}',
    )
