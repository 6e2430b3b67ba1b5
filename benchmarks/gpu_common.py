"""What the GPU scripts share, from `superinfer.bench`: Llama-3-8B's shape, random prompts, the machine's ceilings."""

from __future__ import annotations

import random
from pathlib import Path

from superinfer.bench import engine, shapes
from superinfer.bench.ceilings import measure_ceilings


def model_folder(folder: Path) -> str:
    """A checkpoint folder with a config alone, for load_format="dummy"."""
    return str(shapes.write_shape("llama-3-8b", folder))


def random_prompt(rng: random.Random, length: int) -> list[int]:
    """Token ids of Llama 3."""
    return engine.random_prompt(rng, length, 128000)


def ceilings() -> dict[str, float]:
    """Measured in a process of their own, so that the memory is free again."""
    roof = measure_ceilings("cuda", "bfloat16")
    return {"copy_tb_s": roof.copy / 1e12, "matmul_tflop_s": roof.matmul / 1e12}
