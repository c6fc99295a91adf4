"""Run llama.cpp's converter, also for tokenizers that it does not know or whose files are missing.

llama.cpp has names for pre-tokenizers. Its converter finds the name by a hash of one text's tokens,
so it refuses unpublished vocabularies. This wrapper derives the name from the pre-tokenizer in
tokenizer.json if there is an exact match.

Runs in a builder: from `worker/convert_gguf.py`, which lets it write files as it always does, or
from `worker/quantize_gguf.py`, which takes the tensors before they are written.

A default name for all other vocabularies would silently split text differently.
"""

from __future__ import annotations

import importlib
import json
import runpy
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from weightsmith.core.errors import InputRefused, WeightsmithError, ran_out_of_memory
from weightsmith.forward.libraries import import_lightly, load_tokenizer
from weightsmith.models.templates import render_chat
from weightsmith.models.tokenizer_files import VOCABULARY_FILES
from weightsmith.models.virtual_weights import computed
from weightsmith.quantizers.gguf_header import read_header
from weightsmith.quantizers.gguf_projector import PROJECTOR_TYPE, TEXT_ONLY
from weightsmith.quantizers.sentencepiece_export import with_pieces

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_BY_EXPRESSION = {
    _WORDS + r"\p{N}" + _REST: "qwen2",
    # llama-bpe also implies `ignore_merges` and a begin token; smaug-bpe only the split.
    _WORDS + r"\p{N}{1,3}" + _REST: "smaug-bpe",
}
"""Regex of a Split before ByteLevel -> llama.cpp's name (src/llama-vocab.cpp)."""
_LONGEST = 300
"""Characters of an error that are shown."""
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}


