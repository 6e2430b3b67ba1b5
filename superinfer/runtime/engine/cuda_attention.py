"""The attention of one eager step on a GPU: decodes, prefill chunks that go on, and those that begin, apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from superinfer.kernels import fused
from superinfer.kernels.paged import AttentionByLayer, AttentionCall, PagedBatch, Projected
from superinfer.runtime.engine.cuda_mixed import CapturedChunks


class StepAttention(NamedTuple):
    """What a step's rows are attended with.

    decodes: makes the attention of one bucket, whose buffers it is given. chunks: of any prefill chunks. fresh: of
    those that begin their sequence, where that is quicker over the step's own keys and values; its `kv` is [2, rows,
    kv_heads, head_dim]. captured: of chunks within graphs. None: there is no such attention.
    """

    decodes: Callable[[PagedBatch], AttentionCall]
    chunks: AttentionCall
    fresh: AttentionCall | None = None
    captured: CapturedChunks | None = None


class Part(NamedTuple):
    """Rows of a step that one call answers. fresh: from the step's own keys and values rather than the cache's."""

    rows: int
    call: AttentionCall
    fresh: bool = False


class SplitAttention:
    """Implements `AttentionBackend` for one step: rotation and KV writes of all rows, then each part's attention; of a
    step of decodes alone one kernel does all that where it can."""

    def __init__(self, views: list[torch.Tensor], places: torch.Tensor, kv_heads: int, parts: list[Part]) -> None:
        """views: the cache by layer. places: [rows] int32, where keys and values go. parts: in order of the rows."""
        self._views = views
        self._places = places
        self._kv_heads = kv_heads
        self._parts = parts
        self._keeps = any(part.fresh for part in parts)

    def rotate_and_attend(
        self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See AttentionBackend. `scale` is the model's, which the calls were made with."""
        kv = self._views[layer]
        only = self._parts[0].call
        rotating = only.rotating(layer) if len(self._parts) == 1 and isinstance(only, AttentionByLayer) else None
        if rotating is not None:
            out = kv.new_empty(qkv.shape[-3], qkv.shape[-2] - 2 * self._kv_heads, kv.shape[-1])
            rotating.rotate_and_run(Projected(qkv, cos, sin), kv, out)
            return out.flatten(1)
        kept = kv.new_empty(2, qkv.shape[-3], self._kv_heads, kv.shape[-1]) if self._keeps else None
        q = fused.rope_and_store(qkv, cos, sin, self._places, kv, self._kv_heads, kept=kept)
        out = torch.empty_like(q)
        first = 0
        for rows, call, fresh in self._parts:
            end = first + rows
            source = kept[:, first:end] if fresh and kept is not None else kv
            call.run(q[first:end], source, layer, out[first:end])
            first = end
        return out.flatten(1)
