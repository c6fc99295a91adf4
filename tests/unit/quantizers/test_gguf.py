"""GGUF files by llama.cpp: the commands that make them, and what is refused beforehand."""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
from gguf import LlamaFileType
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from weightsmith.core.errors import InputRefused, UsageError
from weightsmith.quantizers import formats, of_format
from weightsmith.quantizers.gguf import check_input, output_file
from weightsmith.quantizers.gguf_pass import PassSettings
from weightsmith.quantizers.gguf_split import split_name
from weightsmith.quantizers.gguf_types import FILE_TYPES, TENSOR_TYPES

from tests.fakes.configs import facts
from tests.unit.quantizers.conftest import request

LLAMA = {"architectures": ["LlamaForCausalLM"]}


def test_parts_of_a_type_of_the_converter_are_its_own(tmp_path):
    asked = request(tmp_path, split_max_size="1G")

    (step,) = of_format("q8_0").steps(asked)

    assert step.argv[:5] == (
        "/usr/bin/python3",
        *("-m", "weightsmith.worker.convert_gguf"),
        "/opt/llamacpp/convert/convert_hf_to_gguf.py",
        str(asked.model),
    )
    assert step.argv[5:7] == ("--split-max-size", "1G")
    assert step.argv[-4:] == ("--outfile", str(output_file(asked)), "--outtype", "q8_0")
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


@pytest.mark.parametrize(
    ("count", "splits", "refused"),
    [
        (10, pre_tokenizers.Whitespace(), True),
        (10, pre_tokenizers.ByteLevel(add_prefix_space=False), False),
        (20_000, pre_tokenizers.Whitespace(), False),  # may be one whose hash is known
    ],
)
def test_a_tokenizer_that_llamacpp_cannot_know_is_refused_by_its_files(
    tmp_path, count, splits, refused
):
    tokenizer = Tokenizer(BPE(vocab={str(n): n for n in range(count)}, merges=[]))
    tokenizer.pre_tokenizer = splits
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    check = of_format("q4_k_m").check_files

    with pytest.raises(InputRefused, match="does not know how") if refused else nullcontext():
        check(tmp_path, facts(LLAMA))
    check(tmp_path, facts({"architectures": ["RwkvForCausalLM"]}))  # has a converter of its own
    (tmp_path / "tokenizer.model").touch()
    check(tmp_path, facts(LLAMA))


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("q8_0", {}),
        ("q8_0", {"split_max_size": "1G"}),
        ("q4_k_m", {}),
        ("q4_k_m", {"split_max_size": "1G"}),
        ("q4_k_m", {"imatrix": "auto"}),
        ("q4_k_m", {"imatrix": "auto", "split_max_size": "1G"}),
    ],
)
def test_the_first_step_makes_the_projector_of_a_model_that_sees(tmp_path, name, more):
    """And no other: it is the one that reads the model's weights."""
    asked = with_text(request(tmp_path, name, projector="f16", **more))
    wanted = str(asked.output / f"mmproj-{asked.name}.gguf")

    first, *others = of_format(name).steps(asked)
    told = [*first.argv, *first.writes.values()]
    assert any(wanted in words for words in told)
    assert not [words for step in others for words in (*step.argv, *step.writes.values())
                if wanted in words]  # fmt: skip
    blind = of_format(name).steps(replace(asked, options=more))
    assert not any("mmproj" in words for step in blind for words in step.argv)


def test_shared_layers_are_measured_on_the_base_by_our_walk(tmp_path):
    of = of_format("q4_k_m")
    chosen = {n: of.options(formats()[n], {"shared_layers": True}) for n in ("q4_k_m", "q5_k_m")}
    asked = replace(request(tmp_path, "q4_k_m", **chosen["q4_k_m"]), measured_on=tmp_path / "base")
    (step,) = of.steps(with_text(asked))

    assert chosen["q4_k_m"] == {"imatrix": "walk", "shared_layers": True}
    assert chosen["q5_k_m"] == {"imatrix": "off", "shared_layers": True}
    assert settings(step).by_kind
    assert settings(step).walk.model == str(tmp_path / "base")


