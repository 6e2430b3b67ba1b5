"""Hopper's multiprocessors: what a program may have of one (CUDA programming guide, "Compute Capability 9.0"), how many
there are, and how much a program may fetch before it is its turn."""

from __future__ import annotations

import functools

import torch

SHARED_BYTES = 227 << 10  # of shared memory, at most
RESERVED_BYTES = 1 << 10  # more of it that the driver takes for each program


@functools.cache
def multiprocessors_of(device: int) -> int:
    """0: not a Hopper, for which alone the kernels in `.cu` files are compiled."""
    if torch.cuda.get_device_capability(device)[0] != 9:
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def early_stages(early_bytes: int, stage_bytes: int, stages: int) -> int:
    """How many stages' weights may be on their way at once before the kernel in front is over: enough to keep the
    memory busy, as what that kernel has to read waits behind them."""
    return max(1, min(stages, early_bytes // stage_bytes))
