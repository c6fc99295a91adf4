import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE

from toolchain.errors import CheckFailed, InputRefused, UsageError
from toolchain.quantizers import formats, of_format
from toolchain.quantizers.convert import split_name
from toolchain.quantizers.gguf import check_input, output_file
from toolchain.quantizers.gguf_types import FILE_TYPES
from toolchain.quantizers.quantizer import QuantizeRequest

LLAMA = {"architectures": ["LlamaForCausalLM"]}
TEMPLATE = "{{ messages[0].content }}"
TENSORS = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def request(tmp_path: Path, name: str = "q8_0", **options) -> QuantizeRequest:
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "out").mkdir(exist_ok=True)
    return QuantizeRequest(
        model=tmp_path / "model",
        format=formats()[name],
        output=tmp_path / "out",
        name="demo",
        tools=Path("/opt/llamacpp"),
        python="/usr/bin/python3",
        options=options,
    )


def test_q8_0_is_one_command_of_the_converter(tmp_path):
    asked = request(tmp_path)

    (step,) = of_format("q8_0").steps(asked)

    assert step.argv[:4] == (
        "/usr/bin/python3",
        split_name.__code__.co_filename,
        "/opt/llamacpp/convert/convert_hf_to_gguf.py",
        str(asked.model),
    )
    assert step.argv[4:8] == ("--outfile", str(output_file(asked)), "--outtype", "q8_0")
    assert step.env["PYTHONPATH"] == "/opt/llamacpp/convert:/opt/llamacpp/convert/gguf-py"
    assert step.env["HF_HUB_OFFLINE"] == "1"


WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.mark.parametrize(
    ("name", "before", "by_words", "model"),
    [
        ("gpt-2", [], True, {}),
        ("smollm", [pre_tokenizers.Digits(individual_digits=True)], True, {}),
        ("qwen2", [pre_tokenizers.Split(Regex(WORDS + REST), "isolated")], False, {}),
        ("smaug-bpe", [pre_tokenizers.Split(Regex(WORDS + "{1,3}" + REST), "isolated")], False, {}),
        ("", [pre_tokenizers.Split(Regex(WORDS), "isolated")], False, {}),
        ("", [pre_tokenizers.Split(Regex(WORDS + REST), "removed")], False, {}),
        ("", [], True, {"ignore_merges": True}),
        ("", [], True, {"end_of_word_suffix": "</w>"}),
        ("", [pre_tokenizers.Whitespace()], True, {}),
    ],
)
def test_vocabularies_of_ones_own_are_named_by_their_split(name, before, by_words, model):
    """As the tokenizers library writes them; llama.cpp's tokens were seen to be the same."""
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_words)
    tokenizer = Tokenizer(BPE(vocab={}, merges=[], **model))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, last]) if before else last

    assert split_name(json.loads(tokenizer.to_str())) == name


def test_metadata_from_folder_names_is_switched_off(tmp_path):
    (step,) = of_format("f16").steps(request(tmp_path, "f16"))

    (path, text) = next(iter(step.writes.items()))
    assert step.argv[-2:] == ("--metadata", str(path))
    assert path in step.removes
    assert all(value is None for value in json.loads(text).values())
    assert "general.basename" in json.loads(text)


def test_k_quants_go_through_a_file_that_is_removed(tmp_path):
    asked = request(tmp_path, "q4_k_m", threads=2)

    first, quantize = of_format("q4_k_m").steps(asked)

    middle = Path(first.argv[first.argv.index("--outfile") + 1])
    assert quantize.argv == (
        "/opt/llamacpp/bin/llama-quantize",
        str(middle),
        str(output_file(asked)),
        "Q4_K_M",
        "2",
    )
    assert quantize.removes == (middle,)


@pytest.mark.parametrize(
    ("dtype", "kind"), [("bfloat16", "bf16"), ("float16", "f16"), ("float32", "f32"), (None, "f16")]
)
def test_the_file_between_rounds_nothing(tmp_path, dtype, kind):
    asked = request(tmp_path, "q5_k_m")
    (asked.model / "config.json").write_text(json.dumps({**LLAMA, "torch_dtype": dtype}))

    convert, _ = of_format("q5_k_m").steps(asked)

    assert convert.argv[convert.argv.index("--outtype") + 1] == kind


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "lacks architectures"),
        ({"architectures": ["T5"], "is_encoder_decoder": True}, "decoder"),
        ({**LLAMA, "quantization_config": {"quant_method": "awq"}}, r"already quantized \(awq\)"),
    ],
)
def test_bad_input_is_refused_from_its_config_alone(config, says):
    with pytest.raises(InputRefused, match=says):
        check_input(config)


