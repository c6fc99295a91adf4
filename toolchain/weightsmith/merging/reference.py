"""Reference answers: base, or base with unmerged adapters, greedy, in float32."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from weightsmith.checkpoints.folder import check_adapter_folder, check_model_folder
from weightsmith.checkpoints.peft_keys import KEY_MAPPING, check_peft_keys
from weightsmith.checkpoints.peft_patterns import check_peft_patterns
from weightsmith.checkpoints.templates import render_chat
from weightsmith.errors import InputRefused
from weightsmith.merging.adapter_config import read_adapter_config
from weightsmith.time_limits import doing

Message = Mapping[str, str]
Progress = Callable[[int, int], None]

_BATCH_TOKENS = 2048
"""Prompt tokens per batch: enough to reuse the weights, few enough for memory."""
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TEMPLATE = "chat_template.jinja"


def answer(
    model: Path,
    adapters: Sequence[tuple[Path, float]],
    items: Sequence[Sequence[Message]],
    max_tokens: int,
    progress: Progress | None = None,
) -> list[dict[str, str]]:
    """Return one greedy answer per item, in order, from local files only.

    Each has `answer` and `finish_reason`: `stop` if the model ended it, `length` if it was cut off.

    Adapters stay unmerged and act in parallel, each times its weight, as in training. Items are
    chat messages, rendered by the model's chat template (or an adapter's, if it has one); without a
    template, an item's single message is completed as plain text. `progress` is called with items
    done and total items. Raises InputRefused for folders that need code of their own.
    """
    stay_offline()
    with modest_threads():
        return _answer(model, adapters, items, max_tokens, progress)


def stay_offline() -> None:
    """Keep libraries off the network, regardless of the environment."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


@contextmanager
def modest_threads() -> Iterator[None]:
    """Leave one CPU free while the block runs.

    OpenMP's barriers wait for preempted threads, which on a busy machine with two CPUs made answers
    five times slower than a single thread.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _answer(
    model: Path,
    adapters: Sequence[tuple[Path, float]],
    items: Sequence[Sequence[Message]],
    max_tokens: int,
    progress: Progress | None,
) -> list[dict[str, str]]:
    tokenizer = load_tokenizer(model, adapters)
    network = load_network(model, adapters)
    prompts = [prompt_tokens(tokenizer, item, model) for item in items]
    answers: list[dict[str, str]] = [{}] * len(items)
    done = 0
    for batch in _batches(prompts):
        found = _generate(network, tokenizer, [prompts[i] for i in batch], max_tokens)
        for place, answer in zip(batch, found, strict=True):
            answers[place] = answer
        done += len(batch)
        if progress is not None:
            progress(done, len(items))
    return answers


def load_tokenizer(model: Path, adapters: Sequence[tuple[Path, float]]) -> Any:
    """Load tokenizer and chat template of the last adapter that has them, else the base's."""
    from transformers import AutoTokenizer

    folder, template, author = model, "", model
    for root, _ in adapters:
        files = check_adapter_folder(root)
        if any(name in files for name in _TOKENIZERS):
            folder, template, author = root, "", root
        if _TEMPLATE in files:
            template, author = (root / _TEMPLATE).read_text(), root
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False, padding_side="left"
    )
    if folder != model and not tokenizer.chat_template:
        base = AutoTokenizer.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        tokenizer.chat_template, author = base.chat_template, model
    if template:
        tokenizer.chat_template = template
    tokenizer.name_or_path = str(author)  # for error messages about the template
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_network(model: Path, adapters: Sequence[tuple[Path, float]]) -> Any:
    """Load the model in float32 with all adapters active."""
    from transformers import AutoModelForCausalLM

    check_model_folder(model)
    with doing(f"loading {model}"):
        network = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=torch.float32,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    if adapters:
        with doing("loading the adapters"):
            network = _with_adapters(network, adapters)
    return network.eval()


