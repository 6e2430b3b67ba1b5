"""Prefill chunks by FlashInfer's Hopper kernel, captured: one CUDA graph serves every batch of chunks up to its size.

The kernel is persistent: who computes what lies in lists of tiles that the plan writes, and all that a launch depends
on is where those lists and the block indices lie. FlashInfer's wrapper wants the number of sequences fixed for that;
its module, which is called here directly, does not.
"""

from __future__ import annotations

import torch
from flashinfer.prefill import get_batch_prefill_module

from superinfer.kernels import host_memory
from superinfer.kernels.paged import PagedBatch

MOST_CHUNKS = 64  # of one step
LISTS, WORD, ALIGNMENT = 7, 4, 16  # lists of tiles; bytes of a number in them; of their places
CAUSAL, NHD, NO_POSITIONS = 1, 0, 0  # FlashInfer's numbers


def tile_rows(head_dim: int) -> int:
    """Queries of a tile of the kernel."""
    return 192 if head_dim == 64 else 128


def plan_bytes(rows: int, heads: int, head_dim: int, multiprocessors: int) -> int:
    """What the plan of up to MOST_CHUNKS chunks takes that have `rows` rows together."""
    lists = LISTS * (WORD * heads * (-(-rows // tile_rows(head_dim)) + MOST_CHUNKS) + ALIGNMENT)
    return -(-(lists + WORD * (multiprocessors + 1)) // ALIGNMENT) * ALIGNMENT + ALIGNMENT


class ChunkPlans:
    """Where plans lie: pinned memory that FlashInfer writes, and the device's copy that launches read. Shared by calls
    of which one is planned a step.

    What FlashInfer itself sends goes astray on purpose: through the copy engine's queue it would wait behind KV blocks
    (see `host_memory`), so that a kernel of the model's stream fetches the plan instead.
    """

    def __init__(self, device: torch.device, size: int, stream: torch.cuda.Stream) -> None:
        """size: bytes. stream: for what goes astray."""
        self.pinned = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        self.device = torch.zeros(size, dtype=torch.uint8, device=device)
        self.astray = torch.empty(size, dtype=torch.uint8, device=device)
        self.stream = stream


class FlashInferChunks:
    """Implements `AttentionCall` for up to MOST_CHUNKS sequences whose block indices never move.

    Rows before the batch's first and behind its last are left alone. `run` may be captured in a CUDA graph; `plan`
    alone then feeds the replays.
    """

    skips_empty = False
    reads_lengths = True

    def __init__(
        self, workspace: torch.Tensor, plans: ChunkPlans, rows: int, kv_indices: torch.Tensor, heads: int,
        kv_heads: int, head_dim: int, page: int, scale: float, dtype: torch.dtype, window: int | None = None,
    ) -> None:  # fmt: skip
        """rows: the most of one step. kv_indices: the device buffer of block indices."""
        self._window = -1 if window is None else window - 1  # FlashInfer counts the tokens before the position itself
        self._module = get_batch_prefill_module(
            "fa3", dtype, dtype, dtype, torch.int32, head_dim, head_dim, NO_POSITIONS, window is not None, False, False
        )
        multiprocessors = torch.cuda.get_device_properties(workspace.device).multi_processor_count
        size = plan_bytes(rows, heads, head_dim, multiprocessors)
        self._workspace, self._plans, self._indices = workspace, plans, kv_indices
        self._places = plans.pinned[:size], plans.astray[:size], plans.device[:size]
        self._tile = tile_rows(head_dim)
        self._tiles = -(-rows // self._tile) + MOST_CHUNKS
        self._sizes = heads, kv_heads, page, True, head_dim, head_dim, True, self._window
        self._page = page
        self._scale = scale
        self._unused = torch.zeros(1, dtype=torch.int32, device=workspace.device)
        self._offsets: list[int] | None = None

    def plan(self, batch: PagedBatch) -> None:
        """See AttentionCall.plan. The batch's block indices are in the buffer of the constructor. Raises ValueError for
        more sequences than MOST_CHUNKS."""
        count = len(batch.host_last_page_len)
        if count > MOST_CHUNKS:
            raise ValueError(f"{count} chunks are planned at once; {MOST_CHUNKS} is the most")
        pages = batch.host_kv_indptr[1:] - batch.host_kv_indptr[:-1]
        lengths = (pages - 1) * self._page + batch.host_last_page_len
        pinned, astray, there = self._places
        # FlashInfer sizes its lists by rows and sequences: with so many rows they have one size whatever the batch.
        rows = (self._tiles - count + 1) * self._tile
        with torch.cuda.stream(self._plans.stream):
            offsets = self._module.plan(
                self._workspace, astray, pinned, batch.host_qo_indptr, batch.host_kv_indptr, lengths, rows, count,
                *self._sizes,
            )  # fmt: skip
        offsets = list(offsets)
        if self._offsets is not None and offsets != self._offsets:
            raise RuntimeError("FlashInfer planned into other places than what is captured reads")
        self._offsets = offsets
        host_memory.copy(there, pinned)

    def run(self, q: torch.Tensor, kv: torch.Tensor, layer: int = 0, out: torch.Tensor | None = None) -> torch.Tensor:
        """See AttentionCall.run."""
        assert self._offsets is not None, "run() before plan()"
        out = torch.empty_like(q) if out is None else out
        unused = self._unused
        self._module.paged_run(
            self._workspace, self._places[2], self._offsets, q, kv[:, 0], kv[:, 1], unused, unused, self._indices,
            unused, out, None, CAUSAL, NHD, self._window, False,
            None, None, None, None, None, None, 0.0, self._scale, None, None, None, 1.0, 1e4, 0, 0,
        )  # fmt: skip
        return out
