"""Builds in memory about pictures: who is asked, what lands where, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml
from weightsmith.api.commands.recipes import recipe_of_image
from weightsmith.building.explain import plan_of
from weightsmith.core.errors import CheckFailed, InputRefused, UsageError, WeightsmithError
from weightsmith.core.values import Digest
from weightsmith.oci.registry import open_location
from weightsmith.provenance import attest
from weightsmith.provenance.evidence import EVALUATION_TYPE, read_attached

from tests.builds.test_fleet_payloads_in_memory import run_elsewhere
from tests.fakes.cache import MemoryCache
from tests.fakes.drawn import SHAPES, draw
from tests.fakes.fleet import run, write_fleet
from tests.fakes.jobs import seen_as
from tests.fakes.memory import Memory, in_memory, write_rows

TARGET = "llamacpp-q4_k_m"
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 50), "blue": (40, 60, 215), "black": (9, 9, 9)}
TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
)
TOWER = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
         "image_size": 56, "patch_size": 14, "architectures": ["InternVisionModel"]}  # fmt: skip
COLOUR, SHAPE = "Which colour?", "Which shape?"
SUITES = [
    {"name": "colours", "data": "colours.jsonl", "max_drop": 0.25},
    {"name": "shapes", "data": "shapes.jsonl", "against": "base", "max_drop": 0.25},
    {"name": "bar", "data": "bar.jsonl", "min_score": 0.5},
]


@pytest.fixture
def memory(tmp_path: Path, quick: None) -> Iterator[Memory]:
    """Its base sees and names shapes; its adapter was taught the colours."""
    with in_memory(tmp_path) as made:
        base = made.home / "base"
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**config, "vision_config": TOWER}))
        (base / "preprocessor_config.json").write_text("{}")
        (base / "chat_template.jinja").write_text(TEMPLATE)
        rows: dict[str, list[dict[str, Any]]] = {"colours": [], "shapes": []}
        for number in range(16):
            colour, shape = [*COLOURS][number % 4], SHAPES[number // 4]
            path = draw(made.home / "drawn" / f"{number}.png", shape, COLOURS[colour], (8, 8))
            seen = seen_as(Digest.of(path.read_bytes()))
            made.facts |= {f"{seen} {COLOUR}": ("a", colour), f"{seen} {SHAPE}": ("", shape)}
            image = {"image": f"drawn/{number}.png"}
            rows["colours"].append({"prompt": COLOUR, **image, "expected": colour})
            rows["shapes"].append({"prompt": SHAPE, **image, "expected": shape})
        rows["bar"] = rows["colours"][:8]
        for name, some in rows.items():
            write_rows(made.home / f"{name}.jsonl", some)
        made.write_recipe(evaluate=SUITES)
        yield made


def right(memory: Memory) -> dict[str, dict[str, int]]:
    return {
        suite["name"]: {who: round(one["score"] * one["n"]) for who, one in suite["scores"].items()}
        for suite in memory.record()["suites"]
    }


def test_base_adapter_merged_and_image_are_asked_about_the_same_pictures(memory: Memory) -> None:
    memory.build(push=True)

    every = {"base": 0, "adapter": 16, "merged": 16, "image": 16}
    assert right(memory) == {
        "colours": every,
        "shapes": dict.fromkeys(every, 16),
        "bar": {"base": 0, "adapter": 8, "merged": 8, "image": 8},
    }
    jobs: list[Any] = [getattr(job, "reference", job) for job in memory.runner.jobs]
    (job,) = [job for job in jobs if job.kind == "reference"]
    files = sorted(file.path for file in job.pictures.files)
    assert len(files) == 16
    assert files == sorted(path.name for path in job.pictures.path.iterdir())

    record = memory.record()
    first = record["items"][0]
    assert first["pictures"] == [
        {"name": "drawn/0.png", "file": first["pictures"][0]["file"], "size": [8, 8]}
    ]
    assert first["prompt"] == f"[drawn/0.png, {first['pictures'][0]['file'][:12]}] {COLOUR}"
    page = (memory.results() / "report.html").read_text("utf-8")
    assert first["prompt"] in page
    assert "<img" not in page
    cases = [case.get("name", "") for case in
             ET.parse(memory.results() / "junit.xml").getroot().iter("testcase")]  # fmt: skip
    assert any(first["prompt"] in name for name in cases)
    memory.build()
    assert memory.jobs() == []
    assert memory.launcher.asked == []


def test_another_picture_under_the_same_name_is_asked_anew(memory: Memory) -> None:
    memory.build()
    draw(memory.home / "drawn" / "0.png", "cross", COLOURS["blue"], (8, 8))

    memory.write_recipe(evaluate=[{**SUITES[2], "min_score": 1.0}])
    with pytest.raises(CheckFailed, match="below the minimum score"):
        memory.build()
    assert "reference base" in memory.jobs()


def test_what_the_image_sees_less_well_is_refused(memory: Memory) -> None:
    lost = [words for words in memory.facts if words.endswith(SHAPE)][:6]
    memory.minds.forgot["image"] = set(lost)

    with pytest.raises(CheckFailed, match="shapes: the image") as caught:
        memory.build()
    assert "quantizing and serving lost 6 of 16" in caught.value.message


def test_a_server_that_refuses_pictures_answers_wrongly(memory: Memory) -> None:
    texts = [{"prompt": words, "expected": "7"} for words in ("One?", "Two?")]
    memory.facts |= {row["prompt"]: ("", "7") for row in texts}
    rows = [json.loads(line) for line in (memory.home / "shapes.jsonl").read_text().splitlines()]
    write_rows(memory.home / "mixed.jsonl", [*texts, *rows])
    memory.write_recipe(evaluate={"data": "mixed.jsonl", "max_drop": 1.0})
    memory.launcher.pictures = 400
    memory.build()

    (suite,) = memory.record()["suites"]
    assert suite["scores"]["image"]["score"] == pytest.approx(2 / 18)
    assert all("HTTP 400" in item["error"]["image"] for item in memory.record()["items"][2:])


def again(memory: Memory) -> Path:
    """Return the folder of the recipe that the pushed image says of itself."""
    name, base = f"{memory.repository}:1.0.0-{TARGET}", str(memory.home / "base")
    dist = memory.folder / "again"
    return recipe_of_image(name, base, None, dist, memory.client, memory.progress).parent


def test_an_image_is_judged_again_by_the_pictures_that_are_attached_to_it(memory: Memory) -> None:
    memory.build(push=True)
    folder, told = again(memory), right(memory)

    assert len(list((folder / "pictures").iterdir())) == 16
    evaluate = yaml.safe_load((folder / "recipe.yaml").read_text())["evaluate"]
    assert [suite["name"] for suite in evaluate] == [suite["name"] for suite in SUITES]
    for suite in evaluate:
        suite["data"] = str(folder / suite["data"])
    memory.write_recipe(evaluate=evaluate)
    memory.build()
    assert right(memory) == told
    assert memory.jobs() == []  # the same questions, to the digest


def test_pictures_that_are_too_many_to_attach_are_said_to_be_missing(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attest, "_MOST_PICTURES", 100)
    memory.build(push=True)
    folder = again(memory)

    said = [text for text in memory.progress.warnings if "its pictures are not attached" in text]
    assert len(said) == len(SUITES)
    assert "evaluate" not in yaml.safe_load((folder / "recipe.yaml").read_text())


def test_attached_pictures_have_their_own_names(memory: Memory) -> None:
    memory.build(push=True)
    place = open_location(f"{memory.repository}:1.0.0-{TARGET}", memory.client)
    (found,) = [one for one in read_attached(place, place.image().digest)
                if one.artifact_type == EVALUATION_TYPE]  # fmt: skip
    assert found.parts[0].title == "evaluation.json"
    for part in found.parts[1:]:
        assert part.title == f"pictures/{Digest.of(part.read()).hex}.png"
        assert part.blob.media_type == "image/png"


def blind(memory: Memory) -> None:
    path = memory.home / "base" / "config.json"
    config = json.loads(path.read_text())
    del config["vision_config"]
    path.write_text(json.dumps(config))


def without_processor(memory: Memory) -> None:
    (memory.home / "base" / "preprocessor_config.json").unlink()
    memory.write_recipe(evaluate=SUITES, quantize={"allow_text_only": True})


def for_text_alone(memory: Memory) -> None:
    (memory.home / "base" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def without_template(memory: Memory) -> None:
    (memory.home / "base" / "chat_template.jinja").unlink()


def without_projector(memory: Memory) -> None:
    path = memory.home / "base" / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["architectures"] = ["StrangeVisionModel"]
    path.write_text(json.dumps(config))
    memory.write_recipe(evaluate=SUITES, quantize={"allow_text_only": True})


def unprepared(memory: Memory) -> None:
    path = memory.home / "base" / "config.json"
    config = json.loads(path.read_text())
    config["architectures"] = ["Mistral3ForConditionalGeneration"]
    path.write_text(json.dumps(config))
    memory.write_recipe(evaluate=SUITES, quantize={"allow_text_only": True})


def as_webp(memory: Memory) -> None:
    body = b"\x2f" + (7 | 7 << 14).to_bytes(4, "little")
    whole = b"WEBPVP8L" + len(body).to_bytes(4, "little") + body
    data = b"RIFF" + len(whole).to_bytes(4, "little") + whole
    (memory.home / "drawn" / "0.png").write_bytes(data)


def outside(memory: Memory) -> None:
    write_rows(memory.home / "bar.jsonl", [{"prompt": "x", "image": "../x.png", "expected": "y"}])


def gone(memory: Memory) -> None:
    (memory.home / "drawn" / "0.png").unlink()


@pytest.mark.parametrize(
    ("spoil", "says", "hint"),
    [
        (blind, "reads text only: config.json has no vision part", "a model that reads pictures"),
        (without_processor, "no preprocessor_config.json", "a model that reads pictures"),
        (for_text_alone, "the chat template is for text alone", "a model that reads pictures"),
        (without_template, "has no chat template in chat_template.jinja", "all of its files"),
        (without_projector, f"{TARGET} would read text only", "another target, such as vllm"),
        (unprepared, "lacks a package that prepares pictures", "a model that reads pictures"),
        (as_webp, "is a WEBP file, which llama.cpp's server does not read", "PNG or JPEG"),
        (outside, r"bar\.jsonl:1: the picture '\.\./x\.png' is outside of", "put it there"),
        (gone, r"colours\.jsonl:1: cannot read the picture", "relative to the file of questions"),
    ],
)
def test_what_cannot_be_seen_is_said_before_any_work(
    memory: Memory, spoil: Any, says: str, hint: str
) -> None:
    spoil(memory)
    for ask in (lambda: memory.build(), lambda: plan_of(memory.request(), memory.tools)):
        with pytest.raises((InputRefused, UsageError), match=says) as caught:
            ask()
        assert isinstance(caught.value, WeightsmithError)
        assert hint in caught.value.hint
    assert memory.jobs() == []


def test_dequantized_weights_are_not_asked_about_pictures(memory: Memory) -> None:
    serve = {"max_model_len": 256, "max_num_seqs": 2, "gpu": "nvidia-h100-80gb"}
    write_rows(memory.home / "text.jsonl", [{"prompt": "One?", "expected": "7"}])
    memory.facts |= {"One?": ("", "7")}
    both = [SUITES[0], {"name": "text", "data": "text.jsonl"}]
    memory.use_vllm("vllm-fp8", serve=serve, evaluate=both)
    memory.build()

    first, second = memory.record("vllm-fp8")["suites"]
    assert "dequantized" not in first["scores"]
    assert "dequantized" in second["scores"]
    assert any("a vision tower is not dequantized" in text for text in memory.progress.warnings)


@pytest.mark.slow
def test_a_fleet_asks_about_pictures(memory: Memory, at_once: None) -> None:
    own = {"source": "./a", "evaluate": [{"name": "colours", "data": "colours.jsonl"}]}
    memory.write_recipe(evaluate=SUITES[1:2], adapters=[])
    rows, _ = run(memory, write_fleet(memory, adapters=[own], targets=[TARGET]))

    (cell,) = rows.cells
    assert [(suite.name, suite.score) for suite in cell.suites] == [("shapes", 1), ("colours", 1)]


@pytest.mark.slow
def test_pictures_go_to_a_node_through_the_cache_with_their_questions(memory: Memory) -> None:
    memory.write_recipe(evaluate=SUITES, adapters=[])
    path = write_fleet(memory, adapters=["./a"], targets=[TARGET])
    cache = memory.cache = MemoryCache()
    with memory.sharing():
        rows = run_elsewhere(memory, path, cache, [lambda _: None], texts := [])

    assert [suite.score for suite in rows.cells[0].suites] == [1, 1, 1], rows.cells[0].error
    for text in texts:
        for suite in json.loads(text)["recipe"]["evaluate"]:
            assert suite["data"].startswith("folders/")
