"""FlashInfer's paged attention behind `AttentionCall` (Ye et al. 2025): tensor-core decode and chunked prefill.

A plan is made on the host and copied to the device by FlashInfer, through the copy engine. In the model's stream such
a copy would stand behind whatever KV blocks are on their way (see `host_memory`), and the step behind it. So plans
travel on a stream of their own, while the step before still runs, into staging that alternates between two steps.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from flashinfer import (
    BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
)
from flashinfer.decode import fast_decode_plan
from flashinfer.jit.attention import gen_batch_prefill_module

from superinfer.kernels import host_memory
from superinfer.kernels.paged import PagedBatch

# Plans are lists of tiles: 20 bytes for each of at most some thousand tiles.
PLAN_BYTES = 1 << 20
PACKED_ROWS = 16  # query rows of a decode tile, the heads that share a KV head, padded
FILES = 8  # of a module that compile for long: as many modules at once as there are cores for
STAGES = 2  # steps that may be under way


def workspace_bytes(max_batch: int, heads: int, head_dim: int, multiprocessors: int, kv_heads: int) -> int:
    """What split contexts need: float32 partial results of every tile a decode may be cut into."""
    tiles = max(max_batch, 2 * multiprocessors // kv_heads)
    split = heads * tiles * PACKED_ROWS * (head_dim + 1) * 4
    return max(256 << 20, split + (16 << 20))


def compile_modules(wanted: Collection[tuple[str, bool]], dtype: torch.dtype, dim: int) -> None:
    """Compile what calls will want and what no earlier start has left in FlashInfer's cache: side by side, for a module
    alone, of ten files or so, does not keep a machine busy. wanted: backends, and whether a window limits attention."""
    modules = [
        gen_batch_prefill_module(backend, dtype, dtype, dtype, torch.int32, dim, dim, 0, windowed, False, False)
        for backend, windowed in sorted(set(wanted))
    ]
    missing = [module for module in modules if not module.is_compiled]
    if missing:
        at_once = max(1, (os.cpu_count() or 1) // FILES)
        with ThreadPoolExecutor(min(at_once, len(missing))) as pool:
            list(pool.map(lambda module: module.build(verbose=False), missing))


def _window_left(window: int | None) -> int:
    """FlashInfer counts the tokens before the position itself, and takes -1 for all."""
    return -1 if window is None else window - 1


class PlanStage:
    """Where plans lie on their way: pinned memory and its twin on the device, for each of the steps under way.

    Shared by calls of which one is planned a step.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream) -> None:
        """stream: of all plans; not the model's."""
        self._stream = stream
        self._host = [torch.zeros(PLAN_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(STAGES)]
        self._there = [torch.zeros(PLAN_BYTES, dtype=torch.uint8, device=device) for _ in range(STAGES)]
        self._sent = [torch.cuda.Event() for _ in range(STAGES)]
        self._taken = [torch.cuda.Event() for _ in range(STAGES)]
        self._at = 0

    @contextmanager
    def planning(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(pinned, device) to plan into. Copies made within go beside the model's stream, which waits at the end."""
        self._at = at = (self._at + 1) % STAGES
        self._sent[at].synchronize()  # two plans ago
        self._stream.wait_event(self._taken[at])
        with torch.cuda.stream(self._stream):
            yield self._host[at], self._there[at]
            self._sent[at].record()
        torch.cuda.current_stream().wait_event(self._sent[at])

    def taken(self) -> None:
        """The model's stream has, when it comes here, done all that reads the last plan's staging."""
        self._taken[self._at].record()


class FlashInferDecode:
    """One query per sequence, for a fixed number of sequences whose index buffers never move.

    May be captured in a CUDA graph: `run` reads only those buffers and the plan, which `plan` refreshes on the device.
    """

    skips_empty = False
    reads_lengths = True

    def __init__(
        self, workspace: torch.Tensor, plans: torch.Tensor, stage: PlanStage, shape: PagedBatch, heads: int,
        kv_heads: int, head_dim: int, page: int, scale: float, dtype: torch.dtype, window: int | None = None,
    ) -> None:  # fmt: skip
        """workspace: uint8 on the device, shared by all calls of a stream. plans: [PLAN_BYTES], shared by calls of
        which one is planned a step, as `stage` is. shape: holds the buffers."""
        self._wrapper = BatchDecodeWithPagedKVCacheWrapper(
            workspace,
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=True,
            paged_kv_indptr_buffer=shape.kv_indptr,
            paged_kv_indices_buffer=shape.kv_indices,
            paged_kv_last_page_len_buffer=shape.last_page_len,
        )
        self._wrapper.reset_workspace_buffer(workspace, plans)
        self._plans = plans
        self._stage = stage
        self._sizes = (heads, kv_heads, head_dim, page)
        self._settings = dict(window_left=_window_left(window), sm_scale=scale, q_data_type=dtype, kv_data_type=dtype)
        self._planned = False

    def plan(self, batch: PagedBatch) -> None:
        """See AttentionCall.plan. The batch's device tensors must be the buffers of the constructor."""
        host = batch.host_kv_indptr, batch.host_kv_indices, batch.host_last_page_len
        wrapper = self._wrapper
        if not self._planned:
            wrapper.plan(*host, *self._sizes, **self._settings)
            self._planned = True
            return
        # The buffers are filled already: only the tiles are planned anew, 4 × faster.
        with self._stage.planning() as (pinned, there):
            wrapper._pin_memory_int_workspace_buffer, wrapper._int_workspace_buffer = pinned, there
            try:
                fast_decode_plan(
                    wrapper, *host, *self._sizes, **self._settings, global_override_indptr_cpu=batch.host_kv_indptr
                )
            finally:
                wrapper._int_workspace_buffer = self._plans  # what `run` reads, and graphs hold
        host_memory.copy(self._plans, there)
        self._stage.taken()

    def run(self, q: torch.Tensor, kv: torch.Tensor, layer: int = 0, out: torch.Tensor | None = None) -> torch.Tensor:
        """See AttentionCall.run."""
        answer: torch.Tensor = self._wrapper.run(q, kv, out=out)
        return answer


class FlashInferPrefill:
    """Any number of queries per sequence, any batch; not for capture. backend: "fa2" or "fa3"."""

    skips_empty = False
    reads_lengths = True

    def __init__(
        self, workspace: torch.Tensor, stage: PlanStage, backend: str, heads: int, kv_heads: int, head_dim: int,
        page: int, scale: float, dtype: torch.dtype, window: int | None = None,
    ) -> None:  # fmt: skip
        """workspace, stage: as for FlashInferDecode."""
        self._wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
        self._stage = stage
        self._used: list[tuple[torch.Tensor, ...]] = []
        self._sizes = (heads, kv_heads, head_dim, page)
        self._settings = dict(
            causal=True, window_left=_window_left(window), sm_scale=scale, q_data_type=dtype, kv_data_type=dtype
        )

    def plan(self, batch: PagedBatch) -> None:
        """See AttentionCall.plan."""
        wrapper = self._wrapper
        self._stage.taken()  # by the runs of the last plan, which all have been given to the stream
        host = batch.host_qo_indptr, batch.host_kv_indptr, batch.host_kv_indices, batch.host_last_page_len
        with self._stage.planning() as (pinned, there):
            wrapper._pin_memory_int_workspace_buffer, wrapper._int_workspace_buffer = pinned, there
            wrapper.plan(*host, *self._sizes, **self._settings)
        # They come from the other stream's memory, which must not be given out again while steps read them.
        held = wrapper._qo_indptr_buf, wrapper._paged_kv_indptr_buf, wrapper._paged_kv_indices_buf
        self._used = [*self._used[-STAGES:], (*held, wrapper._paged_kv_last_page_len_buf)]

    def run(self, q: torch.Tensor, kv: torch.Tensor, layer: int = 0, out: torch.Tensor | None = None) -> torch.Tensor:
        """See AttentionCall.run."""
        if out is None:
            out = torch.empty_like(q)  # FlashInfer's own would be filled with zeros first
        answer: torch.Tensor = self._wrapper.run(q, kv, out=out)
        return answer


class FlashInferFresh:
    """Prompts from their first token on: keys and values are the step's own rows, one after another, where FlashInfer
    need not gather them by block (8,000 tokens on an H200: 797 us a layer instead of 947). Not for capture."""

    skips_empty = False
    reads_lengths = True

    def __init__(
        self, workspace: torch.Tensor, stage: PlanStage, backend: str, heads: int, kv_heads: int, head_dim: int,
        scale: float, dtype: torch.dtype, window: int | None = None,
    ) -> None:  # fmt: skip
        """workspace, stage: as for FlashInferDecode. backend: "fa2" or "fa3"."""
        self._wrapper = BatchPrefillWithRaggedKVCacheWrapper(workspace, "NHD", backend=backend)
        self._stage = stage
        self._used: list[tuple[torch.Tensor, ...]] = []
        self._sizes = (heads, kv_heads, head_dim)
        self._settings = dict(
            causal=True, window_left=_window_left(window), sm_scale=scale, q_data_type=dtype, kv_data_type=dtype
        )

    def plan(self, batch: PagedBatch) -> None:
        """See AttentionCall.plan. Of the batch only the queries are read: there is nothing before them."""
        wrapper = self._wrapper
        self._stage.taken()  # by the runs of the last plan, which all have been given to the stream
        with self._stage.planning() as (pinned, there):
            wrapper._pin_memory_int_workspace_buffer, wrapper._int_workspace_buffer = pinned, there
            wrapper.plan(batch.host_qo_indptr, batch.host_qo_indptr, *self._sizes, **self._settings)
        # They come from the other stream's memory, which must not be given out again while steps read them.
        self._used = [*self._used[-STAGES:], (wrapper._qo_indptr_buf, wrapper._kv_indptr_buf)]

    def run(self, q: torch.Tensor, kv: torch.Tensor, layer: int = 0, out: torch.Tensor | None = None) -> torch.Tensor:
        """See AttentionCall.run. kv: [2, rows, kv_heads, head_dim], keys and values of q's tokens."""
        if out is None:
            out = torch.empty_like(q)
        answer: torch.Tensor = self._wrapper.run(q, kv[0], kv[1], out=out)
        return answer
