"""llama.cpp's converter: towers that it cannot read, and tokenizers without their files.

The SentencePiece model out of a tokenizer.json cuts texts as the one that it was made from.
"""

import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram
from tokenizers.trainers import BpeTrainer
from weightsmith.core import time_limits
from weightsmith.core.errors import InputRefused
from weightsmith.models.templates import TemplateOverLimit
from weightsmith.quantizers import convert
from weightsmith.quantizers.convert import sentence_pieces, with_pieces

from tests.fakes.sentence_pieces import TEXT, TURNS, save, train
from tests.paths import ROOT


@pytest.fixture
def written(tmp_path):
    """Run a converter that ends with an error; return what is left of the projector."""

    def write(error, allow_text_only=True):
        converter = tmp_path / "convert.py"
        converter.write_text(
            "import pathlib, sys\n"
            "pathlib.Path(sys.argv[sys.argv.index('--outfile') + 1]).write_text('half')\n"
            f"raise {error}\n"
        )
        place = tmp_path / "mmproj-demo.gguf"
        convert._write_projector(converter, tmp_path, [], [place], allow_text_only=allow_text_only)
        return [path.name for path in tmp_path.glob("*.gguf")]

    return write


@pytest.mark.parametrize("error", ["ValueError('no such tower')", "SystemExit(1)"])
def test_without_a_way_to_convert_it_there_is_no_projector(written, error, tmp_path):
    assert written(error) == []
    with pytest.raises(InputRefused, match="cannot convert the vision tower") as caught:
        written(error, allow_text_only=False)
    assert "quantize.allow_text_only" in caught.value.hint
    assert list(tmp_path.glob("*.gguf")) == []


@pytest.mark.parametrize(
    "error",
    [
        "RuntimeError('[enforce fail] DefaultCPUAllocator: can\\'t allocate memory')",
        "MemoryError()",
        "OSError(28, 'No space left on device')",
    ],
)
def test_a_lack_of_memory_or_disk_is_no_such_reason(written, error):
    """Else a file without a projector would be stored, and found again on a larger machine."""
    with pytest.raises((RuntimeError, MemoryError, OSError)):
        written(error)


def test_a_stored_projector_is_not_written_again(written, tmp_path):
    """All formats of a pass share one; a killed run may have stored only some of them."""
    stored = tmp_path / "stored"
    stored.write_text("whole")
    (tmp_path / "mmproj-demo.gguf").hardlink_to(stored)

    written("ValueError('no such tower')")

    assert stored.read_text() == "whole"


def test_a_model_without_a_tokenizer_is_refused_by_name(tmp_path):
    """transformers' own error has several lines, and none of them says what is missing."""
    converter = tmp_path / "convert.py"
    converter.write_text("raise ValueError('Couldn\\'t instantiate:\\n(1) a file\\n(2) another')\n")
    (tmp_path / "tokenizer_config.json").write_text("{}")

    with pytest.raises(InputRefused, match=f"{tmp_path} has no tokenizer"):
        convert._convert_text(converter, tmp_path, [])
    (tmp_path / "tokenizer.json").write_text("{}")  # beside one, it is the converter's own failure
    with pytest.raises(ValueError, match="Couldn't instantiate"):
        convert._convert_text(converter, tmp_path, [])


LOOPS = "{% for _ in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.mark.parametrize(
    ("template", "added"),
    [
        ("{{ bos_token }}{{ messages[0].content }}", {"bos": False, "eos": False}),
        ("{{ raise_exception('no system message') }}", {}),
        (LOOPS, None),
    ],
    ids=["written", "refused", "endless"],
)
def test_what_a_file_says_does_not_depend_on_the_machines_limits(
    template, added, tmp_path, monkeypatch
):
    """A refusal is the same everywhere; a template without an end is an error, not a file."""
    monkeypatch.setattr(time_limits, "FOREIGN_SECONDS", 0.3)
    model = shutil.copytree(ROOT / "examples" / "tiny" / "base", tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)

    if added is None:
        with pytest.raises(TemplateOverLimit, match="CPU time"):
            convert.added_tokens(model)
    else:
        assert convert.added_tokens(model) == added


@pytest.fixture(scope="module", params=["llama", "gemma"])
def pair(request, tmp_path_factory):
    """An original, and the one that is made out of what transformers writes of it."""
    original = train(request.param)
    told = save(original, request.param, tmp_path_factory.mktemp("tokenizer"))
    return original, SentencePieceProcessor(model_proto=sentence_pieces(told))


def test_every_piece_has_its_number_and_kind(pair):
    original, made = pair
    kinds = ("is_unknown", "is_control", "is_byte")
    for number in range(original.get_piece_size()):
        text = original.id_to_piece(number)
        assert made.id_to_piece(number) == text
        if text not in (*TURNS, "<mask>"):  # special tokens that the original learnt as text
            assert [getattr(made, k)(number) for k in kinds] == [
                getattr(original, k)(number) for k in kinds
            ]
    assert made.get_piece_size() == original.get_piece_size()


