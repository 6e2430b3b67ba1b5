"""What `bench kernels` times: each kernel at the sizes of one model's layer, with its alternatives and its floor.

Add a case by adding a function to CASES. On a GPU the first variant is the one engines use; "torch" is plain torch on
the same device. On a CPU there is only what CPU engines run.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from superinfer.kernels import activation, attention, norm, rope, sampling
from superinfer.kernels.paged import PagedBatch, TorchAttention, choose_attention
from superinfer.runtime.sim.shapes import ModelShape

PAGE = 16
EPS = 1e-5
Run = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """tokens: rows of the elementwise kernels. batch, context: of decode attention. prompt: tokens of prefill's."""

    shape: ModelShape
    device: torch.device
    dtype: torch.dtype
    tokens: int
    batch: int
    context: int
    prompt: int

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def randn(self, *sizes: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Random numbers of the setting's dtype, where it is."""
        return torch.randn(*sizes, device=self.device).to(dtype or self.dtype)

    @property
    def has_flashinfer(self) -> bool:
        """Whether FlashInfer is installed and takes this dtype."""
        return self.on_gpu and self.dtype != torch.float32 and importlib.util.find_spec("flashinfer") is not None


@dataclass(frozen=True)
class Case:
    """variants: calls by name, the engine's own first. bytes, flops: what none of them can do without."""

    name: str
    sizes: str
    variants: dict[str, Run]
    bytes: float
    flops: float = 0.0


def add_rms_norm(s: Setting) -> Case:
    """Residual addition and norm."""
    x, residual, weight = s.randn(s.tokens, s.shape.hidden), s.randn(s.tokens, s.shape.hidden), s.randn(s.shape.hidden)
    floor = torch.tensor(EPS**0.5, device=s.device)

    def plain() -> torch.Tensor:
        return F.rms_norm(residual.add_(x), (s.shape.hidden,), weight, EPS)

    variants: dict[str, Run] = {_ours(s): lambda: norm.add_rms_norm(x, residual, weight, floor), "torch": plain}
    if s.has_flashinfer:
        from flashinfer.norm import fused_add_rmsnorm

        variants["flashinfer"] = lambda: fused_add_rmsnorm(x, residual, weight, EPS)
    return Case("add_rms_norm", f"{s.tokens} x {s.shape.hidden}", variants, 4 * x.nbytes)


def silu_and_mul(s: Setting) -> Case:
    """The gated activation."""
    gate_up = s.randn(s.tokens, 2 * s.shape.intermediate)

    def plain() -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    variants: dict[str, Run] = {_ours(s): lambda: activation.silu_and_mul(gate_up), "torch": plain}
    if s.has_flashinfer:
        from flashinfer.activation import silu_and_mul as theirs

        variants["flashinfer"] = lambda: theirs(gate_up)
    return Case("silu_and_mul", f"{s.tokens} x {s.shape.intermediate}", variants, 1.5 * gate_up.nbytes)


def rope_and_store(s: Setting) -> Case:
    """Rotation of queries and keys, and the write of keys and values into a block-first cache."""
    shape, kv_heads = s.shape, s.shape.kv_heads
    qkv = s.randn(s.tokens, shape.heads + 2 * kv_heads, shape.head_dim)
    positions = torch.arange(s.tokens, device=s.device)
    frequencies = torch.rand(shape.head_dim // 2, device=s.device).repeat(2)
    cos, sin = rope.rope_angles(positions, frequencies, torch.ones(2, shape.head_dim, device=s.device), s.dtype)
    blocks = -(-s.tokens // PAGE)
    cache = torch.zeros(blocks, 2, 2, PAGE, kv_heads, shape.head_dim, dtype=s.dtype, device=s.device)
    rows = attention.layer_views(cache)[0]
    keys = positions // PAGE * (4 * PAGE) + positions % PAGE

    def plain() -> torch.Tensor:
        qk = rope.apply_rope(qkv[:, : shape.heads + kv_heads], cos, sin)
        rows.index_copy_(0, keys, qk[:, shape.heads :].flatten(1))
        rows.index_copy_(0, keys + PAGE, qkv[:, shape.heads + kv_heads :].flatten(1))
        return qk

    variants: dict[str, Run] = {"torch": plain}
    if s.on_gpu:
        from superinfer.kernels import fused

        places = positions.to(torch.int32)
        view = cache[:, 0]
        variants = {"triton": lambda: fused.rope_and_store(qkv, cos, sin, places, view, kv_heads), "torch": plain}
    return Case("rope_and_store", f"{s.tokens} tokens, {shape.heads}+2·{kv_heads} heads", variants, 2 * qkv.nbytes)


def decode_attention(s: Setting) -> Case:
    """One query a sequence, over a scattered cache."""
    q, cache, batch = _paged(s, [1] * s.batch, [s.context] * s.batch)
    heads = s.shape.heads
    read = 2 * s.batch * s.context * s.shape.kv_heads * s.shape.head_dim * q.element_size()
    flops = 4 * s.batch * s.context * heads * s.shape.head_dim
    return Case(
        "attention, decode", f"{s.batch} x {s.context}", _attention(s, q, cache, batch, decode=True), read, flops
    )


def prefill_attention(s: Setting) -> Case:
    """Causal attention of whole prompts."""
    count = max(1, s.tokens // s.prompt)
    q, cache, batch = _paged(s, [s.prompt] * count, [s.prompt] * count)
    flops = 4 * count * s.prompt * (s.prompt + 1) / 2 * s.shape.heads * s.shape.head_dim
    variants = _attention(s, q, cache, batch, decode=False)
    return Case("attention, prefill", f"{count} x {s.prompt}", variants, 2 * q.nbytes, flops)


def filters(s: Setting) -> Case:
    """The threshold of top_k 50 and top_p 0.9 over the vocabulary."""
    rows = s.batch
    scaled = sampling.temper(s.randn(rows, s.shape.vocab, dtype=torch.float32), torch.ones(rows, device=s.device))
    weights = scaled.double().exp()
    top_k = torch.full((rows,), 50, device=s.device)
    top_p = torch.full((rows,), 0.9, dtype=torch.float64, device=s.device)
    min_p = torch.zeros(rows, dtype=torch.float64, device=s.device)

    def by_sorting() -> torch.Tensor:
        in_order = scaled.sort(dim=-1, descending=True).values[:, :50]
        mass = in_order.double().exp().cumsum(dim=-1)
        kept = (mass - in_order.double().exp() < top_p[:, None] * mass[:, -1:]).sum(dim=-1, keepdim=True)
        return in_order.gather(1, kept.clamp(min=1) - 1)

    variants: dict[str, Run] = {
        _ours(s): lambda: sampling.filter_threshold(scaled, weights, top_k, top_p, min_p),
        "torch, by sorting": by_sorting,
    }
    return Case("top_k, top_p threshold", f"{rows} x {s.shape.vocab}", variants, scaled.nbytes)


CASES: tuple[Callable[[Setting], Case], ...] = (
    add_rms_norm,
    silu_and_mul,
    rope_and_store,
    decode_attention,
    prefill_attention,
    filters,
)


def _ours(s: Setting) -> str:
    return "triton" if s.on_gpu else "superinfer"


def _paged(s: Setting, queries: list[int], contexts: list[int]) -> tuple[torch.Tensor, torch.Tensor, PagedBatch]:
    """Random queries, a layer's view of a scattered block-first cache of two layers, and who asks what."""
    pages = [-(-context // PAGE) for context in contexts]
    cache = s.randn(sum(pages), 2, 2, PAGE, s.shape.kv_heads, s.shape.head_dim)
    host = (
        torch.tensor([0, *queries], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        torch.tensor([0, *pages], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        torch.randperm(sum(pages), dtype=torch.int32),
        torch.tensor([(context - 1) % PAGE + 1 for context in contexts], dtype=torch.int32),
    )
    qo, kv, blocks, last = (tensor.pin_memory() for tensor in host) if s.on_gpu else host
    there = [tensor.to(s.device) for tensor in (qo, kv, blocks, last)]
    batch = PagedBatch(there[0], there[1], there[2], there[3], qo, kv, blocks, last, max(queries))
    return s.randn(sum(queries), s.shape.heads, s.shape.head_dim), cache[:, 0], batch


def _attention(s: Setting, q: torch.Tensor, kv: torch.Tensor, batch: PagedBatch, *, decode: bool) -> dict[str, Run]:
    scale = s.shape.head_dim**-0.5
    reference = TorchAttention(scale)
    reference.plan(batch)
    if not s.on_gpu:
        return {"torch, reference": lambda: reference.run(q, kv)}
    from superinfer.kernels.paged_triton import TritonAttention

    general = TritonAttention(scale)
    general.plan(batch)
    variants: dict[str, Run] = {"triton": lambda: general.run(q, kv)}
    shared = s.shape.heads // s.shape.kv_heads
    choice = choose_attention(torch.cuda.get_device_capability(s.device), s.dtype, s.shape.head_dim, shared, PAGE)
    wanted = choice.decode if decode else choice.prefill
    if wanted == "triton":
        return variants
    if wanted != "hopper":
        return {**_flashinfer(s, q, kv, batch, scale, decode=decode, first=wanted), **variants}
    theirs = _flashinfer(s, q, kv, batch, scale, decode=True, first="flashinfer-fa2")
    return {"hopper": _hopper(s, q, kv, batch, scale), **theirs, **variants}


def _hopper(s: Setting, q: torch.Tensor, kv: torch.Tensor, batch: PagedBatch, scale: float) -> Run:
    from superinfer.kernels.paged_hopper import HopperDecode, HopperKernel, geometry_for

    sizes = s.shape.heads, s.shape.kv_heads, s.shape.head_dim
    geometry = geometry_for(batch.sequences, *sizes[1:])
    call = HopperDecode(HopperKernel(*sizes, PAGE, scale, s.dtype, batch.sequences, s.device, geometry))
    call.plan(batch)
    return lambda: call.run(q, kv)


def _flashinfer(
    s: Setting, q: torch.Tensor, kv: torch.Tensor, batch: PagedBatch, scale: float, *, decode: bool, first: str
) -> dict[str, Run]:
    from superinfer.kernels.paged_flashinfer import (
        PLAN_BYTES,
        FlashInferDecode,
        FlashInferPrefill,
        PlanStage,
        workspace_bytes,
    )

    shape = s.shape
    multiprocessors = torch.cuda.get_device_properties(s.device).multi_processor_count
    room = workspace_bytes(s.batch, shape.heads, shape.head_dim, multiprocessors, shape.kv_heads)
    workspace = torch.zeros(room, dtype=torch.uint8, device=s.device)
    plans = torch.zeros(PLAN_BYTES, dtype=torch.uint8, device=s.device)
    stage = PlanStage(s.device, torch.cuda.Stream(s.device))
    sizes = (shape.heads, shape.kv_heads, shape.head_dim, PAGE, scale, s.dtype)
    if decode:
        call = FlashInferDecode(workspace, plans, stage, batch, *sizes)
        call.plan(batch)
        return {first: lambda: call.run(q, kv)}

    def prefill(name: str) -> Run:
        chunks = FlashInferPrefill(workspace, stage, name.removeprefix("flashinfer-"), *sizes)

        def run() -> torch.Tensor:
            return chunks.run(q, kv)

        chunks.plan(batch)
        return run

    # One at a time: both plans lie in the same workspace.
    return {first: prefill(first)}
