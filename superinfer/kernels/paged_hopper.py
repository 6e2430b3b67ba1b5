"""Decode attention of our own for Hopper, behind `AttentionCall`: `paged_hopper.cu`, compiled at start by NVRTC.

Why beside FlashInfer's: its decode reached 61 % of an H200's memory speed and wants a plan of the host each step,
copied to the device (docs/performance.md). This one keeps more bytes in flight and is planned by the device itself.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from superinfer.kernels.hopper import RESERVED_BYTES, SHARED_BYTES
from superinfer.kernels.nvrtc import Arguments, CudaKernel
from superinfer.kernels.paged import PagedBatch, Projected

TILE = 16  # tokens; pages are multiples
LOG2_E = 1.4426950408889634


class Geometry(NamedTuple):
    """most_heads: KV heads of a program, at most. stages: its tiles under way. min_tiles: of the shortest span that is
    worth a program."""

    most_heads: int
    stages: int
    min_tiles: int = 4


# Copies of 1 KB, a token of 4 heads, take a multiprocessor's copy engine as long as the memory has for them; where
# copies are of 2 KB the memory alone is the limit, but spans are fewer and their ends longer.
FEW = Geometry(most_heads=4, stages=4)
MANY = Geometry(most_heads=8, stages=2)
MANY_SEQUENCES, MANY_ROW = 64, 2048  # from so many sequences on, where copies have so many bytes


def geometry_for(sequences: int, kv_heads: int, head_dim: int) -> Geometry:
    """The quickest for so many sequences on an H200 (docs/performance.md)."""
    long_copies = kv_heads % MANY.most_heads == 0 and MANY.most_heads * head_dim * 2 >= MANY_ROW
    return MANY if long_copies and sequences >= MANY_SEQUENCES else FEW


def shared_bytes(geometry: Geometry, together: int, head_dim: int) -> int:
    """Of a program with so many KV heads."""
    return 128 + geometry.stages * 2 * TILE * (together * head_dim * 2 + 16)


def compile_constants(
    heads: int, kv_heads: int, head_dim: int, page: int, half: bool, geometry: Geometry
) -> dict[str, int]:
    """What `paged_hopper.cu` is compiled with. half: float16, else bfloat16."""
    together = next(n for n in range(min(geometry.most_heads, kv_heads), 0, -1) if kv_heads % n == 0)
    on_one = max(1, SHARED_BYTES // (shared_bytes(geometry, together, head_dim) + RESERVED_BYTES))
    return dict(
        HEAD_DIM=head_dim, GROUP=heads // kv_heads, KV_HEADS=kv_heads, HEADS=together, PAGE=page,
        STAGES=geometry.stages, MIN_TILES=geometry.min_tiles, TOGETHER_ON_ONE=on_one, HALF=int(half),
    )  # fmt: skip


class HopperKernel:
    """The compiled kernel for one model's shape, and the memory its programs share. One stream at a time."""

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, page: int, scale: float, dtype: torch.dtype,
        max_sequences: int, device: torch.device, geometry: Geometry = FEW,
    ) -> None:  # fmt: skip
        """max_sequences: of one call. Raises CudaFailure where the kernel cannot be compiled or loaded."""
        self._sizes = heads, head_dim
        self._row = (heads + 2 * kv_heads) * head_dim
        torch.cuda.current_stream(device)  # the device's context exists from here on
        constants = compile_constants(heads, kv_heads, head_dim, page, dtype == torch.float16, geometry)
        together, together_on_one = constants["HEADS"], constants["TOGETHER_ON_ONE"]
        self._shared_bytes = shared_bytes(geometry, together, head_dim)
        threads = 32 * (together + 1)
        self._kernel = CudaKernel("paged_hopper.cu", "decode_attention", constants, threads, self._shared_bytes)
        programs = torch.cuda.get_device_properties(device).multi_processor_count * together_on_one
        self._grid = max(1, programs * together // kv_heads), kv_heads // together
        part = (head_dim // 16 + 1) * 32 * 4
        self._parts = torch.empty(2 * self._grid[0] * kv_heads * part, dtype=torch.float32, device=device)
        self._arrived = torch.zeros((max_sequences + 2 * self._grid[0]) * kv_heads, dtype=torch.int32, device=device)
        self._max_sequences = max_sequences
        self._arguments = Arguments(18)
        words = self._arguments.words
        words[6:8] = self._parts.data_ptr(), self._arrived.data_ptr()
        words[12:13].view(np.float32)[0] = scale * LOG2_E

    def launch(self, q: torch.Tensor, kv: torch.Tensor, out: torch.Tensor, batch: PagedBatch) -> None:
        """In the current stream; may be captured. q, out: [sequences, heads, head_dim], contiguous. kv: see
        AttentionCall, with the heads of a token one after another."""
        assert (q.shape[1], q.shape[2]) == self._sizes and q.is_contiguous()
        self._arguments.words[13:] = q.stride(0), 0, 0, 0, 0
        self._launch(q, kv, out, batch)

    def launch_rotating(self, given: Projected, kv: torch.Tensor, out: torch.Tensor, batch: PagedBatch) -> None:
        """As `launch`, of queries that are not rotated and keys and values that are not stored."""
        qkv, cos, sin = given
        assert qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
        assert qkv.shape[-2] * qkv.shape[-1] == self._row and qkv.shape[-3] == len(cos) == len(out)
        in_parts = qkv.dim() == 4
        assert qkv.dtype == (torch.float32 if in_parts else out.dtype)
        parts = (qkv.stride(0), len(qkv)) if in_parts else (0, 0)
        self._arguments.words[13:] = self._row, *parts, cos.data_ptr(), sin.data_ptr()
        self._launch(qkv, kv, out, batch)

    def _launch(self, qkv: torch.Tensor, kv: torch.Tensor, out: torch.Tensor, batch: PagedBatch) -> None:
        assert (out.shape[1], out.shape[2]) == self._sizes and batch.sequences <= self._max_sequences
        assert out.is_contiguous() and kv.stride()[3:] == (kv.shape[4], 1)
        words = self._arguments.words
        words[:6] = (
            qkv.data_ptr(), kv.data_ptr(), out.data_ptr(), batch.kv_indptr.data_ptr(), batch.kv_indices.data_ptr(),
            batch.last_page_len.data_ptr(),
        )  # fmt: skip
        words[8:12] = *kv.stride()[:3], batch.sequences
        self._kernel.launch(self._grid, self._shared_bytes, self._arguments.places)


class HopperDecode:
    """Implements `RotatingCall`: attention of one query per sequence; nothing to prepare on the host.

    May be captured in a CUDA graph, whose replays read the batch's device tensors as they are then.
    """

    skips_empty = True
    reads_lengths = False

    def __init__(self, kernel: HopperKernel) -> None:
        self._kernel = kernel
        self._batch: PagedBatch | None = None

    def plan(self, batch: PagedBatch) -> None:
        """See AttentionCall.plan."""
        self._batch = batch

    def run(self, q: torch.Tensor, kv: torch.Tensor, layer: int = 0, out: torch.Tensor | None = None) -> torch.Tensor:
        """See AttentionCall.run."""
        assert self._batch is not None, "run() before plan()"
        out = torch.empty_like(q) if out is None else out
        self._kernel.launch(q, kv, out, self._batch)
        return out

    def rotate_and_run(self, given: Projected, kv: torch.Tensor, out: torch.Tensor) -> None:
        """See RotatingCall. Other kernels may still write to other places of the cache while this one reads."""
        assert self._batch is not None, "rotate_and_run() before plan()"
        self._kernel.launch_rotating(given, kv, out, self._batch)
