"""Builds the CUDA executor: picks the attention, measures what a step needs, gives the rest of the memory to KV."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from superinfer.errors import ModelLoadError
from superinfer.kernels.paged import (
    AttentionByLayer,
    AttentionCall,
    Choice,
    PagedBatch,
    choose_attention,
)
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.engine.cuda_attention import StepAttention
from superinfer.runtime.engine.cuda_executor import CudaExecutor
from superinfer.runtime.engine.cuda_mixed import CapturedChunks, graph_rows
from superinfer.runtime.engine.cuda_rehearsal import rehearse
from superinfer.runtime.engine.cuda_tier import add_cuda_tier
from superinfer.runtime.engine.cuda_tuning import tune_linears
from superinfer.runtime.engine.model_executor import executor_limits
from superinfer.runtime.models.decoder import CausalLM
from superinfer.runtime.models.loader import Progress

if TYPE_CHECKING:
    from superinfer.kernels.paged_hopper import Geometry, HopperKernel

log = logging.getLogger("superinfer.engine")

# Of the device's whole memory; what is left is for the CUDA context, libraries loaded later and fragmentation.
MEMORY_SHARE = 0.92
# Activations and tiles of the captured graphs, which share one pool: 0.4 GB for Llama-3-8B at batch 256.
GRAPH_BYTES = 1 << 30
# Float32 and float64 copies of the logits that the general sampler holds at its peak.
SAMPLER_BYTES_PER_LOGIT = 48


def build_cuda_executor(
    config: EngineConfig, model: CausalLM, length: int, path: str, on_progress: Progress | None
) -> CudaExecutor:
    """length: tokens of the longest sequence wanted. Raises ModelLoadError where no room is left for KV."""
    device, dtype, shape = model.lm_head.weight.device, model.lm_head.weight.dtype, model.config
    shared = shape.num_heads // shape.num_kv_heads
    choice = choose_attention(torch.cuda.get_device_capability(device), dtype, shape.head_dim, shared, config.page_size)
    log.info("attention: %s for decodes, %s for prefill: %s", *choice)
    if on_progress is not None:
        on_progress("preparing attention kernels", 0.0)
    attention = make_attention(choice, config, model)
    if config.tune_products:
        tune_linears(model, config.max_batch_size + config.max_batch_tokens, on_progress)
    pool_tokens = config.kv_tokens
    if pool_tokens is None:
        captured = 0 if attention.captured is None else graph_rows(config.max_batch_size + config.max_batch_tokens)[-1]
        pool_tokens = _kv_bytes(config, model, captured) // shape.kv_bytes_per_token(dtype)
        if pool_tokens < config.page_size:
            raise ModelLoadError(
                f"{torch.cuda.get_device_name(device)} has no memory left for a KV block beside the weights and a step "
                f"of max_batch_tokens={config.max_batch_tokens}; lower it, or use a larger GPU"
            )
    limits = executor_limits(config, shape, length, pool_tokens)
    executor = CudaExecutor(
        model,
        limits,
        attention,
        max_batch_tokens=config.max_batch_tokens,
        model_name=config.model,
        path=path,
        on_progress=on_progress,
    )
    rehearse(executor, config.max_batch_tokens, on_progress)
    if config.dram_tokens:
        add_cuda_tier(executor, config.dram_tokens // config.page_size, on_progress)
    return executor


def make_attention(choice: Choice, config: EngineConfig, model: CausalLM) -> StepAttention:
    """What `choice` names."""
    shape, device, dtype = model.config, model.lm_head.weight.device, model.lm_head.weight.dtype
    scale = shape.head_dim**-0.5
    if choice.decode == "triton":
        from superinfer.kernels.paged_triton import TritonAttention

        def triton_attention(_: PagedBatch | None = None) -> AttentionCall:
            return AttentionByLayer(shape.windows, lambda window: TritonAttention(scale, window))

        return StepAttention(triton_attention, triton_attention())
    from superinfer.kernels import paged_flashinfer as flashinfer

    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    sizes = shape.num_heads, shape.num_kv_heads, shape.head_dim, config.page_size
    needed = flashinfer.workspace_bytes(
        config.max_batch_size, shape.num_heads, shape.head_dim, multiprocessors, sizes[1]
    )
    backend = choice.prefill.removeprefix("flashinfer-")
    wanted = {(backend, window is not None) for window in shape.windows}
    wanted |= {("fa2", window is not None) for window in shape.windows if not _is_ours(choice, window)}
    flashinfer.compile_modules(wanted, dtype, shape.head_dim)
    workspace = torch.zeros(needed, dtype=torch.uint8, device=device)
    # Decodes and chunks of one step are all planned before any runs: each window's plans have places of their own.
    uploads = torch.cuda.Stream(device)
    windows = list(dict.fromkeys(shape.windows))
    plans = {window: torch.zeros(flashinfer.PLAN_BYTES, dtype=torch.uint8, device=device) for window in windows}
    decode_stages = {window: flashinfer.PlanStage(device, uploads) for window in windows}

    def prefill(window: int | None) -> AttentionCall:
        stage = flashinfer.PlanStage(device, uploads)
        return flashinfer.FlashInferPrefill(workspace, stage, backend, *sizes, scale, dtype, window)

    kernels: dict[Geometry, HopperKernel] = {}

    def decode(batch: PagedBatch) -> AttentionCall:
        def of(window: int | None) -> AttentionCall:
            if _is_ours(choice, window):
                from superinfer.kernels.paged_hopper import HopperDecode, geometry_for

                geometry = geometry_for(batch.sequences, shape.num_kv_heads, shape.head_dim)
                if geometry not in kernels:
                    kernels[geometry] = _hopper_kernel(config, model, geometry)
                return HopperDecode(kernels[geometry])
            places = workspace, plans[window], decode_stages[window]
            return flashinfer.FlashInferDecode(*places, batch, *sizes, scale, dtype, window)

        return AttentionByLayer(shape.windows, of)

    def fresh(window: int | None) -> AttentionCall:
        stage = flashinfer.PlanStage(device, uploads)
        return flashinfer.FlashInferFresh(workspace, stage, backend, *sizes[:3], scale, dtype, window)

    attention = StepAttention(decode, AttentionByLayer(shape.windows, prefill))
    if backend == "fa3":
        rows = graph_rows(config.max_batch_size + config.max_batch_tokens)[-1]
        captured = _captured_chunks(rows, workspace, uploads, sizes, model)
        attention = attention._replace(fresh=AttentionByLayer(shape.windows, fresh), captured=captured)
    return attention


def _is_ours(choice: Choice, window: int | None) -> bool:
    """Whether decodes of layers with such a window are our own kernel's; else FlashInfer's fa2."""
    return choice.decode == "hopper" and window is None


def _captured_chunks(
    rows: int, workspace: torch.Tensor, uploads: torch.cuda.Stream, sizes: tuple[int, int, int, int], model: CausalLM
) -> CapturedChunks:
    """rows: the most of any graph. sizes: heads, KV heads, head size, page."""
    from superinfer.kernels import flashinfer_chunks as chunks

    device, dtype, windows = workspace.device, model.lm_head.weight.dtype, model.config.windows
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    size = chunks.plan_bytes(rows, sizes[0], sizes[2], multiprocessors)
    plans = {window: chunks.ChunkPlans(device, size, uploads) for window in dict.fromkeys(windows)}

    def make(rows: int, kv_indices: torch.Tensor) -> AttentionCall:
        def of(window: int | None) -> AttentionCall:
            places = workspace, plans[window], rows, kv_indices
            return chunks.FlashInferChunks(*places, *sizes, sizes[2] ** -0.5, dtype, window)

        return AttentionByLayer(windows, of)

    return CapturedChunks(make, chunks.MOST_CHUNKS)


def _hopper_kernel(config: EngineConfig, model: CausalLM, geometry: Geometry) -> HopperKernel:
    from superinfer.kernels.paged_hopper import HopperKernel

    shape, weight = model.config, model.lm_head.weight
    return HopperKernel(
        shape.num_heads, shape.num_kv_heads, shape.head_dim, config.page_size, shape.head_dim**-0.5, weight.dtype,
        config.max_batch_size, weight.device, geometry,
    )  # fmt: skip


class _NoAttention:
    """Stands in for attention while memory is measured: the same shapes, no cache."""

    def rotate_and_attend(
        self, layer: int, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """See AttentionBackend."""
        kv_heads = self._kv_heads
        if qkv.dim() == 4:  # in parts
            qkv = qkv.sum(0).to(cos.dtype)
        return qkv[:, : qkv.shape[1] - 2 * kv_heads].flatten(1)

    def __init__(self, kv_heads: int) -> None:
        self._kv_heads = kv_heads


@torch.inference_mode()
def _kv_bytes(config: EngineConfig, model: CausalLM, captured: int) -> int:
    """Device memory left when the largest step has what it needs, measured by running its dense part once.

    captured: rows of the largest graph of steps with chunks, which keeps the memory of its step; 0: there are none.
    """
    device, shape = model.lm_head.weight.device, model.config
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    ids = torch.zeros(config.max_batch_tokens, dtype=torch.int32, device=device)
    hidden = model(ids, ids, _NoAttention(shape.num_kv_heads))
    del hidden
    step = torch.cuda.max_memory_allocated(device) - before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    sampler = config.max_batch_size * shape.vocab_size * SAMPLER_BYTES_PER_LOGIT
    graphs = GRAPH_BYTES + int(step * min(1.0, captured / config.max_batch_tokens))
    left = free - int(total * (1 - MEMORY_SHARE)) - step - sampler - graphs
    return max(0, left)