@pytest.mark.parametrize("more", [{"imatrix": "auto"}, {"split_max_size": "1G"}])
def test_what_would_undo_shared_layers_is_refused(more):
    with pytest.raises(UsageError, match="exclude each other"):
        of_format("q4_k_m").options(formats()["q4_k_m"], {"shared_layers": True, **more})


def settings(step):
    """What the program that quantizes is given."""
    return PassSettings.from_json(json.loads(step.writes[Path(step.argv[-1])]))


@pytest.mark.parametrize(
    ("first", "other", "joined"),
    [
        (("q4_k_m", {"imatrix": "off"}), ("q5_k_m", {"imatrix": "off"}), True),
        (("q4_k_m", {"imatrix": "auto"}), ("q5_k_m", {"imatrix": "off"}), True),
        (("q5_k_m", {"imatrix": "off"}), ("q4_k_m", {"imatrix": "auto"}), False),
        (("q4_k_m", {"imatrix": "sha256:a"}), ("q3_k_m", {"imatrix": "sha256:a"}), True),
        (("q4_k_m", {"imatrix": "sha256:a"}), ("q3_k_m", {"imatrix": "sha256:b"}), False),
        (("q4_k_m", {"imatrix": "auto"}), ("q8_0", {"imatrix": "off"}), True),
        (("f16", {"imatrix": "off"}), ("q8_0", {"imatrix": "off"}), True),
        (("q4_k_m", {"imatrix": "off", "split_max_size": "1G"}), ("q5_k_m", {}), False),
        (("f16", {"imatrix": "off", "shared_layers": True}), ("q8_0", {"imatrix": "off"}), False),
    ],
)
def test_what_one_pass_can_make_together(first, other, joined):
    (name, options), (another, others) = first, other
    joins = of_format(name).one_pass

    assert joins(formats()[name], options, formats()[another], others) is joined


@pytest.mark.parametrize(
    ("dtype", "kind"), [("bfloat16", "bf16"), ("float16", "f16"), ("float32", "f32"), (None, "f16")]
)
def test_k_quants_are_made_in_one_step_and_the_file_between_rounds_nothing(tmp_path, dtype, kind):
    asked = request(tmp_path, "q5_k_m", threads=2)
    (asked.model / "config.json").write_text(json.dumps({**LLAMA, "torch_dtype": dtype}))

    (step,) = of_format("q5_k_m").steps(asked)

    made = settings(step)
    assert (made.between, Path(made.middle).name) == (kind, f".demo.{kind}.gguf")
    assert step.argv[1:3] == ("-m", "weightsmith.worker.quantize_gguf")
    assert made.convert[:2] == ("/opt/llamacpp/convert/convert_hf_to_gguf.py", str(asked.model))
    (file,) = made.files
    assert (file.out, file.format, made.threads) == (str(output_file(asked)), "q5_k_m", 2)
    assert (file.importance, made.split) == ("", False)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "no architectures"),
        ({"architectures": ["MambaVisionForever"]}, "MambaVisionForever"),
        ({"architectures": ["T5"], "is_encoder_decoder": True}, "decoder"),
        ({**LLAMA, "quantization_config": {"quant_method": "awq"}}, r"already quantized \(awq\)"),
    ],
)
def test_bad_input_is_refused_from_its_config_alone(config, says):
    with pytest.raises(InputRefused, match=says):
        check_input(facts(config))