def test_good_input_is_not_refused():
    check_input(LLAMA)


def test_peak_disk_counts_the_file_between():
    peak = of_format("q4_k_m").peak_disk

    assert peak(16 << 30, 0, formats()["q4_k_m"]) > (16 << 30) + (4 << 30)
    assert peak(16 << 30, 0, formats()["q8_0"]) < 16 << 30


def write_gguf(
    path: Path, *, file_type=7, template=TEMPLATE, tokens=32, names=None, basename=None
) -> None:
    writer = GGUFWriter(path, "llama")
    if basename:
        writer.add_basename(basename)
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(tokens)])
    if template:
        writer.add_chat_template(template)
    for name in names or ("token_embd.weight", "output_norm.weight", "output.weight"):
        if name == "output_norm.weight":
            writer.add_tensor(name, np.ones(64, dtype=np.float32))
        elif file_type == 1:
            writer.add_tensor(name, np.zeros((32, 64), dtype=np.float16))
        else:
            rows = np.zeros((32, 64 // 32 * 34), dtype=np.uint8)
            writer.add_tensor(name, rows, raw_dtype=GGMLQuantizationType.Q8_0)
    finish(writer)


def finish(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_checkpoint(model: Path, *, names=TENSORS, template=TEMPLATE) -> None:
    header = {name: {"dtype": "F16", "shape": [0], "data_offsets": [0, 0]} for name in names}
    blob = json.dumps(header).encode()
    (model / "model.safetensors").write_bytes(len(blob).to_bytes(8, "little") + blob)
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))


@pytest.fixture
def asked(tmp_path):
    made = request(tmp_path)
    write_checkpoint(made.model)
    return made


def check(made: QuantizeRequest):
    return of_format(made.format.name).check(made)


def test_a_good_file_is_described(asked):
    write_gguf(output_file(asked))

    facts = check(asked)

    assert facts["types"] == {"F32": 1, "Q8_0": 2}
    assert facts["tokens"] == 32
    # (2 x 32 x 64 x 8.5 + 64 x 32) bits / (2 x 32 x 64 + 64) elements
    assert facts["bits_per_weight"] == round((4096 * 8.5 + 64 * 32) / 4160, 3)
    assert facts["warnings"] == []


def test_a_cut_file_is_refused(asked):
    path = output_file(asked)
    write_gguf(path)
    path.write_bytes(path.read_bytes()[:-100])

    with pytest.raises(CheckFailed, match=r"whole GGUF|bytes"):
        check(asked)


def test_an_empty_or_missing_file_is_refused(asked):
    with pytest.raises(CheckFailed):
        check(asked)
    output_file(asked).write_bytes(b"")
    with pytest.raises(CheckFailed):
        check(asked)


def test_bytes_after_the_last_tensor_are_refused(asked):
    path = output_file(asked)
    write_gguf(path)
    path.write_bytes(path.read_bytes() + b"x" * 5000)

    with pytest.raises(CheckFailed, match="tensors end at"):
        check(asked)


def test_another_file_type_is_refused(asked):
    write_gguf(output_file(asked), file_type=1)

    with pytest.raises(CheckFailed, match="file type 1"):
        check(asked)


def test_metadata_guessed_from_a_folder_is_refused(asked):
    write_gguf(output_file(asked), basename="tmp")

    with pytest.raises(CheckFailed, match=r"general\.basename"):
        check(asked)


def test_a_missing_tensor_is_refused(asked):
    write_checkpoint(asked.model, names=(*TENSORS, "model.layers.0.mlp.up_proj.weight"))
    write_gguf(output_file(asked), names=("token_embd.weight", "output_norm.weight"))

    with pytest.raises(CheckFailed, match="holds 2 tensors, the checkpoint 4"):
        check(asked)


def test_a_tied_output_may_be_stored_once(asked):
    write_gguf(output_file(asked), names=("token_embd.weight", "output_norm.weight"))

    assert check(asked)["tensors"] == 2


def test_another_chat_template_is_refused(asked):
    write_gguf(output_file(asked), template="{{ 'other' }}")

    with pytest.raises(CheckFailed, match="another chat template"):
        check(asked)


def test_a_lost_chat_template_is_refused(asked):
    write_gguf(output_file(asked), template=None)

    with pytest.raises(CheckFailed, match="lacks the checkpoint's chat template"):
        check(asked)


def test_a_template_file_wins_over_the_tokenizers(asked):
    (asked.model / "chat_template.jinja").write_text("{{ 'file' }}")
    write_gguf(output_file(asked), template="{{ 'file' }}")

    assert check(asked)["chat_template"] is True


def test_a_checkpoint_without_a_template_is_a_warning(asked):
    (asked.model / "tokenizer_config.json").unlink()
    write_gguf(output_file(asked), template=None)

    assert "chat template" in check(asked)["warnings"][0]


def test_tokens_must_match_the_embedding(asked):
    write_gguf(output_file(asked), tokens=31)

    with pytest.raises(CheckFailed, match="31 tokens and 32 embedding rows"):
        check(asked)


def test_weights_beyond_float16_are_refused(tmp_path):
    made = request(tmp_path, "f16")
    write_checkpoint(made.model)
    write_gguf(output_file(made), file_type=1)
    assert check(made)["types"]["F16"] == 2
    blob = bytearray(output_file(made).read_bytes())
    blob[-64:-62] = b"\x00\x7c"  # infinity, inside the last tensor
    output_file(made).write_bytes(blob)

    with pytest.raises(CheckFailed, match="beyond float16"):
        check(made)


def chosen(name, **wanted):
    return of_format(name).options(formats()[name], wanted)


@pytest.mark.parametrize("name", ["q2_k", "q3_k_m", "iq1_s", "iq2_xxs", "iq3_m", "tq1_0"])
def test_low_bits_need_to_be_asked_for(name):
    with pytest.raises(UsageError, match="few erase"):
        chosen(name)

    assert chosen(name, allow_low_bits=True)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("q4_k_m", "auto"), ("iq4_xs", "auto"), ("q5_k_m", "off"), ("q8_0", "off"), ("f16", "off")],
)
def test_an_importance_matrix_is_made_below_five_bits(name, mode):
    assert chosen(name)["imatrix"] == mode
    assert of_format(name).calibrated(formats()[name], chosen(name)) == (mode == "auto")


