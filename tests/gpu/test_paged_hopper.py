"""Our decode attention for Hopper, over a strided block-first cache, against dense attention in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from paged_batches import Case, dense_answer, make_batch

from superinfer.kernels.paged import Projected
from superinfer.kernels.rope import rope_angles

SCALE = 0.1
CUDA = torch.device("cuda")
MIXED = (1, 16, 700, 33, 15, 17, 2000, 256)
GEOMETRIES = [
    (4, 3, 4),
    (4, 6, 1),
    (4, 6, 4),
    (4, 6, 50),
    (8, 2, 4),
    (8, 3, 1),
    (1, 8, 1),
]  # heads, stages, shortest span

pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9, reason="the kernel is for Hopper"
)


def decode_case(contexts: tuple[int, ...], sizes: tuple[int, int, int], page=16, dtype=torch.bfloat16, seed=0) -> Case:
    """Cells behind each context are NaN: the kernel must not let them through."""
    case = make_batch((1,) * len(contexts), contexts, *sizes, page, dtype, CUDA, seed)
    batch = case.batch
    last_blocks = batch.host_kv_indices[batch.host_kv_indptr[1:].long() - 1].tolist()
    for block, known in zip(last_blocks, batch.host_last_page_len.tolist(), strict=True):
        case.cache[block, case.layer, :, known:] = float("nan")
    return case


def make_kernel(sizes: tuple[int, int, int], page=16, dtype=torch.bfloat16, sequences=256, **kwargs):
    from superinfer.kernels.paged_hopper import HopperDecode, HopperKernel

    return HopperDecode(HopperKernel(*sizes, page, SCALE, dtype, sequences, CUDA, **kwargs))


def geometry_of(*numbers: int):
    from superinfer.kernels.paged_hopper import Geometry

    return Geometry(*numbers)


def answer(call, case: Case) -> torch.Tensor:
    out = torch.full_like(case.q, float("nan"))
    call.plan(case.batch)
    return call.run(case.q, case.cache[:, case.layer], case.layer, out)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.cpu().float() - expected).norm() / expected.norm()
    assert error < 5e-3, f"relative error {error:.4f}"


@pytest.mark.parametrize("page", [16, 48])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "sizes", [(32, 8, 128), (8, 2, 128), (14, 2, 64), (4, 4, 64), (64, 8, 128), (32, 32, 128), (5, 1, 128)]
)
def test_is_dense_attention(sizes, dtype, page):
    case = decode_case(MIXED, sizes, page, dtype)
    close(answer(make_kernel(sizes, page, dtype), case), dense_answer(case, SCALE))


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize(
    "contexts",
    [(1,), (20_000,), (4_200, 9_000, 2), (1,) * 200, (5000, *(3,) * 40, 1234), (520,) * 32, tuple(range(1, 129))],
)
def test_spans_that_share_a_sequence_add_up(contexts, geometry):
    sizes = 8, 2, 128
    call = make_kernel(sizes, geometry=geometry_of(*geometry))
    for seed in range(2):  # what the first call counted is not in the way of the second
        case = decode_case(contexts, sizes, seed=seed)
        close(answer(call, case), dense_answer(case, SCALE))


def test_scores_far_apart_do_not_overflow():
    case = decode_case((600, 2100), (8, 2, 128))
    case.q.mul_(40)
    close(answer(make_kernel((8, 2, 128)), case), dense_answer(case, SCALE))


def assert_a_graph_of(step, answers: Case, out: torch.Tensor) -> None:
    """Each replay of what `step` does leaves in `out` what dense attention answers."""
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(10):
        out.fill_(float("nan"))
        graph.replay()
        close(out, dense_answer(answers, SCALE))


@pytest.mark.parametrize("many", [False, True])
def test_tokens_that_the_kernel_in_front_writes_are_read(many):
    """The kernel waits for them and for no more of the cache: in a graph, where it starts while that one runs."""
    from superinfer.kernels import fused
    from superinfer.kernels.paged_hopper import FEW, MANY

    sizes = 32, 8, 128
    case = decode_case((*range(1, 60), 500, 16, 17, 900), sizes)
    call, view = make_kernel(sizes, geometry=MANY if many else FEW), case.cache[:, case.layer]
    call.plan(case.batch)
    batch = case.batch
    places = (batch.kv_indices[batch.kv_indptr[1:].long() - 1] * 16 + batch.last_page_len - 1).int()
    newest = torch.stack([kv[:, -1] for kv in case.dense], dim=1).to(CUDA)  # keys and values
    qkv = torch.cat((case.q, *newest), dim=1)
    cos, sin = torch.ones(len(qkv), 1, sizes[2], dtype=qkv.dtype, device=CUDA), torch.zeros_like(qkv[:, :1])
    out, blocks, offsets = torch.empty_like(case.q), places.long() // 16, places.long() % 16
    nothing = torch.full((), float("nan"), dtype=qkv.dtype, device=CUDA)

    def step() -> None:
        for _ in range(8):
            view[blocks, :, offsets] = nothing
            q = fused.rope_and_store(qkv, cos, sin, places, view, sizes[1])
            call.run(q, view, case.layer, out)

    assert_a_graph_of(step, answers=case, out=out)


@pytest.mark.parametrize("contexts", [tuple(range(40, 1500, 37)), (30_000, 5, 4_000), (9_000,)])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_same_batch_same_bits(geometry, contexts):
    case = decode_case(contexts, (32, 8, 128))
    call = make_kernel((32, 8, 128), geometry=geometry_of(*geometry))
    first = answer(call, case)
    for _ in range(20):
        assert torch.equal(answer(call, case), first)


def test_a_graph_reads_the_batch_as_it_is_at_replay():
    sizes = 32, 8, 128
    first, second = decode_case((1, 16, 700, 33), sizes, seed=1), decode_case((5, 17, 40, 1900), sizes, seed=2)
    batch = dataclasses.replace(first.batch, kv_indices=torch.zeros(200, dtype=torch.int32, device=CUDA))
    batch.kv_indices[: len(first.batch.kv_indices)] = first.batch.kv_indices
    q, cache = first.q.clone(), torch.zeros(160, *first.cache.shape[1:], dtype=torch.bfloat16, device=CUDA)
    cache[: len(first.cache)] = first.cache
    call = make_kernel(sizes)
    call.plan(batch)
    close(call.run(q, cache[:, 1]), dense_answer(first, SCALE))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call.run(q, cache[:, 1])
    q.copy_(second.q)
    cache[: len(second.cache)] = second.cache
    batch.kv_indptr.copy_(second.batch.kv_indptr)
    batch.last_page_len.copy_(second.batch.last_page_len)
    batch.kv_indices[: len(second.batch.kv_indices)] = second.batch.kv_indices
    out.fill_(float("nan"))
    graph.replay()
    close(out, dense_answer(second, SCALE))


def projected(case: Case, parts: int) -> tuple[Projected, torch.Tensor]:
    """Random queries, keys and values of each sequence's newest token, and where the cache keeps it. `case` is made
    what attention sees of them: its queries rotated, the newest keys and values in `dense` alone."""
    kv_heads, head_dim = case.cache.shape[-2:]
    heads, dtype = case.q.shape[1], case.q.dtype
    shape = len(case.q), heads + 2 * kv_heads, head_dim
    qkv = torch.randn((parts, *shape) if parts else shape, device=CUDA, dtype=torch.float32 if parts else dtype)
    batch = case.batch
    positions = (batch.kv_indptr.diff() - 1) * case.cache.shape[3] + batch.last_page_len - 1
    frequencies = (10_000 ** -torch.linspace(0, 1, head_dim // 2, device=CUDA)).repeat(2)
    amplitudes = torch.full((2, head_dim), 1.25, device=CUDA)
    amplitudes[1, : head_dim // 2] *= -1
    cos, sin = rope_angles(positions.long(), frequencies, amplitudes, dtype)
    whole = (qkv.sum(0).to(dtype) if parts else qkv).double()
    turned = (whole * cos.double() + whole.roll(head_dim // 2, -1) * sin.double()).to(dtype)
    case.q.copy_(turned[:, :heads])
    for kv, k, v in zip(
        case.dense, turned[:, heads:-kv_heads].cpu(), whole[:, -kv_heads:].to(dtype).cpu(), strict=True
    ):
        kv[0, -1], kv[1, -1] = k, v
    last_blocks = batch.kv_indices[batch.kv_indptr[1:].long() - 1]
    return Projected(qkv, cos, sin), last_blocks * case.cache.shape[3] + batch.last_page_len - 1


@pytest.mark.parametrize("contexts", [(*MIXED, *range(1, 50)), (600, 1, 31, 2_000)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("page", [16, 48])
@pytest.mark.parametrize("sizes", [(32, 8, 128), (14, 2, 64), (4, 4, 64), (64, 8, 128), (5, 1, 128)])
def test_rotates_and_stores_what_the_projection_leaves(sizes, page, dtype, contexts):
    case = decode_case(contexts, sizes, page, dtype)
    call, view = make_kernel(sizes, page, dtype), case.cache[:, case.layer]
    call.plan(case.batch)
    for parts in range(5):
        given, places = projected(case, parts)
        blocks, offsets = places.long() // page, places.long() % page
        view[blocks, :, offsets] = float("nan")
        before, out = case.cache.clone(), torch.full_like(case.q, float("nan"))
        call.rotate_and_run(given, view, out)
        close(out, dense_answer(case, SCALE))
        stored = view[blocks, :, offsets].cpu().float()
        expected = torch.stack([kv[:, -1] for kv in case.dense]).float()
        assert torch.allclose(stored, expected, rtol=2**-7 if dtype == torch.bfloat16 else 2**-10, atol=1e-6)
        assert torch.equal(stored[:, 1], expected[:, 1])
        view[blocks, :, offsets] = float("nan")
        assert torch.equal(case.cache.view(torch.int16), before.view(torch.int16)), "it wrote to other places, too"


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_rotating_itself_is_as_if_another_kernel_had(geometry):
    from superinfer.kernels import fused

    sizes, contexts = (32, 8, 128), (*range(1, 60), 5_000, 500, 16, 17, 9_000)
    case = decode_case(contexts, sizes)
    call = make_kernel(sizes, geometry=geometry_of(*geometry))
    call.plan(case.batch)
    given, places = projected(case, 2)
    caches = [case.cache.clone() for _ in range(2)]
    views = [cache[:, case.layer] for cache in caches]
    q = fused.rope_and_store(given.qkv, given.cos, given.sin, places.int(), views[0], sizes[1])
    out = torch.full_like(case.q, float("nan"))
    call.rotate_and_run(given, views[1], out)
    assert torch.equal(out, call.run(q, views[0]))
    assert torch.equal(caches[0].view(torch.int16), caches[1].view(torch.int16))


@pytest.mark.parametrize("parts", [0, 2])
def test_a_projection_that_the_kernel_in_front_writes_is_waited_for(parts):
    """In a graph, where it starts while that one runs, and reads the cache meanwhile."""
    from superinfer.kernels import fused

    sizes = 32, 8, 128
    case = decode_case((*range(1, 60), 500, 16, 17, 900), sizes)
    given, places = projected(case, parts)
    call, view = make_kernel(sizes), case.cache[:, case.layer]
    call.plan(case.batch)
    blocks, offsets = places.long() // 16, places.long() % 16
    nothing = torch.full((), float("nan"), dtype=case.q.dtype, device=CUDA)
    source, out = given.qkv.clone(), torch.empty_like(case.q)
    # The sum of itself and zeros, by a kernel that lets the next one start early; parts are added up by it alone.
    flat, weight, floor = source.view(-1, 128), torch.ones(128, device=CUDA), torch.zeros((), device=CUDA)

    def step() -> None:
        for _ in range(8):
            view[blocks, :, offsets] = nothing
            given.qkv.zero_()
            fused.add_rms_norm(flat, given.qkv.view(-1, 128), weight, floor)
            call.rotate_and_run(given, view, out)

    assert_a_graph_of(step, answers=case, out=out)
