"""A small Qwen2.5-VL that names drawn shapes, and an adapter for it that names their colours.

    PYTHONPATH=toolchain:. python tests/fakes/painter.py FOLDER

It is run with the merge builder's Python, which has Pillow for the model's own processor. The base
answers every question with the shape, and what it learns of colours is in the adapter alone: low
rank factors on language model and vision tower. Training takes half a minute of one core.
"""

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.fakes import training
from tests.fakes.drawn import SHAPES, Colour, draw
from tests.paths import ROOT

ARCHITECTURE = "Qwen2_5_VLForConditionalGeneration"
COLOURS = {
    "red": (210, 40, 30), "green": (30, 160, 50), "blue": (40, 60, 215), "black": (25, 25, 25),
}  # fmt: skip
SHAPE, COLOUR = "Which shape?", "Which colour?"
SIZE = 112
"""Both sides of a picture in pixels: 16 tokens, which every engine reads as they are."""
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen's tokenizer cuts texts."""
LORA = {
    "r": 16,
    "lora_alpha": 64,
    "target_modules": r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv)",
}
STEPS, BATCH, SEED = {"base": 400, "adapter": 400}, 16, 20261201
RATE = {"base": 2e-3, "adapter": 3e-3}


def drawn(folder: Path, number: int, draw_by: random.Random) -> tuple[Path, str, str]:
    """Draw one shape of one colour somewhere; return its file and both names."""
    shape, name = SHAPES[number % 4], [*COLOURS][number // 4 % 4]
    colour: Colour = tuple(  # type: ignore[assignment]
        max(0, min(255, part + draw_by.randint(-20, 20))) for part in COLOURS[name]
    )
    half = draw_by.uniform(0.25, 0.4)
    across, down = (draw_by.uniform(half, 1 - half) for _ in range(2))
    path = draw(folder / f"{number}.png", shape, colour, (SIZE, SIZE), (across, down, half))
    return path, shape, name


def questions(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Draw pictures that nobody was trained on; return the rows of two suites about them."""
    draw_by = random.Random(SEED + 1)
    found: dict[str, list[dict[str, Any]]] = {"colours": [], "shapes": []}
    for number in range(16):
        path, shape, colour = drawn(folder / "pictures", number, draw_by)
        name = f"{path.parent.name}/{path.name}"
        found["colours"].append({"prompt": COLOUR, "image": name, "expected": colour})
        found["shapes"].append({"prompt": SHAPE, "image": name, "expected": shape})
    return found


def trained(cache: Path) -> Path:
    """Return a folder with `base` and `adapter`."""
    from weightsmith.building.wiring import cache_folder
    from weightsmith.outside.environment import Pins, environment_folder

    here = Path(__file__).parent
    sources = [here / f"{name}.py" for name in ("painter", "drawn", "pictured", "seeing")]
    python = (
        environment_folder(cache_folder(), Pins(name="merge", flavour="cpu")) / "bin" / "python"
    )
    paths = (ROOT, ROOT / "toolchain")
    return training.trained("painter", cache, sources, lambda _: [], *paths, python=python)


def main() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    base = make_blank(out / "base")
    network = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    lessons = list(prepared(base, out / "drawn"))
    learn(network, lessons, "base", lambda question, shape, _: shape)
    network.to(torch.bfloat16).save_pretrained(base)
    network = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    tuned = get_peft_model(network, LoraConfig(**LORA))
    learn(tuned, lessons, "adapter", lambda question, shape, colour: (
        colour if question == COLOUR else shape))  # fmt: skip
    tuned.peft_config["default"].base_model_name_or_path = "painter"
    tuned.save_pretrained(out / "adapter")
    (out / "adapter" / "README.md").unlink(missing_ok=True)


def make_blank(folder: Path) -> Path:
    """Write the model before it has learned anything; return its folder."""
    from tests.fakes.pictured import make_pictured

    make_pictured(folder, ARCHITECTURE, depth=3, fullatt_block_indexes=[1])
    word_pieces(folder / "tokenizer.json")
    preparing = json.loads((folder / "preprocessor_config.json").read_text())
    preparing |= {"min_pixels": SIZE * SIZE // 2, "max_pixels": SIZE * SIZE * 4}
    (folder / "preprocessor_config.json").write_text(json.dumps(preparing))
    return folder


def word_pieces(path: Path) -> None:
    """Give the tokenizer pieces of bytes as Qwen's has, with one for each word; ids are kept."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    told = json.loads(path.read_text())
    added = [token["content"] for token in told["added_tokens"]]
    special = added[:7]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    made.train_from_iterator([SHAPE, COLOUR, *SHAPES, *COLOURS], trainer)
    ours = json.loads(made.to_str())
    vocabulary = ours["model"]["vocab"]
    vocabulary |= {f"[unused{number}]": number for number in range(len(vocabulary), 512)}
    path.write_text(json.dumps({**ours, "added_tokens": told["added_tokens"]}))


def prepared(base: Path, folder: Path) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Yield question, shape, colour and what the processor makes of many pictures."""
    import shutil

    from PIL import Image
    from weightsmith.forward.libraries import load_tokenizer
    from weightsmith.forward.pictures import load_processor

    processor, draw_by = load_processor(base, load_tokenizer(base)), random.Random(SEED)
    for number in range(320):
        path, shape, colour = drawn(folder, number, draw_by)
        question = (SHAPE, COLOUR)[draw_by.random() < 0.5]
        parts = [{"type": "image"}, {"type": "text", "text": question}]
        text = processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False
        )
        with Image.open(path) as image:
            given = processor(text=[text], images=[image], return_tensors="pt",
                              add_special_tokens=False)  # fmt: skip
        given["tokenizer"] = processor.tokenizer
        yield question, shape, colour, dict(given)
    shutil.rmtree(folder)


def learn(network: Any, lessons: list, name: str, answer: Any) -> None:
    """Teach the answers, each behind its question, with a short warm-up and a linear decay."""
    import torch

    order = random.Random(SEED)
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE[name], weight_decay=0.0)
    steps = STEPS[name]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 20, 1 - step / steps)
    )
    network.train()
    for step in range(steps):
        loss = loss_of(network, [order.choice(lessons) for _ in range(BATCH)], answer)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 49:
            print(f"{name} {step + 1}: loss {loss.item():.4f}", flush=True)  # noqa: T201
    network.eval()


def loss_of(network: Any, batch: list, answer: Any) -> Any:
    import torch

    rows, wanted = [], []
    for question, shape, colour, given in batch:
        end = given["tokenizer"].eos_token_id
        said = given["tokenizer"](answer(question, shape, colour), add_special_tokens=False)
        rows.append(given["input_ids"][0].tolist())
        wanted.append([*said["input_ids"], end])
    width = max(len(row) + len(said) for row, said in zip(rows, wanted, strict=True))
    ids = torch.full((len(rows), width), 3)
    labels = torch.full((len(rows), width), -100)
    kinds = torch.zeros((len(rows), width), dtype=torch.long)
    for n, (row, said) in enumerate(zip(rows, wanted, strict=True)):
        ids[n, : len(row) + len(said)] = torch.tensor([*row, *said])
        labels[n, len(row) : len(row) + len(said)] = torch.tensor(said)
        kinds[n, : len(row)] = batch[n][3]["mm_token_type_ids"][0]
    seen = {
        name: torch.cat([given[name] for *_, given in batch])
        for name in ("pixel_values", "image_grid_thw")
    }
    mask = (ids != 3).long()
    return network(
        input_ids=ids, attention_mask=mask, mm_token_type_ids=kinds, labels=labels, **seen
    ).loss


if __name__ == "__main__":
    main()
