"""What vLLM says after a prompt with a picture; run with vLLM's packages, not with ours.

Reads lines {"model": folder, "pictures": [paths]}; answers each with a line "TOLD " and JSON: the
likeliest next tokens and the prompt's tokens of each picture, or the error. Each model has a
process of its own, forked after the imports.
"""

import base64
import json
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", TORCH_COMPILE_DISABLE="1",
                  VLLM_ENABLE_V1_MULTIPROCESSING="0")  # fmt: skip

from pathlib import Path

from vllm import LLM, SamplingParams


def told(model: str, pictures: list[str]) -> list:
    engine = LLM(
        model, dtype="bfloat16", max_model_len=256, max_num_seqs=2, enforce_eager=True,
        kv_cache_memory_bytes=64 << 20, mm_processor_cache_gb=0, block_size=32,
    )  # fmt: skip
    return [answer(engine, picture) for picture in pictures]


def answer(engine: LLM, picture: str) -> tuple[dict[int, float], list[int]]:
    data = base64.b64encode(Path(picture).read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": "Which colour is this?"},
    ]
    asked = SamplingParams(max_tokens=1, temperature=0, logprobs=5)
    (said,) = engine.chat([{"role": "user", "content": content}], asked, use_tqdm=False)
    (row,) = said.outputs[0].logprobs
    return {token: value.logprob for token, value in row.items()}, said.prompt_token_ids


for line in sys.stdin:
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    try:
        result = told(**json.loads(line))
    except Exception as error:  # noqa: BLE001  # whatever stops it is the answer
        result = f"{type(error).__name__}: {error}"
    print(f"\nTOLD {json.dumps(result)}", flush=True)  # noqa: T201
    os._exit(0)
