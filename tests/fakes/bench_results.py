"""Results files as guidellm and AIPerf write them, with the keys that their own models have."""

import json
from pathlib import Path
from typing import Any


def _summary(p95: float, mean: float) -> dict[str, Any]:
    kinds = ("successful", "errored", "incomplete", "total")
    points = {"p50": mean, "p90": mean, "p95": p95, "p99": 2 * p95}
    return {kind: {"mean": mean, "count": 100, "percentiles": points} for kind in kinds}


def guidellm(
    model: str = "tiny", ttft: float = 40.0, itl: float = 5.0, rate: float = 300.0, streams: int = 2
) -> dict[str, Any]:
    """Return a report of three loads: half of that concurrency, it, and twice as much."""
    return {
        "metadata": {"version": 2, "guidellm_version": "0.8.1"},
        "config": {"spec": {"backend": {"kind": "openai_http", "model": ""}}},
        "benchmarks": [
            {
                "type_": "generative_benchmark",
                "config": {
                    "strategy": {"type_": "concurrent", "streams": at_once},
                    "backend": {"model": model, "target": "http://127.0.0.1:8080"},
                },
                "metrics": {
                    "request_totals": {"successful": 98, "errored": 2, "incomplete": 0},
                    "request_concurrency": _summary(at_once, 0.97 * at_once),
                    "time_to_first_token_ms": _summary(ttft * at_once / streams, ttft / 2),
                    "inter_token_latency_ms": _summary(itl, itl),
                    "output_tokens_per_second": _summary(rate, rate),
                    "prompt_token_count": _summary(128, 128),
                    "output_token_count": _summary(64, 64),
                },
            }
            for at_once in (streams / 2, streams, 2 * streams)
        ],
    }


def aiperf(
    model: str = "tiny", ttft: float = 40.0, itl: float = 5.0, rate: float = 300.0, streams: int = 2
) -> dict[str, Any]:
    """Return an export; its unit of the inter-token latency is not the usual one."""
    return {
        "schema_version": "1.0",
        "aiperf_version": "0.13.0",
        "was_cancelled": False,
        "is_complete": True,
        "effective_concurrency": {"unit": "requests", "avg": 0.8 * streams},
        "request_count": {"unit": "requests", "avg": 100.0},
        "error_request_count": {"unit": "requests", "avg": 3.0},
        "time_to_first_token": {"unit": "ms", "avg": ttft / 2, "p95": ttft},
        "inter_token_latency": {"unit": "us", "avg": 500 * itl, "p95": 1000 * itl},
        "output_token_throughput": {"unit": "tokens/sec", "avg": rate},
        "input_sequence_length": {"unit": "tokens", "avg": 128.0},
        "output_sequence_length": {"unit": "tokens", "avg": 64.0},
        "input_config": {
            "models": {"items": [{"name": model}]},
            "endpoint": {"type": "chat", "streaming": True},
            "phases": [
                {"name": "warmup", "kind": "warmup", "concurrency": 1},
                {"name": "profiling", "kind": "profiling", "concurrency": streams},
            ],
        },
        "telemetry_data": {
            "endpoints": {"a": {"gpus": {"0": {"gpu_name": "NVIDIA H100 80GB HBM3"}}}}
        },
    }


def write(path: Path, found: object) -> Path:
    path.write_text(json.dumps(found))
    return path
