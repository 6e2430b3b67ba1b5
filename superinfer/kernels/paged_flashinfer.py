"""FlashInfer's paged attention behind `AttentionCall` (Ye et al. 2025): tensor-core decode and chunked prefill."""

from __future__ import annotations

import torch
from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper
from flashinfer.decode import fast_decode_plan

from superinfer.kernels.paged import PagedBatch

# Plans are lists of tiles: 20 bytes for each of at most some thousand tiles.
PLAN_BYTES = 1 << 20
PACKED_ROWS = 16  # query rows of a decode tile, the heads that share a KV head, padded


def workspace_bytes(max_batch: int, heads: int, head_dim: int, multiprocessors: int, kv_heads: int) -> int:
    """What split contexts need: float32 partial results of every tile a decode may be cut into."""
    tiles = max(max_batch, 2 * multiprocessors // kv_heads)
    split = heads * tiles * PACKED_ROWS * (head_dim + 1) * 4
    return max(256 << 20, split + (16 << 20))


def _window_left(window: int | None) -> int:
    """FlashInfer counts the tokens before the position itself, and takes -1 for all."""
    return -1 if window is None else window - 1


class FlashInferDecode:
    """One query per sequence, for a fixed number of sequences whose index buffers never move.

    May be captured in a CUDA graph: `run` reads only those buffers and the plan, which `plan` refreshes on the device.
    """

    def __init__(
        self, workspace: torch.Tensor, plans: torch.Tensor, shape: PagedBatch, heads: int, kv_heads: int, head_dim: int,
        page: int, scale: float, dtype: torch.dtype, window: int | None = None,
    ) -> None:  # fmt: skip
        """workspace, plans: uint8 on the device, shared by all calls of a stream. shape: holds the buffers."""
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
        self._sizes = (heads, kv_heads, head_dim, page)
        self._settings = dict(window_left=_window_left(window), sm_scale=scale, q_data_type=dtype, kv_data_type=dtype)
        self._planned = False

    def plan(self, batch: PagedBatch) -> None:
        """See AttentionCall.plan. The batch's device tensors must be the buffers of the constructor."""
        host = batch.host_kv_indptr, batch.host_kv_indices, batch.host_last_page_len
        if self._planned:  # the buffers are filled already: only the tiles are planned anew, 4 × faster
            fast_decode_plan(
                self._wrapper, *host, *self._sizes, **self._settings, global_override_indptr_cpu=batch.host_kv_indptr
            )
        else:
            self._wrapper.plan(*host, *self._sizes, **self._settings)
            self._planned = True

    def run(self, q: torch.Tensor, kv: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """See AttentionCall.run."""
        out: torch.Tensor = self._wrapper.run(q, kv)
        return out


class FlashInferPrefill:
    """Any number of queries per sequence, any batch; not for capture. backend: "fa2" or "fa3"."""

    def __init__(
        self, workspace: torch.Tensor, plans: torch.Tensor, backend: str, heads: int, kv_heads: int, head_dim: int,
        page: int, scale: float, dtype: torch.dtype, window: int | None = None,
    ) -> None:  # fmt: skip
        self._wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend=backend)
        self._wrapper.reset_workspace_buffer(workspace, plans)
        self._sizes = (heads, kv_heads, head_dim, page)
        self._settings = dict(
            causal=True, window_left=_window_left(window), sm_scale=scale, q_data_type=dtype, kv_data_type=dtype
        )

    def plan(self, batch: PagedBatch) -> None:
        """See AttentionCall.plan."""
        host = batch.host_qo_indptr, batch.host_kv_indptr, batch.host_kv_indices, batch.host_last_page_len
        self._wrapper.plan(*host, *self._sizes, **self._settings)

    def run(self, q: torch.Tensor, kv: torch.Tensor, layer: int = 0) -> torch.Tensor:
        """See AttentionCall.run."""
        out: torch.Tensor = self._wrapper.run(q, kv)
        return out
