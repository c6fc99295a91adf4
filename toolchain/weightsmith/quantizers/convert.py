"""Run llama.cpp's converter, also for tokenizers that it does not know or whose files are missing.

llama.cpp has names for pre-tokenizers. Its converter finds the name by a hash of one text's tokens,
so it refuses unpublished vocabularies. This wrapper derives the name from the pre-tokenizer in
tokenizer.json if there is an exact match.

Runs in a builder: from `worker/convert_gguf.py`, which lets it write files as it always does, or
from `worker/quantize_gguf.py`, which takes the tensors before they are written.

A default name for all other vocabularies would silently split text differently.

Tokenizers of Llama 2, Mistral and Gemma are SentencePiece models, but transformers (for example
with an adapter) writes only tokenizer.json. Without the SentencePiece model the converter fails, or
gives all pieces the same score, so that llama.cpp tokenizes differently than in training. It also
reads added tokens only from tokenizer_config.json, which may no longer have them. So both are made
here. The order of merges is the order of scores. The base's own file does not do, since the
adapter's tokenizer may differ; byte-pair vocabularies that never were SentencePiece are refused.
"""

from __future__ import annotations

import importlib
import json
import re
import runpy
import struct
import sys
import traceback
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol, cast

from weightsmith.core.errors import InputRefused, WeightsmithError, ran_out_of_memory
from weightsmith.core.safe_parse import TOKENIZER, parse_file
from weightsmith.forward.libraries import import_lightly, load_tokenizer
from weightsmith.models.facts import read_facts
from weightsmith.models.predicting import predicting_tensors
from weightsmith.models.task import read_task
from weightsmith.models.templates import (
    VOCABULARY_FILES,
    TemplateOverLimit,
    gguf_template,
    pair_prompt,
    render_chat,
)
from weightsmith.models.tensors import CheckpointTensors, computed
from weightsmith.quantizers.gguf_check import PROJECTOR_TYPE, TEXT_ONLY
from weightsmith.quantizers.gguf_header import read_header
from weightsmith.quantizers.gguf_rows import is_stored, rows_of
from weightsmith.quantizers.gguf_settings import as_published
from weightsmith.quantizers.gguf_split import split_name, unknown_split

if TYPE_CHECKING:
    import numpy as np
    from gguf.utility import LocalTensor
    from gguf.vocab import SpecialVocab


_LONGEST = 300
"""Characters of an error that are shown."""
_MODEL, _TOKENIZER, _CONFIG = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
_UNIGRAM = "sentencepiece.bpe.model"
"""XLM-RoBERTa's, which is none of byte pairs."""
_BLANKS = {"Regex": " {2,}"}
_NO_MAP = {
    "type": "Precompiled",
    "precompiled_charsmap": b64encode(struct.pack("<I", 1024) + bytes(1025)).decode(),
}
"""A map of SentencePiece (normalizer.cc) that leaves all characters: the length of its trie, of 256
units of which none leads anywhere, and an empty text."""
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_MOST, _LONGEST_PIECE = 4_000_000, 4096
"""Pieces, and characters of one; the largest vocabularies have a million and some hundred."""


class _TextModel(Protocol):
    dir_model: Path


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
    _patch(model)
    with with_pieces(model) as folder:
        if projectors:
            words, text_only = runs[0][0], allow_text_only
            _write_projector(converter, folder, words, projectors, allow_text_only=text_only)
        for arguments, write in runs:
            if write is not None:
                _write_by(write)
            _convert_text(converter, folder, arguments)


