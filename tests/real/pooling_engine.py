"""What vLLM makes of texts with a head; run with vLLM's packages, not with ours.

Reads lines {"model": folder, "texts": texts, "tokens": whether each token is labelled}; answers
each with a line "TOLD " and JSON: each text's probabilities, or those of its tokens, or the error.
Each model has a process of its own, forked after the imports.
"""

import json
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", TORCH_COMPILE_DISABLE="1",
                  VLLM_ENABLE_V1_MULTIPROCESSING="0")  # fmt: skip

from vllm import LLM


def told(model: str, texts: list[str], tokens: bool) -> list[list[float]]:
    engine = LLM(
        model, runner="pooling", dtype="float32", max_model_len=60, max_num_seqs=2,
        enforce_eager=True, kv_cache_memory_bytes=64 << 20,
        pooler_config={"task": "token_classify"} if tokens else None,
    )  # fmt: skip
    if tokens:
        found = engine.encode(texts, pooling_task="token_classify", use_tqdm=False)
        return [one.outputs.data.float().tolist() for one in found]
    return [one.outputs.probs for one in engine.classify(texts, use_tqdm=False)]


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