def _with_adapters(network: Any, adapters: Sequence[tuple[Path, float]]) -> Any:
    from peft import PeftModel
    from peft.tuners.lora import LoraLayer

    _check_together(adapters)
    names = [f"adapter_{number}" for number in range(len(adapters))]
    for number, (root, _) in enumerate(adapters):
        check_peft_keys(root)
        check_peft_patterns(root, (name for name, _ in network.named_modules()))
        how: Any = {"adapter_name": names[number], "key_mapping": KEY_MAPPING}
        if number == 0:
            network = PeftModel.from_pretrained(network, root, **how)
        else:
            network.load_adapter(root, **how)
    network.base_model.set_adapter(names)
    for layer in network.modules():
        if isinstance(layer, LoraLayer):
            for name, (_, weight) in zip(names, adapters, strict=True):
                if name in layer.scaling:
                    layer.scaling[name] *= weight
    return network


def _check_together(adapters: Sequence[tuple[Path, float]]) -> None:
    """Refuse weighted sums that PEFT's forward pass cannot compute: of other than low-rank terms.

    PEFT scales only B·A, also inside DoRA's norms, and activates one set of saved modules.
    """
    if len(adapters) == 1 and adapters[0][1] == 1.0:
        return
    whole = ("use_dora", "kasa_config", "modules_to_save", "trainable_token_indices")
    for root, _ in adapters:
        config = read_adapter_config(root)
        used = [name for name in whole if config.raw.get(name)]
        used += ["bias"] if config.raw.get("bias", "none") != "none" else []
        if config.kind != "LORA" or used:
            raise InputRefused(
                f"{root} is {config.kind} with {', '.join(used) or 'no low-rank factors'}: "
                "PEFT cannot evaluate it unmerged in a weighted sum",
                hint="evaluate it alone at weight 1, or omit the comparison with the adapter",
            )


def prompt_tokens(tokenizer: Any, item: Sequence[Message], model: Path) -> list[int]:
    """Return an item's token ids."""
    if tokenizer.chat_template:
        text = render_chat(tokenizer, item, answer=True)
        with doing(f"tokenizing with the tokenizer of {model}"):
            # The template adds the begin token.
            return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(item) != 1:
        raise InputRefused(
            f"{model} has no chat template, but an item has {len(item)} messages",
            hint="give plain prompts, or add chat_template.jinja to the model or the adapter",
        )
    return list(tokenizer(item[0]["content"])["input_ids"])


def _batches(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Yield indices of prompts with similar lengths, to reduce padding."""
    batch: list[int] = []
    for place in sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i)):
        if batch and (len(batch) + 1) * len(prompts[place]) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


@torch.inference_mode()
def _generate(
    network: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_tokens: int
) -> list[dict[str, str]]:
    """Complete a batch, padded on the left; padding is masked and not counted in positions."""
    from transformers import GenerationConfig

    width = max(1, max(len(prompt) for prompt in prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    # Ignore sampling and penalties in generation_config.json; only its end tokens are used.
    ends = _ends(network, tokenizer)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_tokens,
        pad_token_id=pad,
        eos_token_id=ends,
    )
    network.generation_config = greedy
    found = network.generate(input_ids=ids, attention_mask=mask, generation_config=greedy)
    rows = found[:, width:]
    return [
        {
            "answer": str(text),
            "finish_reason": "stop" if set(row.tolist()) & set(ends or ()) else "length",
        }
        for text, row in zip(
            tokenizer.batch_decode(rows, skip_special_tokens=True), rows, strict=True
        )
    ]


def _ends(network: Any, tokenizer: Any) -> list[int] | None:
    """Return the end tokens of the model, its generation config and its tokenizer."""
    ends: list[int] = []
    given = (
        network.generation_config.eos_token_id,
        network.config.eos_token_id,
        tokenizer.eos_token_id,
    )
    for value in given:
        ends += value if isinstance(value, list) else [] if value is None else [value]
    return sorted(set(ends)) or None
