"""Attention over a block-first paged cache on a GPU: one small interface, and the table that picks who implements it.

A batch is described as FlashInfer does: ragged lists of queries (`qo_indptr`) and of cache blocks (`kv_indptr`,
`kv_indices`, `last_page_len`). A layer's cache is a strided view `cache[:, layer]`, [blocks, 2, page, kv_heads,
head_dim]; reading it costs the same as a contiguous one (bit-equal, measured within 3 %).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F

FLASHINFER_HEAD_DIMS = (64, 128, 256)
HOPPER_HEAD_DIMS = (64, 128)
HOPPER_MOST_SHARED = 8  # query heads per KV head
HOPPER_TILE = 16  # tokens; blocks are multiples


@dataclass(frozen=True, slots=True)
class PagedBatch:
    """Sequences of one attention call: sequence s asks rows qo_indptr[s] .. qo_indptr[s + 1] of q, its last positions.

    qo_indptr, kv_indptr: [sequences + 1]; last_page_len: [sequences]; kv_indices: [kv_indptr[-1]] block ids. All int32
    on the device. host_*: the same in host memory, pinned if the device is a GPU, not to be changed before the step's
    copies are done. longest_query: tokens.
    """

    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    last_page_len: torch.Tensor
    host_qo_indptr: torch.Tensor
    host_kv_indptr: torch.Tensor
    host_kv_indices: torch.Tensor
    host_last_page_len: torch.Tensor
    longest_query: int

    @property
    def sequences(self) -> int:
        return len(self.last_page_len)


class AttentionCall(Protocol):
    """Causal attention of one batch. `plan` once per step on the host, `run` once per layer.

    An implementation with a window has each position attend to that many tokens at most, itself included.
    """

    skips_empty: bool  # sequences at the end of a batch may have no blocks at all: their rows are then left alone
    reads_lengths: bool  # of the host's arrays: `host_kv_indptr` and `host_last_page_len` need not be right otherwise

    def plan(self, batch: PagedBatch) -> None:
        """Prepare for a batch. In a CUDA graph's replay, `plan` alone feeds the captured `run`s."""

    def run(self, q: torch.Tensor, kv: torch.Tensor, layer: int = 0, out: torch.Tensor | None = None) -> torch.Tensor:
        """q: [rows, heads, head_dim]. kv: [blocks, 2, page, kv_heads, head_dim] view. layer: whose `kv` is, for
        implementations that treat layers differently. out: like q, for the answer. Returns the answer, like q."""
        ...


class Projected(NamedTuple):
    """A layer's queries, keys and values of a step's tokens as its matrix leaves them, neither rotated nor stored.

    qkv: contiguous [tokens, heads + 2 · kv_heads, head_dim], or float32 [parts, tokens, heads + 2 · kv_heads,
    head_dim], their sum. cos, sin: contiguous [tokens, 1, head_dim] from `rope_angles`.
    """

    qkv: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor


@runtime_checkable
class RotatingCall(AttentionCall, Protocol):
    """Attention of one query per sequence that rotates, and stores keys and values, itself."""

    def rotate_and_run(self, given: Projected, kv: torch.Tensor, out: torch.Tensor) -> None:
        """given: a token a sequence, its newest. kv: as for `run`; the token's place in it is written. out: [sequences,
        heads, head_dim], for the answer."""
        ...


class AttentionByLayer:
    """Implements `AttentionCall` for models whose layers have windows: one call for each window there is."""

    def __init__(self, windows: Sequence[int | None], make: Callable[[int | None], AttentionCall]) -> None:
        """windows: by layer, as in ModelConfig. make: the call for layers of one window."""
        calls = {window: make(window) for window in dict.fromkeys(windows)}
        self._calls = list(calls.values())
        self.skips_empty = all(call.skips_empty for call in self._calls)
        self.reads_lengths = any(call.reads_lengths for call in self._calls)
        self._by_layer = [calls[window] for window in windows]

    def rotating(self, layer: int) -> RotatingCall | None:
        """The layer's call where it can rotate and store itself."""
        call = self._by_layer[layer]
        return call if isinstance(call, RotatingCall) else None

    def plan(self, batch: PagedBatch) -> None:
        """See AttentionCall.plan."""
        for call in self._calls:
            call.plan(batch)

    def run(self, q: torch.Tensor, kv: torch.Tensor, layer: int = 0, out: torch.Tensor | None = None) -> torch.Tensor:
        """See AttentionCall.run."""
        return self._by_layer[layer].run(q, kv, layer, out)