def test_rows_that_llamacpp_gives_no_other_type_are_refused_from_their_width():
    """It refuses Q1_0 for rows that are no whole blocks; gguf's own table has the block."""
    block = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q1_0][0]
    sizes = {"num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 32}

    def check(name, hidden, inner):
        model = facts({**LLAMA, **sizes, "hidden_size": hidden, "intermediate_size": inner})
        of_format(name).check_input(formats()[name], model)

    check("q1_0", 2 * block, 3 * block)
    check("tq1_0", 96, 160)
    for widths in ((96, block), (block, 160)):
        with pytest.raises(InputRefused, match=r"blocks of 128 weights.* (96|160) inputs"):
            check("q1_0", *widths)


def test_peak_disk_counts_the_file_that_importance_is_measured_on():
    peak = of_format("q4_k_m").peak_disk

    assert peak(16 << 30, 0, formats()["q4_k_m"], {"imatrix": "auto"}) > (16 << 30) + (4 << 30)
    for options in ({"imatrix": "off"}, {"imatrix": "mine.gguf"}):
        assert peak(16 << 30, 0, formats()["q4_k_m"], options) < 8 << 30


def chosen(name, **wanted):
    return of_format(name).options(formats()[name], wanted)


@pytest.mark.parametrize("name", ["q2_k", "q3_k_m", "iq1_s", "iq2_xxs", "iq3_m", "tq1_0"])
def test_low_bits_need_to_be_asked_for(name):
    with pytest.raises(UsageError, match="too few to preserve"):
        chosen(name)

    assert chosen(name, allow_low_bits=True)


@pytest.mark.parametrize(
    ("name", "mode"),
    [("q4_k_m", "auto"), ("iq4_xs", "auto"), ("q5_k_m", "off"), ("q8_0", "off"), ("f16", "off")],
)
def test_an_importance_matrix_is_made_below_five_bits_unless_the_user_decides(name, mode):
    assert chosen(name)["imatrix"] == mode
    assert of_format(name).calibrated(formats()[name], chosen(name)) == (mode == "auto")
    for asked in ("off", "auto", "mine.gguf") if name in ("q4_k_m", "q5_k_m") else ():
        assert chosen(name, imatrix=asked)["imatrix"] == asked
    with pytest.raises(UsageError, match="iq2_xxs needs an importance matrix"):
        chosen("iq2_xxs", allow_low_bits=True, imatrix="off")


def test_types_of_single_tensors_are_checked():
    assert chosen("q4_k_m", tensor_types={"attn_v": "Q8_0"})["tensor_types"] == {"attn_v": "q8_0"}
    for types in ({"attn_v": "q9"}, {"attn v": "q8_0"}):
        with pytest.raises(UsageError, match="tensor_types"):
            chosen("q4_k_m", tensor_types=types)
    with pytest.raises(UsageError, match="one type for all tensors"):
        chosen("q8_0", tensor_types={"attn_v": "q6_k"})


def with_text(made, tokens=3000):
    path = made.output / ".calibration.jsonl"
    path.write_text(json.dumps({"text": "some text", "tokens": tokens}) + "\n")
    return replace(made, calibration=path)


def test_a_matrix_is_measured_on_a_file_that_is_then_quantized_and_removed(tmp_path):
    made = with_text(request(tmp_path, "q4_k_m", imatrix="auto"))
    (alone,) = of_format("q4_k_m").steps(replace(made, measured=True))
    assert settings(alone).files[0].importance == "imatrix.gguf"
    assert settings(alone).convert

    convert, measure, quantize = of_format("q4_k_m").steps(made)

    (written,) = settings(convert).files
    assert (written.format, written.direct, settings(convert).middle) == ("f16", True, "")
    assert measure.argv[measure.argv.index("-m") + 1] == written.out == settings(quantize).middle
    assert Path(written.out) not in convert.removes
    assert measure.env["WEIGHTSMITH_CPU_VARIANT"] in {"x86-64-v3", "armv8-a"}
    assert settings(quantize).files[0].importance == "imatrix.gguf"
    assert settings(quantize).convert == ()
    assert Path(settings(quantize).middle) in quantize.removes


def test_a_finished_measurement_is_known_again_when_other_cpus_are_idle(tmp_path, monkeypatch):
    """Its command is what a resumed run compares; by then the 16-bit file may be deleted."""
    made = with_text(request(tmp_path, "q4_k_m", imatrix="auto"))

    def measure(idle):
        monkeypatch.setattr("weightsmith.quantizers.gguf.idle", lambda: idle)
        return of_format("q4_k_m").steps(made)[1]

    few, many = measure(1), measure(64)

    assert few.argv == many.argv
    assert (few.env["LLAMA_ARG_THREADS"], many.env["LLAMA_ARG_THREADS"]) == ("1", "64")


def test_too_few_calibration_tokens_are_reported_with_numbers(tmp_path):
    made = with_text(request(tmp_path, "q4_k_m", imatrix="auto"), tokens=100)

    with pytest.raises(InputRefused, match=r"have 100 tokens.*at least 256"):
        of_format("q4_k_m").steps(made)


def test_a_split_file_is_split_by_what_it_becomes(tmp_path):
    made = request(tmp_path, "q4_k_m", imatrix="off", split_max_size="1G")

    (step,) = of_format("q4_k_m").steps(made)

    words = settings(step).convert
    size = words[words.index("--split-max-size") + 1]
    assert 1000 < int(size.removesuffix("M")) < 1000 * 16 / 4.9
    assert settings(step).split
    assert {".demo.f16.gguf", ".demo.f16-*.gguf"} <= {path.name for path in step.removes}
    made = with_text(request(tmp_path, "q4_k_m", imatrix="auto", split_max_size="1G"))
    convert, measure, _ = of_format("q4_k_m").steps(made)
    assert convert.argv[1:3] == ("-m", "weightsmith.worker.convert_gguf")  # its own parts
    assert measure.argv[measure.argv.index("-m") + 1] == "{first}"


def test_origin_and_licence_go_into_the_file_and_the_folders_name_does_not(tmp_path):
    about = {"base_models": [{"name": "base", "repo_url": "https://x"}], "license": "mit"}

    (step,) = of_format("q4_k_m").steps(request(tmp_path, "q4_k_m", about=about))

    ((path, text),) = (one for one in step.writes.items() if one[0].name.endswith("metadata.json"))
    told = json.loads(text)
    assert told["general.base_models"] == about["base_models"]
    assert told["general.basename"] is None
    assert settings(step).files[0].overrides == {"general.license": "mit"}
    assert settings(step).convert[-2:] == ("--metadata", str(path))
    assert path in step.removes


def test_every_type_has_its_number_and_can_be_read_back():
    known = {kind.name.partition("_")[2].lower(): int(kind) for kind in LlamaFileType}

    assert {n: known[n] for n in FILE_TYPES} == {n: row.number for n, row in FILE_TYPES.items()}
    assert {*FILE_TYPES, "mix"} == {format_.name for format_ in of_format("q4_k_m").formats}
    sizes = {kind.name.lower(): size[0] for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {n: sizes[n] for n in TENSOR_TYPES} == {n: row.block for n, row in TENSOR_TYPES.items()}


def test_a_language_model_is_known_by_its_own_class():
    """SmolVLM's configuration names it, and the converter reads no other name."""
    sees = {"architectures": ["SmolVLMForConditionalGeneration"]}
    check_input(facts({**sees, "text_config": {"architectures": ["VLlama3ForCausalLM"]}}))
    with pytest.raises(InputRefused, match="does not support SmolVLMForConditionalGeneration"):
        check_input(facts(sees))
    with pytest.raises(InputRefused, match="does not support OtherModel"):
        check_input(facts({**LLAMA, "text_config": {"architectures": ["OtherModel"]}}))
    whole = {"architectures": ["Exaone4_5_ForConditionalGeneration"]}
    check_input(facts({**whole, "text_config": {"architectures": ["OtherModel"]}}))