def _convert(converter: Path, folder: Path, arguments: Sequence[str]) -> None:
    sys.argv = [str(converter), str(folder), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _convert_text(converter: Path, folder: Path, arguments: Sequence[str]) -> None:
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


def _write_by(write: Write) -> None:
    gguf: Any = importlib.import_module("gguf")
    gguf.GGUFWriter.write_tensors_to_file = lambda writer, **_: write(writer)


def _patch(model: Path) -> None:
    """Change the converter, which has no options for this.

    It may read files without data, and knows pre-tokenizers by `split_name`. It says which tokens
    begin and end a text as this model's users are served: it takes them from files that
    transformers may save without them. llama.cpp then goes by the kind of vocabulary, and its
    server got one token more than the reference. A Qwen 3 is what its files say: it would become a
    reranker, without its head for words, because of a folder's name or a heading of its README.md;
    and one that is a reranker would get the prompt of Qwen's own.
    """
    names = ("gguf", "gguf.utility", "conversion.base", "conversion.qwen")
    gguf, utility, base, qwen = (cast("Any", importlib.import_module(name)) for name in names)
    stored, vocabulary, text_model = utility.LocalTensor, gguf.SpecialVocab, base.TextModel
    begin, mapped = stored.__init__, stored.mmap_bytes
    add, by_hash = vocabulary.add_to_gguf, text_model.get_vocab_base_pre

    def initialize(tensor: object, dtype: str, *places: object, **named: object) -> None:
        begin(tensor, dtype.upper(), *places, **named)  # types are in lower case there

    def data(tensor: LocalTensor) -> np.ndarray:
        place = tensor.data_range
        found = computed(Path(place.filename))
        made: np.ndarray = found.read(place.offset, place.size) if found else mapped(tensor)
        return made

    def add_to_gguf(special: SpecialVocab, writer: object, quiet: bool = False) -> None:
        special.add_special_token |= added_tokens(model)
        # It reads tokenizer_config.json before the newer file, which may be an adapter's, and takes
        # a template there that is null for none.
        if special.chat_template is None or isinstance(special.chat_template, str):
            special.chat_template = gguf_template(model) or special.chat_template
        add(special, writer, quiet)

    def by_hash_or_split(converted: _TextModel, tokenizer: object) -> str:
        try:
            return str(by_hash(converted, tokenizer))
        except NotImplementedError:
            path = Path(converted.dir_model) / "tokenizer.json"
            name = split_name(json.loads(path.read_text("utf-8"))) if path.is_file() else ""
            if not name:
                raise unknown_split() from None
            print(f"unknown vocabulary, pre-tokenizer {name!r}", file=sys.stderr)  # noqa: T201
            return name

    _patch_settings(base, model)
    qwen.Qwen3Model._is_qwen3_reranker = lambda _: False  # noqa: SLF001 - it has no other way
    task = read_task(model)
    if task.tokens:
        prompt = pair_prompt(load_tokenizer(model), task.sentence)
        _patch_reranker(gguf.GGUFWriter, qwen.Qwen3Model, task.tokens, prompt)
    stored.__init__, stored.mmap_bytes = initialize, data
    vocabulary.add_to_gguf, text_model.get_vocab_base_pre = add_to_gguf, by_hash_or_split


def _patch_settings(base: Any, model: Path) -> None:
    """Let the converter read the settings that it knows, and write the file's type always."""
    mamba: Any = importlib.import_module("conversion.mamba")
    kinds, states = base.ModelBase, mamba.Mamba2Model
    settings, begin = kinds.load_hparams, states.__init__
    prepare = base.TextModel.prepare_metadata
    tensors = CheckpointTensors(model).names
    predicts = bool(predicting_tensors(_read(model / "config.json"), tensors))

    def read_settings(*words: object, **named: object) -> dict[str, Any]:
        return as_published(settings(*words, **named), predicts=predicts)

    def initialize_states(made: object, folder: Path, *places: object, **named: object) -> None:
        if named.get("hparams") is None:  # it reads the file, past the function for all others
            named["hparams"] = as_published(_read(folder / "config.json"), predicts=predicts)
        begin(made, folder, *places, **named)

    def prepare_metadata(made: Any, **named: object) -> None:
        prepare(made, **named)
        if not any("general.file_type" in keys for keys in made.gguf_writer.kv_data):  # GPT-NeoX
            made.gguf_writer.add_file_type(made.ftype)

    kinds.load_hparams, kinds.no_mtp = staticmethod(read_settings), not predicts
    states.__init__, base.TextModel.prepare_metadata = initialize_states, prepare_metadata


def _patch_reranker(writer: Any, kind: Any, tokens: tuple[int, int], prompt: str) -> None:
    """Let the converter take the rows of these tokens for a head, and write this prompt."""
    add = writer.add_chat_template

    def find(converted: Any) -> None:
        converted.is_rerank = True
        converted.is_tied_embeddings = converted.hparams.get("tie_word_embeddings", False)

    def head(_: object, matrix: Any) -> object:
        # Read here and now: what computes a part of a matrix would compute the whole one, which is
        # then no longer read a few rows at a time.
        columns = int(matrix.shape[-1])
        if not is_stored(matrix, "F32", columns):
            raise InputRefused(
                "the matrix of the reranker's two tokens does not lie in the checkpoint as floats",
                hint="give the model in 16 or 32 bits",
            )
        read = rows_of(matrix, "F32", columns)
        torch: Any = importlib.import_module("torch")
        return torch.cat([torch.from_numpy(read(token, token + 1)) for token in tokens])

    def add_template(written: object, value: str | list[dict[str, str]]) -> None:
        own = [{"name": "rerank", "template": prompt}]
        add(written, value if isinstance(value, str) else own)

    kind._is_qwen3_reranker, kind._find_rerank_config = lambda _: True, find  # noqa: SLF001
    kind._get_cls_out_tensor = head  # noqa: SLF001
    writer.add_chat_template = add_template


def added_tokens(model: Path) -> dict[str, bool]:
    """Return whether a server must add the begin token (`bos`) and the end token (`eos`).

    A plain text gets those that the tokenizer adds. llama.cpp adds the same ones to chats, which
    have no more of them than their template writes; a model that does not chat has none. Where the
    template refuses, or transformers cannot read the tokenizer, nothing is said of them: the
    converter reads more tokenizers. Raises TemplateOverLimit, since the file may not depend on how
    fast or large this machine is.
    """
    try:
        tokenizer = load_tokenizer(model)
        ids = tokenizer("a")["input_ids"]
        found = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
        ends = (("bos", 0), ("eos", -1))
        added = {name: bool(ids) and ids[end] == found[name] for name, end in ends}
        if tokenizer.chat_template and read_facts(model).task.kind == "generate":
            chat = render_chat(tokenizer, ({"role": "user", "content": "a"},), answer=True)
            added["bos"] &= chat.startswith(tokenizer.bos_token or "")
            added["eos"] = False
    except TemplateOverLimit:
        raise
    except InputRefused:
        return {}
    return {name: value for name, value in added.items() if found[name] is not None}


@contextmanager
def with_pieces(model: Path) -> Iterator[Path]:
    """Yield a folder with the model's files and the tokenizer files that the converter needs.

    This is the model's folder if none are missing. Raises NotImplementedError for BPE with byte
    fallback that is not a SentencePiece model, which llama.cpp does not support.
    """
    tokenizer, has_pieces = _read(model / _TOKENIZER), (model / _MODEL).exists()
    kind, files = tokenizer.get("model") or {}, dict[str, bytes]()
    if has_pieces or (kind.get("type") == "BPE" and kind.get("byte_fallback")):
        if not has_pieces:
            files[_MODEL] = sentence_pieces(tokenizer)
        config = _read(model / _CONFIG)
        if tokenizer and "added_tokens_decoder" not in config:
            added = {str(token["id"]): token for token in tokenizer.get("added_tokens", ())}
            files[_CONFIG] = json.dumps({**config, "added_tokens_decoder": added}).encode()
    if kind.get("type") == "Unigram" and not (model / _UNIGRAM).exists():
        files |= _with_charsmap(model, tokenizer)
    if not files:
        yield model
        return
    with TemporaryDirectory(prefix="pieces-") as folder:
        view = Path(folder) / model.name
        view.mkdir()
        for path in model.iterdir():
            if path.name not in files:
                (view / path.name).symlink_to(path)
        for name, data in files.items():
            (view / name).write_bytes(data)
        yield view


def _with_charsmap(model: Path, tokenizer: Mapping[str, Any]) -> Mapping[str, bytes]:
    """Return the files of an XLM-RoBERTa's own vocabulary as the converter reads them.

    It takes the characters' map from a certain place of tokenizer.json, and fails if there is none.
    A text's blanks count once, which it reads from a setting of another meaning. Raises
    InputRefused for a normalizer that llama.cpp does not have.
    """
    named = (_read(model / "config.json").get("architectures") or [""])[0]
    if "XLMRoberta" not in str(named):
        return {}
    whole = tokenizer.get("normalizer")
    steps = whole.get("normalizers", [whole]) if isinstance(whole, dict) else []
    steps = [step for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    blanks = [step for step in steps if step.get("pattern") == _BLANKS]
    maps = [step for step in steps if isinstance(step.get("precompiled_charsmap"), str)]
    if len(maps) + len(blanks) < len(steps) or len(maps) > 1:
        odd = next((one for one in steps if one not in blanks + maps[:1]), steps[-1])
        raise InputRefused(
            f"{_TOKENIZER} has the normalizer {odd.get('type')}, and llama.cpp knows none but"
            " SentencePiece's map of characters for this vocabulary",
            hint="choose target vllm",
        )
    made = {**tokenizer, "normalizer": maps[0] if maps else _NO_MAP}
    once = bool(blanks) or "WhitespaceSplit" in json.dumps(tokenizer.get("pre_tokenizer"))
    config = {**_read(model / _CONFIG), "clean_up_tokenization_spaces": once}
    return {_TOKENIZER: json.dumps(made).encode(), _CONFIG: json.dumps(config).encode()}


def sentence_pieces(tokenizer: Mapping[str, Any]) -> bytes:
    """Return the SentencePiece model of a tokenizer.json, with equivalent scores.

    SentencePiece merges the neighbours with the highest score, tokenizer.json those with the first
    merge; so minus a merge's index is an equivalent score
    (https://github.com/google/sentencepiece, src/bpe_model.cc). Raises NotImplementedError if that
    does not hold: two pieces form another piece, but there is no such merge. Raises InputRefused
    for numbers of pieces that none has, up to which unused ones would be written.
    """
    pb: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    vocabulary: dict[str, int] = tokenizer["model"]["vocab"]
    special = {t["content"] for t in tokenizer.get("added_tokens", ()) if t.get("special")}
    added = {t["content"] for t in tokenizer.get("added_tokens", ())}
    unknown = tokenizer["model"].get("unk_token") or "<unk>"
    _check_vocabulary(vocabulary)
    places = _places(tokenizer["model"], added)
    if unknown not in vocabulary:
        raise NotImplementedError("not a SentencePiece model: BPE without an unknown token")
    kinds, made = pb.ModelProto.SentencePiece, pb.ModelProto()
    texts = {number: text for text, number in vocabulary.items()}
    for number in range(max(texts) + 1):
        text = texts.get(number, f"[unused{number}]")
        kind = kinds.NORMAL
        if number not in texts:
            kind = kinds.UNUSED
        elif text == unknown:
            kind = kinds.UNKNOWN
        elif _BYTE.fullmatch(text):
            kind = kinds.BYTE
        elif text in added:
            kind = kinds.CONTROL if text in special else kinds.USER_DEFINED
        # Single characters come after all merged pieces, as in SentencePiece's trainer.
        score = float(-places.get(text, len(places) + number))
        made.pieces.add(piece=text, score=score if kind == kinds.NORMAL else 0.0, type=kind)
    made.trainer_spec.model_type = pb.TrainerSpec.BPE
    made.trainer_spec.vocab_size = len(made.pieces)
    made.trainer_spec.byte_fallback = True
    made.trainer_spec.unk_id = vocabulary[unknown]
    made.trainer_spec.unk_piece = unknown
    made.normalizer_spec.name = "identity"
    made.normalizer_spec.add_dummy_prefix = _starts_with_space(tokenizer)
    made.normalizer_spec.remove_extra_whitespaces = False
    return bytes(made.SerializeToString(deterministic=True))


def _check_vocabulary(vocabulary: Mapping[str, int]) -> None:
    for number in vocabulary.values():
        if type(number) is not int or not 0 <= number < _MOST:
            raise InputRefused(
                f"{_TOKENIZER} gives a piece the number {str(number)[:40]}",
                hint="compare the file with the base's: numbers of pieces are those of embedding "
                "rows",
            )
    if (longest := max(map(len, vocabulary), default=0)) > _LONGEST_PIECE:
        raise InputRefused(
            f"{_TOKENIZER} has a piece of {longest} characters",
            hint="compare the file with the base's: no vocabulary has pieces of over "
            f"{_LONGEST_PIECE}",
        )


def _starts_with_space(tokenizer: Mapping[str, Any]) -> bool:
    for part in ("normalizer", "pre_tokenizer"):
        whole = tokenizer.get(part) or {}
        for step in whole.get("normalizers") or whole.get("pretokenizers") or (whole,):
            if step.get("type") == "Prepend":
                return True
            if step.get("type") == "Metaspace":
                return bool(step.get("prepend_scheme", "always") != "never")
    return False


def _places(model: Mapping[str, Any], added: set[str]) -> dict[str, int]:
    """Return each merged piece's index in the merges."""
    places: dict[str, int] = {}
    merges = set()
    for merge in model.get("merges") or ():
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        merges.add((left, right))
        places.setdefault(left + right, len(places))
    vocabulary = model["vocab"]
    for text in vocabulary:
        if text in added or _BYTE.fullmatch(text):
            continue
        for n in range(1, len(text)):
            left, right = text[:n], text[n:]
            parts = {left, right}
            if parts <= vocabulary.keys() and not parts & added and (left, right) not in merges:
                raise NotImplementedError(
                    f"not a SentencePiece model: {text!r} is a piece, but there is no merge of "
                    f"{left!r} and {right!r}"
                )
    return places


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = parse_file(path, largest=TOKENIZER) if path.is_file() else {}
    return found
