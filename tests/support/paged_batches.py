"""Random paged batches over a scattered, NaN-poisoned block-first cache, and the dense answer to them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from superinfer.kernels.paged import PagedBatch


@dataclass
class Case:
    """dense: per sequence, keys and values [2, context, kv_heads, head_dim] as they lie in `layer` of the cache."""

    batch: PagedBatch
    q: torch.Tensor
    cache: torch.Tensor
    layer: int
    dense: list[torch.Tensor]
    queries: tuple[int, ...]


def make_batch(
    queries: tuple[int, ...],
    contexts: tuple[int, ...],
    heads: int,
    kv_heads: int,
    head_dim: int,
    page: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> Case:
    """contexts: tokens of each sequence in all, of which the last `queries` ask."""
    torch.manual_seed(seed)
    layers, layer = 3, 1
    pages = [-(-context // page) for context in contexts]
    total = sum(pages)
    free = torch.randperm(total + 3).tolist()
    cache = torch.full((total + 3, layers, 2, page, kv_heads, head_dim), float("nan"), dtype=dtype)
    indices, dense = [], []
    for context, count in zip(contexts, pages, strict=True):
        blocks = [free.pop() for _ in range(count)]
        kv = torch.randn(2, context, kv_heads, head_dim).to(dtype)
        for position in range(context):
            cache[blocks[position // page], layer, :, position % page] = kv[:, position]
        # Cells behind the context are read and masked by some kernels: they must be numbers, as in an engine's cache.
        cache[blocks[-1], layer, :, (context - 1) % page + 1 :] = 0
        indices += blocks
        dense.append(kv)
    ints = dict(dtype=torch.int32)
    host = [
        torch.tensor([0, *queries], **ints).cumsum(0, dtype=torch.int32),
        torch.tensor([0, *pages], **ints).cumsum(0, dtype=torch.int32),
        torch.tensor(indices, **ints),
        torch.tensor([(context - 1) % page + 1 for context in contexts], **ints),
    ]
    batch = PagedBatch(*(t.to(device) for t in host), *host, max(queries))
    q = torch.randn(sum(queries), heads, head_dim).to(device, dtype)
    return Case(batch, q, cache.to(device), layer, dense, queries)


def dense_answer(case: Case, scale: float = 0.3, window: int | None = None) -> torch.Tensor:
    """[rows, heads, head_dim] float32 on the CPU, computed in float64."""
    rows = []
    heads = case.q.shape[1]
    for q, kv in zip(case.q.cpu().double().split(list(case.queries)), case.dense, strict=True):
        k, v = kv.double().repeat_interleave(heads // kv.shape[2], 2)
        mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        if window is not None:
            mask = mask.triu(len(k) - len(q) - window + 1)
        score = torch.einsum("qhd,khd->hqk", q, k) * scale
        rows.append(torch.einsum("hqk,khd->qhd", score.masked_fill(~mask, -torch.inf).softmax(-1), v))
    return torch.cat(rows).float()
