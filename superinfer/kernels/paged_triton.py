"""Paged attention in Triton, for what FlashInfer does not take: float32, head sizes of its own choosing, older GPUs.

One program answers a tile of one sequence's queries for one KV head and walks the whole context that they attend to,
so a single long sequence fills few of a GPU's cores; that is the price of being general.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from superinfer.kernels.paged import PagedBatch

NO_WINDOW = 1 << 30  # tokens: longer than any context, and far from overflow when subtracted
LOWEST = tl.constexpr(-1e30)  # below any score, and finite


@triton.jit
def _paged_attention(
    q, kv, out, qo_indptr, kv_indptr, kv_indices, last_page_len,
    scale, window, page, block_step, value_step, offset_step,
    SHARED: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEADS_2: tl.constexpr, DIM_2: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    group = tl.program_id(2)
    first_row = tl.load(qo_indptr + sequence)
    queries = tl.load(qo_indptr + sequence + 1) - first_row
    first_query = tl.program_id(1) * QUERIES
    if first_query >= queries:
        return
    first_page = tl.load(kv_indptr + sequence)
    pages = tl.load(kv_indptr + sequence + 1) - first_page
    context = (pages - 1) * page + tl.load(last_page_len + sequence)

    # Rows of the tile are (query, head) pairs: all heads that share a KV head read its keys once.
    row = tl.arange(0, QUERIES * HEADS_2)
    query, head = first_query + row // HEADS_2, row % HEADS_2
    d = tl.arange(0, DIM_2)
    wanted = (query < queries) & (head < SHARED)
    inside = d < HEAD_DIM
    at = ((first_row + query).to(tl.int64) * (KV_HEADS * SHARED) + group * SHARED + head) * HEAD_DIM
    here = wanted[:, None] & inside[None, :]
    tile = tl.load(q + at[:, None] + d[None, :], mask=here, other=0.0)
    position = context - queries + query

    # Finite, for a query may see none of the first keys, which only the tile's earlier ones do: -inf - -inf is NaN.
    maximum = tl.full((QUERIES * HEADS_2,), LOWEST, tl.float32)
    total = tl.zeros((QUERIES * HEADS_2,), tl.float32)
    result = tl.zeros((QUERIES * HEADS_2, DIM_2), tl.float32)
    end = tl.minimum(context, context - queries + first_query + QUERIES)
    begin = tl.maximum(0, context - queries + first_query + 1 - window)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        known = key < end
        block = tl.load(kv_indices + first_page + key // page, mask=known, other=0).to(tl.int64)
        cell = kv + block * block_step + (key % page) * offset_step + group * HEAD_DIM
        here_kv = known[:, None] & inside[None, :]
        k = tl.load(cell[:, None] + d[None, :], mask=here_kv, other=0.0)
        score = tl.dot(tile, tl.trans(k), input_precision="ieee") * scale
        seen = (key[None, :] <= position[:, None]) & (key[None, :] > position[:, None] - window)
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(maximum, tl.max(score, axis=1))
        shrink = tl.exp(maximum - higher)
        weight = tl.exp(score - higher[:, None])
        v = tl.load(cell[:, None] + value_step + d[None, :], mask=here_kv, other=0.0)
        total = total * shrink + tl.sum(weight, axis=1)
        result = result * shrink[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        maximum = higher
    result = result / total[:, None]
    tl.store(out + at[:, None] + d[None, :], result.to(out.dtype.element_ty), mask=here)


class TritonAttention:
    """Implements `AttentionCall`; nothing to prepare on the host but the longest query."""

    skips_empty = False
    reads_lengths = False

    def __init__(self, scale: float, window: int | None = None) -> None:
        self._scale = scale
        self._window = NO_WINDOW if window is None else window
        self._batch: PagedBatch | None = None

    def plan(self, batch: PagedBatch) -> None:
        """See AttentionCall.plan."""
        self._batch = batch

    def run(self, q: torch.Tensor, kv: torch.Tensor, layer: int = 0, out: torch.Tensor | None = None) -> torch.Tensor:
        """See AttentionCall.run."""
        batch = self._batch
        assert batch is not None, "run() before plan()"
        _, heads, head_dim = q.shape
        kv_heads = kv.shape[3]
        shared = heads // kv_heads
        heads_2 = triton.next_power_of_2(shared)
        queries = max(1, 16 // heads_2)  # tl.dot wants at least 16 rows
        if batch.longest_query > 64:
            queries = max(queries, 64 // heads_2)
        dim_2 = max(16, triton.next_power_of_2(head_dim))
        out = torch.empty_like(q) if out is None else out
        grid = (batch.sequences, triton.cdiv(batch.longest_query, queries), kv_heads)
        _paged_attention[grid](
            q, kv, out, batch.qo_indptr, batch.kv_indptr, batch.kv_indices, batch.last_page_len,
            self._scale, self._window, kv.shape[2], kv.stride(0), kv.stride(1), kv.stride(2),
            SHARED=shared, KV_HEADS=kv_heads, HEAD_DIM=head_dim,
            HEADS_2=heads_2, DIM_2=dim_2, QUERIES=queries, KEYS=32,
        )  # fmt: skip
        return out