def test_the_user_decides_about_the_importance_matrix():
    assert chosen("q4_k_m", imatrix="off")["imatrix"] == "off"
    assert chosen("q5_k_m", imatrix="auto")["imatrix"] == "auto"
    assert chosen("q4_k_m", imatrix="mine.gguf")["imatrix"] == "mine.gguf"
    with pytest.raises(UsageError, match="no iq2_xxs without an importance matrix"):
        chosen("iq2_xxs", allow_low_bits=True, imatrix="off")


def test_types_of_single_tensors_are_checked():
    assert chosen("q4_k_m", tensor_types={"attn_v": "Q8_0"})["tensor_types"] == {"attn_v": "q8_0"}
    for types in ({"attn_v": "q9"}, {"attn v": "q8_0"}, {"(": "q8_0"}):
        with pytest.raises(UsageError, match="tensor_types"):
            chosen("q4_k_m", tensor_types=types)
    with pytest.raises(UsageError, match="one type for all tensors"):
        chosen("q8_0", tensor_types={"attn_v": "q6_k"})


def with_text(made: QuantizeRequest, tokens: int = 3000) -> QuantizeRequest:
    path = made.output / ".calibration.jsonl"
    path.write_text(json.dumps({"text": "some text", "tokens": tokens}) + "\n")
    return replace(made, calibration=path)


def test_the_matrix_is_measured_between_and_its_digest_written(tmp_path):
    made = with_text(request(tmp_path, "q4_k_m", imatrix="auto"))

    convert, measure, quantize = of_format("q4_k_m").steps(made)

    assert (
        measure.argv[measure.argv.index("-m") + 1]
        == convert.argv[convert.argv.index("--outfile") + 1]
    )
    assert measure.env["WEIGHTSMITH_CPU_VARIANT"] in {"x86-64-v3", "armv8-a"}
    assert quantize.argv[quantize.argv.index("--imatrix") + 1] == "imatrix.gguf"
    assert quantize.digests == {"imatrix": made.output / "imatrix.gguf"}
    assert "weightsmith.imatrix.digest=str:sha256:{imatrix}" in quantize.argv


def test_what_was_measured_before_is_not_measured_again(tmp_path):
    made = replace(request(tmp_path, "q4_k_m", imatrix="auto"), measured=True)

    _, quantize = of_format("q4_k_m").steps(made)

    assert "--imatrix" in quantize.argv


