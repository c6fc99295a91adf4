"""Check a finished GGUF model: complete, of the requested type, with the chat template.

The projector of a model that sees is a second GGUF file, which llama.cpp's converter writes. It is
made in the same process, before the model's tensors are taken over, so computed weights are read
once. The option is in the key of models that have a projector and of no others, whose results stay
valid. A model whose tower cannot be converted is refused unless the recipe allows it: a warning
among others did not tell those who need it to see.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np

from weightsmith.core.errors import CheckFailed
from weightsmith.core.safe_parse import TOKENIZER, parse_file
from weightsmith.core.values import Json, JsonValue
from weightsmith.models.gguf_config import projector_name
from weightsmith.models.reshard import kind_of
from weightsmith.models.safetensors import read_header
from weightsmith.models.task import of_class
from weightsmith.models.templates import gguf_template
from weightsmith.quantizers.gguf_file import GGUFModel, tensors_of
from weightsmith.quantizers.gguf_importance import DIGEST_KEY, experts_missed
from weightsmith.quantizers.gguf_mix import BOUND, LOSS, guessed_type
from weightsmith.quantizers.gguf_types import FILE_TYPES, MIX, TENSOR_TYPES, file_type
from weightsmith.quantizers.quantizer import QuantizeRequest

# Architectures whose tensors are converted one to one.
_ONE_TO_ONE = frozenset(
    {
        "gemma", "gemma2", "gemma3", "granite", "llama", "olmo2", "qwen2", "qwen3", "smollm3",
        "starcoder2",
    }
)  # fmt: skip
_COMPUTED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_RANK_HEAD = "cls.output.weight"
_NOT_WEIGHTS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias")
_NEVER_QUANTIZED = frozenset({"position_embd.weight", "token_types.weight"})
"""Tables that llama-quantize leaves as they are (src/llama-quant.cpp)."""
_EXPERT = re.compile(r"\.experts\.\d+\.")
_MULTIMODAL = re.compile(
    r"^(mlp|vit\.|vpm\.|siglip2\.|conformer\.|merger\.|resampler\.)|(visual|vision|audio|talker)\."
    r"|(vision|audio)_|(projector|connector)\.|image_newline|patch_(embed|embedding|merger|merge_mlp)"
)
"""Tensors of vision and audio models, which the converter omits
(TextModel.filter_tensors of llama.cpp's conversion/base.py)."""
IMATRIX = "imatrix.gguf"
"""Name of the importance matrix in a format's folder."""
PROJECTOR_TYPE = "f16"
"""As llama.cpp's guides and its published files have it: not every backend computes with bfloat16
there, and float16 has all values of bfloat16 from 6.1e-5 to 65504."""
LOSSES = "losses.json"
"""Name of the file there with what each type of each tensor loses."""
ALLOW_TEXT_ONLY = "--allow-text-only"
"""The converting program's argument before a projector's places."""
TEXT_ONLY = (
    "set quantize.allow_text_only (--allow-text-only) for a model that reads text only; or choose "
    "target vllm, which reads pictures"
)
_PROJECTOR = {
    "general.type": "mmproj",
    "general.architecture": "clip",
    "general.file_type": FILE_TYPES[PROJECTOR_TYPE].number,
    "clip.has_vision_encoder": True,
}
# Keys that the converter would guess from folder names; gguf.py disables them.
_GUESSED = ("general.basename", "general.finetune", "general.organization", "general.version")
_FLOATS = frozenset({"F32", "F16", "BF16", "F64"})
_PART = 1 << 24
"""Bytes that are checked at a time."""
_UNQUANTIZED_SHARE = 0.01
"""Fraction of weights that may stay in 16 or 32 bits: norms, routers, other small tensors."""


def check(request: QuantizeRequest) -> Mapping[str, JsonValue]:
    """Return the facts of the finished files for the report; raises CheckFailed if a check fails.

    Checks: all tensors are inside the files and nothing follows the last; file type; tensor count;
    tokens, merges, special tokens and chat template equal the checkpoint's; scales are finite;
    almost no matrices are left unquantized; the projector, if there is one.
    """
    matrix = request.output / IMATRIX
    projector = next(map(Path, places_of(request)), None)
    found = sorted(request.output.glob("[!.]*.gguf"))
    read = GGUFModel([path for path in found if path not in (matrix, projector)])
    model, format_name = request.model, request.format.name
    architecture = str(read.value("general.architecture"))
    number, expected = read.value("general.file_type"), file_type(format_name).number
    if format_name == MIX.name:
        expected = FILE_TYPES[_guessed(read)].number
    if number != expected:
        raise CheckFailed(
            f"the file has file type {number}, but {format_name} is {expected}",
            hint="check the quantizer's output",
        )
    _check_guesses(read)
    names = {t.name for shard in model.glob("*.safetensors") for t in read_header(shard).tensors}
    multimodal = {name for name in names if _MULTIMODAL.search(name)}
    if architecture in _ONE_TO_ONE:
        _check_count(read, names - multimodal)
    tokens = _check_tokenizer(read, model)
    template = _check_template(read, model)
    _check_finite(read)
    fallbacks = _fallbacks(read, format_name, request.options.get("tensor_types", {}))
    elements = sum(int(t.n_elements) for t in read.tensors.values())
    stored = sum(int(t.n_bytes) for t in read.tensors.values())
    _check_quantized(read, format_name, elements)
    types = Counter(tensor.tensor_type.name for tensor in read.tensors.values())
    about: dict[str, JsonValue] = {}
    if projector and projector.is_file():
        about["projector"] = check_projector(projector)
    if request.options.get("shared_layers"):
        about["kinds"] = _kinds(read, names - multimodal)
    blind = projector is not None and not about
    if about:
        multimodal = set()  # in the projector
    if loss := read.get(LOSS):
        about["mix"] = {"loss": float(str(loss)), "bound": float(str(read.value(BOUND)))}
    warnings = _warnings(
        request, len(multimodal), len(fallbacks), len(read.tensors), template=template, blind=blind
    )
    return {
        "file": read.name,
        "files": [path.name for path in read.files],
        "size": sum(path.stat().st_size for path in read.files),
        "architecture": architecture,
        "file_type": format_name,
        "tensors": len(read.tensors),
        "types": dict(sorted(types.items())),
        "tensor_types": {name: t.tensor_type.name for name, t in read.tensors.items()},
        "fallbacks": fallbacks,
        "bits_per_weight": round(stored * 8 / elements, 3),
        "tokens": tokens,
        "chat_template": template,
        "imatrix": read.get(DIGEST_KEY) or "",
        "warnings": warnings,
        **about,
    }


def _kinds(read: GGUFModel, names: Collection[str]) -> dict[str, JsonValue]:
    """Return the kinds of the checkpoint's tensors that each file has; of `""`, those of none."""
    places, found = tensors_of(read, names), dict[str, set[str]]()
    for name in names:
        file = read.places[places[name][0]] if name in places else ""
        found.setdefault(file, set()).add(kind_of(name))
    return {file: sorted(kinds) for file, kinds in sorted(found.items())}


def _warnings(
    request: QuantizeRequest,
    multimodal: int,
    fallbacks: int,
    tensors: int,
    *,
    template: bool,
    blind: bool,
) -> list[str]:
    warnings = []
    if multimodal:
        warnings.append(
            f"the file has only the language model: {multimodal} vision and audio tensors are"
            " omitted, so the server does not accept images or audio"
        )
    if fallbacks:
        warnings.append(
            f"{fallbacks} of {tensors} tensors have a larger type, because their rows are not"
            " a multiple of 256: the file has more bits per weight than its name says"
        )
    if not template and of_class(_architecture(request.model))[0] == "generate":
        warnings.append("the checkpoint has no chat template: the server falls back to ChatML")
    if blind:
        warnings.append(
            "llama.cpp's converter could not convert the vision tower, so the server reads text "
            "only, as quantize.allow_text_only permits"
        )
    if request.options.get("imatrix", "off") != "off":
        warnings += experts_missed(request.output / IMATRIX)
    if file_type(request.format.name).is_low:
        warnings.append(
            f"{request.format.name} has less than four bits per weight, which may lose the "
            "fine-tuning: check the task score"
        )
    return warnings


def _guessed(read: GGUFModel) -> str:
    return guessed_type(tensor.tensor_type.name for tensor in read.tensors.values())


def _architecture(model: Path) -> str:
    listed = _read(model / "config.json").get("architectures")
    return str(listed[0]) if isinstance(listed, list) and listed else ""


def _check_guesses(read: GGUFModel) -> None:
    guessed = [key for key in _GUESSED if read.get(key) is not None]
    if guessed:
        raise CheckFailed(
            f"the file has {', '.join(guessed)}, guessed from a folder's name, so its bytes depend"
            " on the path",
            hint="the converter ignored its metadata overrides; check its output",
        )


def _check_count(read: GGUFModel, names: set[str]) -> None:
    merged = {_EXPERT.sub(".experts.", name) for name in names}
    weights = {name for name in merged if not name.endswith(_NOT_WEIGHTS)}
    # A reranker's head are two rows of the matrix for words.
    written = sum(name not in {*_COMPUTED, _RANK_HEAD} for name in read.tensors)
    # A tied head may be stored twice in the checkpoint and once in the file.
    untied = {name for name in weights if not name.endswith("lm_head.weight")}
    if names and written not in {len(weights), len(untied)}:
        raise CheckFailed(
            f"{read.name} has {written} tensors, but the checkpoint has {len(weights)}",
            hint="the converter dropped or added tensors; check its output",
        )


def _check_template(read: GGUFModel, model: Path) -> bool:
    expected = gguf_template(model)
    found = read.get("tokenizer.chat_template")
    if expected is not None and found != expected:
        what = "is missing from" if found is None else "differs in"
        raise CheckFailed(
            f"the checkpoint's chat template {what} the file",
            hint="chat prompts would be rendered wrongly; convert it again",
        )
    return found is not None


def _fallbacks(
    read: GGUFModel, format_name: str, overrides: Mapping[str, str]
) -> list[dict[str, JsonValue]]:
    """Return the tensors whose rows are not a multiple of 256, in formats with blocks of 256."""
    if "_k" not in format_name and not format_name.startswith(("iq", "tq")):
        return []
    return [
        {
            "tensor": name,
            "type": tensor.tensor_type.name,
            "reason": f"rows of {int(tensor.shape[0])} weights are not a multiple of 256",
        }
        for name, tensor in read.tensors.items()
        if len(tensor.shape) > 1
        and int(tensor.shape[0]) % 256
        and (row := TENSOR_TYPES.get(tensor.tensor_type.name.lower()))
        and row.block < 256
        and not any(re.search(pattern, name) for pattern in overrides)
        and (tensor.tensor_type.name not in _FLOATS or int(tensor.shape[0]) % 32)
    ]


def _check_quantized(read: GGUFModel, format_name: str, elements: int) -> None:
    """Refuse a quantized model with matrices in 16 or 32 bits whose rows fit blocks of 32."""
    if file_type(format_name).named_bits >= 16:
        return
    left = {
        name: int(tensor.n_elements)
        for name, tensor in read.tensors.items()
        if len(tensor.shape) > 1
        and name not in _NEVER_QUANTIZED
        and tensor.tensor_type.name in _FLOATS
        and int(tensor.shape[0]) % 32 == 0
    }
    if sum(left.values()) > _UNQUANTIZED_SHARE * elements:
        worst = sorted(left, key=lambda name: -left[name])[:3]
        raise CheckFailed(
            f"{read.name}: {len(left)} matrices were left unquantized, such as {', '.join(worst)}",
            hint="check the quantizer's output",
        )


def _check_finite(read: GGUFModel) -> None:
    import gguf

    def has_infinities(data: np.ndarray, places: Sequence[slice]) -> bool:
        # In parts, because the pages of each count as memory only while it is used.
        step = max(1, _PART // data[0].nbytes) if len(data) else 1
        for start in range(0, len(data), step):
            for place in places:
                bits = np.ascontiguousarray(data[start : start + step, place]).view(np.uint16)
                if ((bits & 0x7C00) == 0x7C00).any():
                    return True
            read.forget_pages()
        return False

    for name, tensor in read.tensors.items():
        kind = tensor.tensor_type.name
        row = TENSOR_TYPES.get(kind.lower())
        if kind == "F16":
            # bfloat16 weights beyond float16's range silently become infinite.
            if has_infinities(tensor.data.reshape(-1, 1), [slice(None)]):
                raise CheckFailed(
                    f"{read.name}: {name} overflows float16",
                    hint="use q8_0, or another format with scales",
                )
        elif row is not None and row.scales:
            size = int(gguf.GGML_QUANT_SIZES[tensor.tensor_type][1])
            scales = [slice(at, at + 2) for at in row.scales]
            if has_infinities(tensor.data.reshape(-1, size), scales):
                raise CheckFailed(
                    f"{read.name}: {name} ({kind}) has NaN or infinite scales",
                    hint="check the merged weights for outliers; quantize again",
                )


def _phantom(piece: str) -> str:
    """Return how a GGUF file has a word piece: what begins a word is marked, not what goes on."""
    return piece.removeprefix("##") if piece.startswith("##") else f"▁{piece}"


_HINT = "text would be tokenized differently than in training; convert it again"


def _check_tokenizer(read: GGUFModel, model: Path) -> int:
    """Return the number of tokens; raise CheckFailed if the tokenizers differ.

    Compares every token and the number of merges with `tokenizer.json`, if there is one, and begin
    and end token with `config.json`. Added tokens may be written with spaces.
    """
    tokens = read.get("tokenizer.ggml.tokens") or []
    embedding = read.tensors.get("token_embd.weight")
    rows = len(tokens) if embedding is None else int(embedding.shape[1])
    if not tokens or len(tokens) != rows:
        raise CheckFailed(
            f"the file has {len(tokens)} tokens but {rows} embedding rows",
            hint="check the checkpoint's tokenizer files",
        )
    if tokenizer := _read(model / "tokenizer.json"):
        vocabulary = tokenizer.get("model", {}).get("vocab", {})
        if isinstance(vocabulary, list):  # Unigram: pairs of token and score
            vocabulary = {pair[0]: number for number, pair in enumerate(vocabulary)}
        added = {int(t["id"]): str(t["content"]) for t in tokenizer.get("added_tokens", ())}
        pieces = tokenizer.get("model", {}).get("type") == "WordPiece"
        plain = [
            (number, _phantom(text) if pieces else text)
            for text, number in vocabulary.items()
            if number not in added
        ]
        for number, text in (*plain, *added.items()):
            there = tokens[number] if number < len(tokens) else text
            same = there == text
            if number in added:
                same = there.replace("▁", " ") == text.replace("▁", " ")
            if not same:
                named = "the added token" if number in added else "token"
                raise CheckFailed(
                    f"{named} {number} is {there!r} in the file, but {text!r} in tokenizer.json",
                    hint=_HINT,
                )
        known, found = tokenizer.get("model", {}).get("merges"), read.get("tokenizer.ggml.merges")
        # A SentencePiece vocabulary has scores instead of merges.
        if known and found is not None and len(found) != len(known):
            raise CheckFailed(
                f"the file has {len(found)} merges, but tokenizer.json {len(known)}", hint=_HINT
            )
    config = _read(model / "config.json")
    ids = {name: read.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    for name, found in ids.items():
        if found is not None and not 0 <= int(found) < len(tokens):
            raise CheckFailed(
                f"the file's {name} token {found} is outside its vocabulary",
                hint="check the checkpoint's config.json and tokenizer files",
            )
    expected = config.get("eos_token_id")
    if ids["eos"] is None and None not in (expected if isinstance(expected, list) else [expected]):
        raise CheckFailed("the file does not have the checkpoint's eos_token_id", hint=_HINT)
    return len(tokens)


def _read(path: Path) -> Mapping[str, Json]:
    try:
        data = parse_file(path, largest=TOKENIZER)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise CheckFailed(f"cannot read {path.name}: {error}", hint=_HINT) from None
    return data if isinstance(data, dict) else {}


def places_of(request: QuantizeRequest) -> tuple[str, ...]:
    """Return where the projector belongs: beside the file of each format; () for none."""
    if "projector" not in request.options:
        return ()
    name = projector_name(f"{request.name}.gguf")
    return tuple(str(each.output / name) for each in (request, *request.siblings))


def check_projector(path: Path) -> dict[str, JsonValue]:
    """Return a projector's facts for the report; raises CheckFailed if a check fails.

    Checks: all tensors are inside the file and nothing follows the last; kind and type; a tensor of
    each layer; float16 weights are finite.
    """
    read = GGUFModel([path])
    for key, wanted in _PROJECTOR.items():
        if (found := read.value(key)) != wanted:
            raise CheckFailed(
                f"{read.name}: {key} is {found!r}, not {wanted!r}",
                hint="check the converter's output",
            )
    _check_guesses(read)
    layers = {name.split(".")[2] for name in read.tensors if name.startswith("v.blk.")}
    count = int(str(read.value("clip.vision.block_count")))
    if layers and len(layers) != count:
        raise CheckFailed(
            f"{read.name} has tensors of {len(layers)} layers, but the vision tower has {count}",
            hint="the converter dropped some; check its output",
        )
    _check_finite(read)
    return {
        "file": path.name,
        "size": path.stat().st_size,
        "type": PROJECTOR_TYPE,
        "tensors": len(read.tensors),
    }
