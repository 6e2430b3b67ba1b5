"""What the GPU benchmarks share: the shape of Llama-3-8B, random prompts, and the machine's ceilings."""

from __future__ import annotations

import json
import multiprocessing
import random
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "dtype": "bfloat16",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
# bf16: every weight but the embedding table, of which a decode reads one row a token.
WEIGHT_BYTES = 2 * (32 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336) + 128256 * 4096)
KV_BYTES_PER_TOKEN = 32 * 2 * 8 * 128 * 2


def model_folder(folder: Path) -> str:
    """A checkpoint folder with a config alone, for load_format="dummy"."""
    (folder / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return str(folder)


def random_prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(100, 128000) for _ in range(length)]


def _median_ms(run: Callable[[], object], repeats: int = 10) -> float:
    run()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def ceilings() -> dict[str, float]:
    """Measured in a process of their own, so that the memory is free again for the engine."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_ceilings).result()


def measure_ceilings() -> dict[str, float]:
    """Device-to-device copy, bytes read plus written, and a bf16 matrix product, on random data."""
    two = torch.randint(0, 255, (2, 4 << 30), dtype=torch.uint8, device="cuda")
    copy_ms = _median_ms(lambda: two[0].copy_(two[1]))
    factors = torch.randn(2, 8192, 8192, device="cuda").bfloat16()
    matmul_ms = _median_ms(lambda: factors[0] @ factors[1])
    return {"copy_tb_s": 2 * (4 << 30) / copy_ms / 1e9, "matmul_tflop_s": 2 * 8192**3 / matmul_ms / 1e9}


def tpot_floor_ms(batch: int, context: float, roof: dict[str, float]) -> float:
    """Time for the weights, read once or multiplied by the batch, whichever takes longer, and to read the batch's KV.

    context: tokens of a sequence. roof: from `ceilings`.
    """
    read = WEIGHT_BYTES / roof["copy_tb_s"]
    multiply = batch * WEIGHT_BYTES / roof["matmul_tflop_s"]  # two operations per weight of two bytes
    return (max(read, multiply) + batch * context * KV_BYTES_PER_TOKEN / roof["copy_tb_s"]) / 1e9