class TorchAttention:
    """The reference: one dense attention per sequence, in float32."""

    skips_empty = False
    reads_lengths = True

    def __init__(self, scale: float, window: int | None = None) -> None:
        self._scale = scale
        self._window = window
        self._batch: PagedBatch | None = None

    def plan(self, batch: PagedBatch) -> None:
        """See AttentionCall.plan."""
        self._batch = batch

    def run(self, q: torch.Tensor, kv: torch.Tensor, layer: int = 0, out: torch.Tensor | None = None) -> torch.Tensor:
        """See AttentionCall.run."""
        batch = self._batch
        assert batch is not None, "run() before plan()"
        out = torch.empty_like(q) if out is None else out
        shared = q.shape[1] // kv.shape[3]
        rows, pages = batch.host_qo_indptr.tolist(), batch.host_kv_indptr.tolist()
        for s, last in enumerate(batch.host_last_page_len.tolist()):
            blocks = batch.kv_indices[pages[s] : pages[s + 1]].long()
            context = (len(blocks) - 1) * kv.shape[2] + last
            k, v = kv[blocks].transpose(0, 1).flatten(1, 2)[:, :context].float().repeat_interleave(shared, 2)
            here = slice(rows[s], rows[s + 1])
            queries = rows[s + 1] - rows[s]
            position = torch.arange(context - queries, context, device=q.device)[:, None]
            key = torch.arange(context, device=q.device)
            mask = key <= position
            if self._window is not None:
                mask &= key > position - self._window
            answer = F.scaled_dot_product_attention(
                q[here].float().transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), mask, scale=self._scale
            )
            out[here] = answer.transpose(0, 1).to(q.dtype)
        return out


class Choice(NamedTuple):
    """Which implementation runs decodes ("hopper", "flashinfer-fa2", "triton") and prefill chunks ("flashinfer-fa3",
    "flashinfer-fa2", "triton"), and why."""

    decode: str
    prefill: str
    why: str


def _flashinfer_obstacle() -> str:
    """What is missing for FlashInfer to run at all; "" if nothing is."""
    if importlib.util.find_spec("flashinfer") is None:
        return "flashinfer is not installed; pip install 'superinfer[cuda]' makes attention faster"
    if importlib.util.find_spec("flashinfer_jit_cache") is not None:
        return ""
    # Where FlashInfer itself looks for the compiler, in this order.
    nvcc = shutil.which("nvcc")
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or (str(Path(nvcc).parents[1]) if nvcc else "")
    if not Path(home or "/usr/local/cuda", "bin", "nvcc").exists():
        return "FlashInfer compiles its kernels at first use and finds no nvcc; install CUDA's, or flashinfer-jit-cache"
    return ""


def _hopper_obstacle(head_dim: int, shared: int, page: int) -> str:
    """Why our own decode cannot run on a Hopper GPU; "" if it can."""
    if head_dim not in HOPPER_HEAD_DIMS or shared > HOPPER_MOST_SHARED or page % HOPPER_TILE:
        return (
            f"ours takes head_dim {HOPPER_HEAD_DIMS}, at most {HOPPER_MOST_SHARED} query heads per KV head and blocks "
            f"of multiples of {HOPPER_TILE} tokens, not {head_dim}, {shared} and {page}"
        )
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.bindings") is None:
        return "ours needs cuda-bindings; pip install 'superinfer[cuda]'"
    return ""


def choose_attention(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, shared: int = 1, page: int = 16
) -> Choice:
    """The table.

    capability: of the GPU, (9, 0) for Hopper. shared: query heads per KV head. page: tokens of a block.
    """
    obstacle = _flashinfer_obstacle()
    if obstacle:
        return Choice("triton", "triton", obstacle)
    if dtype not in (torch.float16, torch.bfloat16):
        return Choice("triton", "triton", f"FlashInfer computes in half precision; this model is {dtype}")
    if head_dim not in FLASHINFER_HEAD_DIMS:
        return Choice("triton", "triton", f"FlashInfer has no kernels for head_dim={head_dim}")
    if capability < (8, 0):
        return Choice("triton", "triton", f"FlashInfer wants compute capability 8.0; this GPU has {capability}")
    if capability[0] == 9:
        # Causal prefill 8 × 1024 tokens on an H100: 321 TFLOP/s with fa3, 248 with fa2. fa3 has no decode of its own.
        why = "Hopper: fa3 prefill is 1.3 × fa2; "
        if obstacle := _hopper_obstacle(head_dim, shared, page):
            return Choice("flashinfer-fa2", "flashinfer-fa3", f"{why}tensor-core decode, for {obstacle}")
        return Choice("hopper", "flashinfer-fa3", f"{why}decodes without windows need no plan")
    return Choice("flashinfer-fa2", "flashinfer-fa2", "fa3 needs Hopper; tensor-core decode")