def test_our_documentation_is_cut_the_same(pair):
    original, made = pair
    for line in TEXT.read_text("utf-8").splitlines():
        assert made.encode(line) == original.encode(line)


@given(text=st.text(alphabet=st.sampled_from("the merges of a ▁ ü日\t\n12"), max_size=60))
def test_any_text_is_cut_the_same(pair, text):
    original, made = pair
    assert made.encode(text) == original.encode(text)


def test_byte_pairs_that_are_learnt_as_pairs_are_refused():
    """Such a tokenizer joins by pairs: llama.cpp would join any neighbours that make a piece."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", byte_fallback=True))
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    lines = [line.replace(" ", "▁") for line in TEXT.read_text("utf-8").splitlines()]
    trainer = BpeTrainer(vocab_size=700, special_tokens=["<unk>", *bytes_], show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    with pytest.raises(NotImplementedError, match=r"not a SentencePiece model: '.*' is a piece"):
        sentence_pieces(json.loads(tokenizer.to_str()))


def test_the_converter_gets_what_it_misses_and_the_model_stays_as_it_is(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    told = save(train("gemma"), "gemma", model)
    (model / "model.safetensors").write_bytes(b"weights")
    before = {path.name: path.read_bytes() for path in model.iterdir()}

    with with_pieces(model) as view:
        assert view.name == "model"
        assert (view / "model.safetensors").read_bytes() == b"weights"
        assert SentencePieceProcessor(model_file=str(view / "tokenizer.model")).get_piece_size()
        config = json.loads((view / "tokenizer_config.json").read_text("utf-8"))
        added = {int(k): v["content"] for k, v in config.pop("added_tokens_decoder").items()}
        assert added == {t["id"]: t["content"] for t in told["added_tokens"]}
        assert set(TURNS) <= set(added.values())
        assert config == json.loads(before["tokenizer_config.json"])

    assert not view.exists()
    assert {path.name: path.read_bytes() for path in model.iterdir()} == before


def test_a_model_that_lacks_nothing_is_read_where_it_is():
    model = ROOT / "examples" / "tiny" / "base"
    with with_pieces(model) as view:  # bytes are its characters: no pieces
        assert view == model


BLANKS = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
MAP = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}


@pytest.fixture
def unigram(tmp_path):
    """Write an XLM-RoBERTa's vocabulary with a normalizer; return the folder."""

    def write(normalizer, **more):
        config = {"architectures": ["XLMRobertaForSequenceClassification"], **more}
        told = {"model": {"type": "Unigram", "vocab": []}, "normalizer": normalizer}
        told["pre_tokenizer"] = {"pretokenizers": [{"type": "WhitespaceSplit"}]}
        (tmp_path / "config.json").write_text(json.dumps(config))
        (tmp_path / "tokenizer.json").write_text(json.dumps(told))
        return tmp_path

    return write


def mapped(view):
    told = json.loads((view / "tokenizer.json").read_text())
    config = json.loads((view / "tokenizer_config.json").read_text())
    assert config["clean_up_tokenization_spaces"] is True
    assert told["normalizer"]["type"] == "Precompiled"
    return told["normalizer"]["precompiled_charsmap"]


@pytest.mark.parametrize(
    "whole",
    [MAP, *({"type": "Sequence", "normalizers": s} for s in ([MAP], [MAP, BLANKS], [BLANKS, MAP]))],
)
def test_a_map_of_characters_is_put_where_the_converter_looks(unigram, whole):
    with with_pieces(unigram(whole)) as view:
        assert mapped(view) == "AAAA"


@pytest.mark.parametrize("none", [None, {"type": "Sequence", "normalizers": []}, BLANKS, [], "x"])
def test_without_a_map_all_characters_stay(unigram, none):
    with with_pieces(unigram(none)) as view:
        normalizer = Tokenizer.from_str(
            json.dumps(
                {
                    **json.loads(Tokenizer(Unigram([("a", 0.0)])).to_str()),
                    "normalizer": {"type": "Precompiled", "precompiled_charsmap": mapped(view)},
                }
            )
        ).normalizer
    text = "Ünder ﬁ  \u3000\uff21\u0301"
    assert normalizer.normalize_str(text) == text


def test_other_vocabularies_are_read_where_they_are(unigram):
    folder = unigram(None, architectures=["T5EncoderModel"])
    with with_pieces(folder) as view:
        assert view == folder
    (folder / "sentencepiece.bpe.model").write_bytes(b"")
    with with_pieces(unigram(None)) as view:
        assert view == folder


def test_a_normalizer_that_llamacpp_does_not_have_is_refused(unigram):
    for steps in ([{"type": "Lowercase"}], [MAP, {"type": "NFKC"}], [MAP, MAP], [{}]):
        folder = unigram({"type": "Sequence", "normalizers": steps})
        with pytest.raises(InputRefused, match="has the normalizer"), with_pieces(folder):
            pass
