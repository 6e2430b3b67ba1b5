"""Our decode attention for Hopper, over a strided block-first cache, against dense attention in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from paged_batches import Case, dense_answer, make_batch

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
    "contexts", [(1,), (20_000,), (4_200, 9_000, 2), (1,) * 200, (5000, *(3,) * 40, 1234), tuple(range(1, 129))]
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

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(10):
        out.fill_(float("nan"))
        graph.replay()
        close(out, dense_answer(case, SCALE))


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