def split_name(tokenizer: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of a tokenizer.json's pre-tokenizer; empty without an exact match."""
    model, normalizer = tokenizer.get("model") or {}, tokenizer.get("normalizer")
    odd = ("ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if model.get("type") != "BPE" or any(model.get(name) for name in odd):
        return ""
    if normalizer and normalizer.get("type") != "NFC":  # llama.cpp leaves NFC to its callers
        return ""
    whole = tokenizer.get("pre_tokenizer") or {}
    steps = whole.get("pretokenizers", []) if whole.get("type") == "Sequence" else [whole]
    *before, last = steps or [{}]
    if any(last.get(key) != value for key, value in _BYTES.items()):
        return ""
    by_words = last.get("use_regex", True)  # GPT-2's expression
    match before:
        case []:
            name = "gpt-2" if by_words else ""
        case [{"type": "Digits", "individual_digits": True}]:
            name = "smollm" if by_words else ""
        case [{"type": "Split", "behavior": "Isolated", "pattern": {"Regex": str(found)}} as split]:
            known = not by_words and not split.get("invert")
            name = _BY_EXPRESSION.get(found, "") if known else ""
        case _:
            name = ""
    return name


Write = Callable[[Any], None]
"""Gets gguf-py's GGUFWriter where it would write its tensors."""
_OF_ALL_FILES = ("--model-name", "--metadata")


def run(
    converter: Path,
    model: Path,
    *runs: tuple[Sequence[str], Write | None],
    projectors: Sequence[Path] = (),
    allow_text_only: bool = False,
) -> None:
    """Run the converter on a model's folder once for each list of remaining arguments.

    Without a function of its own, a run writes the file as the converter always does. Before them,
    it writes a projector for pictures, if these have a place. Raises InputRefused if it cannot,
    unless `allow_text_only`.
    """
    # Before the builder's own gguf package, which may be of another version.
    sys.path[:0] = [str(converter.parent), str(converter.parent / "gguf-py")]
    # A model's configuration imports these and, with them, distributed tensors: 0.9 CPU seconds.
    import_lightly("torch", "transformers.activations")
    _split_by_tokenizer(importlib.import_module("conversion.base").TextModel)
    _compute_data(importlib.import_module("gguf.utility").LocalTensor)
    gguf: Any = importlib.import_module("gguf")
    writer_class: Any = gguf.GGUFWriter
    _add_tokens(gguf.SpecialVocab, model)
    with with_pieces(model) as folder:
        if projectors:
            words, text_only = runs[0][0], allow_text_only
            _write_projector(converter, folder, words, projectors, allow_text_only=text_only)
        for arguments, write in runs:
            if write is not None:
                _instead_of_writing(writer_class, write)
            _convert_text(converter, folder, arguments)


def _convert(converter: Path, folder: Path, arguments: Sequence[str]) -> None:
    sys.argv = [str(converter), str(folder), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _convert_text(converter: Path, folder: Path, arguments: Sequence[str]) -> None:
    """Run the converter; raises InputRefused if it fails because the folder has no tokenizer."""
    try:
        _convert(converter, folder, arguments)
    except Exception as error:
        # Asked only now, because the converter knows more files of tokenizers than we do.
        if ran_out_of_memory(error) or any((folder / name).is_file() for name in VOCABULARY_FILES):
            raise
        raise InputRefused(
            f"{folder} has no tokenizer, which a GGUF file needs",
            hint="put the model's tokenizer files, such as tokenizer.json, beside config.json",
        ) from error


def _write_projector(
    converter: Path,
    folder: Path,
    arguments: Sequence[str],
    places: Sequence[Path],
    *,
    allow_text_only: bool,
) -> None:
    """Write a projector to all places; to none if there is no way and that is allowed."""
    first, *others = places
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    words = [word for pair in pairs if pair[0] in _OF_ALL_FILES for word in pair]
    words += ["--mmproj", "--outfile", str(first), "--outtype", PROJECTOR_TYPE]
    first.unlink(missing_ok=True)  # of a killed run: another format's stored file may be a link
    try:
        _convert(converter, folder, words)
        if not read_header(first).tensors:
            raise ValueError("it found no tensors of a vision tower")
    except (WeightsmithError, MemoryError, OSError):
        raise
    except (Exception, SystemExit) as error:
        if ran_out_of_memory(error):  # with more of it there would be a projector
            raise
        traceback.print_exc()
        print(f"no projector: {type(error).__name__}: {error}", file=sys.stderr)  # noqa: T201
        first.unlink(missing_ok=True)
        if allow_text_only:
            return
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:_LONGEST]}"
        raise InputRefused(
            f"llama.cpp's converter cannot convert the vision tower: {said}",
            hint=f"{TEXT_ONLY}; the job's log has the traceback",
        ) from error
    for other in others:
        other.unlink(missing_ok=True)
        other.hardlink_to(first)


def _instead_of_writing(writer_class: Any, write: Write) -> None:
    def write_tensors(writer: Any, *, progress: bool = False) -> None:  # noqa: ARG001
        write(writer)

    writer_class.write_tensors_to_file = write_tensors


def _compute_data(tensor_class: Any) -> None:
    """Let the converter read files without data; their types are in lower case."""
    begin, stored = tensor_class.__init__, tensor_class.mmap_bytes

    def initialize(tensor: Any, dtype: str, *places: Any, **named: Any) -> None:
        begin(tensor, dtype.upper(), *places, **named)

    def data(tensor: Any) -> Any:
        place = tensor.data_range
        found = computed(Path(place.filename))
        return found.read(place.offset, place.size) if found else stored(tensor)

    tensor_class.__init__, tensor_class.mmap_bytes = initialize, data


def _add_tokens(vocabulary_class: Any, model: Path) -> None:
    """Let the converter say which tokens begin and end a text as this model's users are served.

    It takes them from files that transformers may save without them. llama.cpp then goes by the
    kind of vocabulary, and its server got one token more than the reference.
    """
    add = vocabulary_class.add_to_gguf

    def add_to_gguf(vocabulary: Any, writer: Any, quiet: bool = False) -> None:
        with suppress(InputRefused):  # the converter reads more tokenizers than transformers
            vocabulary.add_special_token |= added_tokens(load_tokenizer(model))
        add(vocabulary, writer, quiet)

    vocabulary_class.add_to_gguf = add_to_gguf


def added_tokens(tokenizer: Any) -> dict[str, bool]:
    """Return whether a server must add the begin token (`bos`) and the end token (`eos`).

    A plain text gets those that the tokenizer adds. llama.cpp adds the same ones to chats, which
    have no more of them than their template writes. Raises InputRefused if the template fails.
    """
    ids = tokenizer("a")["input_ids"]
    found = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    added = {name: bool(ids) and ids[end] == found[name] for name, end in (("bos", 0), ("eos", -1))}
    if tokenizer.chat_template:
        chat = render_chat(tokenizer, ({"role": "user", "content": "a"},), answer=True)
        added["bos"] &= chat.startswith(tokenizer.bos_token or "")
        added["eos"] = False
    return {name: value for name, value in added.items() if found[name] is not None}


def _split_by_tokenizer(model_class: Any) -> None:
    by_hash = model_class.get_vocab_base_pre

    def by_hash_or_split(model: Any, tokenizer: Any) -> str:
        try:
            return str(by_hash(model, tokenizer))
        except NotImplementedError:
            path = Path(model.dir_model) / "tokenizer.json"
            name = split_name(json.loads(path.read_text("utf-8"))) if path.is_file() else ""
            if not name:
                raise
            print(f"unknown vocabulary, pre-tokenizer {name!r}", file=sys.stderr)  # noqa: T201
            return name

    model_class.get_vocab_base_pre = by_hash_or_split