def test_too_few_calibration_tokens_are_reported_with_numbers(tmp_path):
    made = with_text(request(tmp_path, "q4_k_m", imatrix="auto"), tokens=100)

    with pytest.raises(InputRefused, match=r"1 calibration texts have 100 tokens.*at least 256"):
        of_format("q4_k_m").steps(made)


def test_a_split_file_is_split_by_what_it_becomes(tmp_path):
    made = request(tmp_path, "q4_k_m", imatrix="off", split_max_size="1G")

    convert, quantize = of_format("q4_k_m").steps(made)

    size = convert.argv[convert.argv.index("--split-max-size") + 1]
    assert 1000 < int(size.removesuffix("M")) < 1000 * 16 / 4.9
    assert "--keep-split" in quantize.argv
    assert quantize.finds == {"first": ".demo.f16*.gguf"}
    assert {path.name for path in quantize.removes} == {".demo.f16.gguf", ".demo.f16-*.gguf"}


def test_origin_and_licence_go_into_the_file(tmp_path):
    about = {"base_models": [{"name": "base", "repo_url": "https://x"}], "license": "mit"}

    convert, quantize = of_format("q4_k_m").steps(request(tmp_path, "q4_k_m", about=about))

    (text,) = convert.writes.values()
    assert json.loads(text)["general.base_models"] == about["base_models"]
    assert "general.license=str:mit" in quantize.argv


def test_every_type_has_its_number_and_can_be_read_back():
    known = {kind.name.partition("_")[2].lower(): int(kind) for kind in LlamaFileType}

    assert {name: known[name] for name in FILE_TYPES} == FILE_TYPES
    assert FILE_TYPES.keys() == {format_.name for format_ in of_format("q4_k_m").formats}


def test_an_architecture_that_the_converter_lacks_is_refused():
    with pytest.raises(InputRefused, match="converts no MambaVisionForever"):
        check_input({"architectures": ["MambaVisionForever"]})


def test_a_matrix_left_unquantized_is_refused(asked):
    writer = GGUFWriter(output_file(asked), "llama")
    writer.add_file_type(7)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(32)])
    writer.add_chat_template(TEMPLATE)
    writer.add_tensor("token_embd.weight", np.zeros((32, 64), np.float16))
    writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
    finish(writer)

    with pytest.raises(CheckFailed, match=r"left unquantized, such as token_embd\.weight"):
        check(asked)


def test_scales_that_are_no_numbers_are_refused(asked):
    path = output_file(asked)
    write_gguf(path)
    blob = bytearray(path.read_bytes())
    blob[-34:-32] = b"\x00\x7e"  # not a number, the scale of the last block
    path.write_bytes(blob)

    with pytest.raises(CheckFailed, match=r"\(Q8_0\) has scales that are no finite numbers"):
        check(asked)


def test_fallbacks_are_listed_with_their_reason(tmp_path):
    made = request(tmp_path, "q4_k_m")
    write_checkpoint(made.model)
    write_gguf(output_file(made), file_type=15)

    facts = check(made)

    assert facts["fallbacks"][0] == {
        "tensor": "token_embd.weight",
        "type": "Q8_0",
        "reason": "rows of 64 weights are no multiple of 256",
    }
    assert "2 of 3 tensors have rows" in facts["warnings"][0]


def tokenizer(made: QuantizeRequest, *, tokens=32, other=None, merges=()):
    vocab = {f"t{i}": i for i in range(tokens)}
    if other is not None:
        vocab = {("wrong" if i == other else t): i for t, i in vocab.items()}
    told = {"model": {"vocab": vocab, "merges": list(merges)}, "added_tokens": []}
    (made.model / "tokenizer.json").write_text(json.dumps(told))


def test_the_checkpoints_tokens_pass(asked):
    tokenizer(asked)
    write_gguf(output_file(asked))

    assert check(asked)["tokens"] == 32


def test_another_token_is_refused(asked):
    tokenizer(asked, other=7)
    write_gguf(output_file(asked))

    with pytest.raises(CheckFailed, match="token 7 is 't7' in the file and 'wrong'"):
        check(asked)


def test_parts_of_one_model_are_read_together(asked):
    for number, names in enumerate(
        (("token_embd.weight", "output.weight"), ("output_norm.weight",))
    ):
        write_gguf(asked.output / f"demo-0000{number + 1}-of-00002.gguf", names=names)

    facts = check(asked)

    assert facts["tensors"] == 3
    assert len(facts["files"]) == 2
    (asked.output / "demo-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckFailed, match="not all parts"):
        check(asked)
