"""FlashInfer behind `AttentionCall`, over a strided block-first cache, against dense attention in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from paged_batches import dense_answer, make_batch

pytest.importorskip("flashinfer", reason="flashinfer is not installed; pip install 'superinfer[cuda]'")

HEADS, KV_HEADS, HEAD_DIM, PAGE, SCALE = 8, 2, 128, 16, 0.1
SIZES = HEADS, KV_HEADS, HEAD_DIM, PAGE, SCALE, torch.bfloat16
CUDA = torch.device("cuda")


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    error = (found.cpu().float() - expected).norm() / expected.norm()
    assert error < 1e-2, f"relative error {error:.4f}"


@pytest.fixture(scope="module")
def buffers():
    """(of decodes, of prefills)"""
    from superinfer.kernels.paged_flashinfer import PLAN_BYTES, PlanStage

    workspace = torch.zeros(256 << 20, dtype=torch.uint8, device=CUDA)
    stream = torch.cuda.Stream()
    plans = torch.zeros(PLAN_BYTES, dtype=torch.uint8, device=CUDA)
    return (workspace, plans, PlanStage(CUDA, stream)), (workspace, PlanStage(CUDA, stream))


def test_decode_equals_dense_attention_eagerly_and_in_a_graph_fed_by_plan_alone(buffers):
    from superinfer.kernels.paged_flashinfer import FlashInferDecode

    def case(seed: int, contexts: tuple[int, ...]):
        return make_batch((1,) * len(contexts), contexts, HEADS, KV_HEADS, HEAD_DIM, PAGE, torch.bfloat16, CUDA, seed)

    first, second = case(1, (1, 16, 700, 33)), case(2, (5, 17, 40, 1900))
    batch = dataclasses.replace(first.batch, kv_indices=torch.zeros(200, dtype=torch.int32, device=CUDA))
    room = len(first.batch.kv_indices)
    batch.kv_indices[:room] = first.batch.kv_indices
    call = FlashInferDecode(*buffers[0], batch, *SIZES)
    call.plan(batch)
    q, cache = first.q.clone(), torch.zeros(160, *first.cache.shape[1:], dtype=torch.bfloat16, device=CUDA)
    cache[: len(first.cache)] = first.cache
    close(call.run(q, cache[:, 1]), dense_answer(first, SCALE))

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call.run(q, cache[:, 1])
    q.copy_(second.q)
    cache[: len(second.cache)] = second.cache
    batch.kv_indptr.copy_(second.batch.kv_indptr)
    batch.last_page_len.copy_(second.batch.last_page_len)
    batch.kv_indices[: len(second.batch.kv_indices)] = second.batch.kv_indices
    fresh = second.batch
    call.plan(
        dataclasses.replace(
            batch,
            host_kv_indptr=fresh.host_kv_indptr,
            host_kv_indices=fresh.host_kv_indices,
            host_last_page_len=fresh.host_last_page_len,
        )
    )
    out.fill_(float("nan"))
    graph.replay()
    close(out, dense_answer(second, SCALE))


@pytest.mark.parametrize("window", [1, 16, 333])
@pytest.mark.parametrize("kind", ["decode", "fa2", "fa3"])
def test_windows_are_those_of_dense_attention(buffers, kind, window):
    if kind == "fa3" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("fa3 needs a Hopper GPU")
    from superinfer.kernels.paged_flashinfer import FlashInferDecode, FlashInferPrefill

    queries = (1, 1, 1) if kind == "decode" else (1, 200, 400)
    case = make_batch(queries, (77, 200, 900), HEADS, KV_HEADS, HEAD_DIM, PAGE, torch.bfloat16, CUDA, seed=5)
    call = (
        FlashInferDecode(*buffers[0], case.batch, *SIZES, window)
        if kind == "decode"
        else FlashInferPrefill(*buffers[1], kind, *SIZES, window)
    )
    for _ in range(2):  # decodes are planned another way the second time
        call.plan(case.batch)
        close(call.run(case.q, case.cache[:, case.layer]), dense_answer(case, SCALE, window))


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
def test_prefill_chunks_with_a_computed_past_equal_dense_attention(buffers, backend):
    if backend == "fa3" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("fa3 needs a Hopper GPU")
    from superinfer.kernels.paged_flashinfer import FlashInferPrefill

    case = make_batch(
        (1, 200, 33, 300), (77, 200, 900, 301), HEADS, KV_HEADS, HEAD_DIM, PAGE, torch.bfloat16, CUDA, seed=4
    )
    call = FlashInferPrefill(*buffers[1], backend, *SIZES)
    call.plan(case.batch)
    close(call.run(case.q, case.cache[:, case.layer].nan_to_num()), dense_answer(case, SCALE))
    # The strided view itself, not a copy of it: another layer's cells are NaN and must not be read.
    close(call.run(case.q, case.cache[:, case.layer]), dense_answer(case, SCALE))


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("backend", ["fa2", "fa3"])
def test_prompts_that_begin_are_attended_over_their_own_keys_and_values(buffers, backend, window):
    """As a step has them: queries and keys are a part of its rows, others lie before and behind."""
    if backend == "fa3" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("fa3 needs a Hopper GPU")
    from superinfer.kernels.paged_flashinfer import FlashInferFresh

    lengths, before = (1, 200, 33, 900), 5
    case = make_batch(lengths, lengths, HEADS, KV_HEADS, HEAD_DIM, PAGE, torch.bfloat16, CUDA, seed=6)
    rows = sum(lengths)
    kept = torch.full((2, before + rows + 7, KV_HEADS, HEAD_DIM), float("nan"), dtype=torch.bfloat16, device=CUDA)
    kept[:, before : before + rows] = torch.cat(case.dense, dim=1).to(CUDA)
    out = torch.full((before + rows + 7, HEADS, HEAD_DIM), float("nan"), dtype=torch.bfloat16, device=CUDA)
    here = slice(before, before + rows)
    call = FlashInferFresh(*buffers[1], backend, HEADS, KV_HEADS, HEAD_DIM, SCALE, torch.bfloat16, window)
    for _ in range(2):
        call.plan(case.batch)
        call.run(case.q, kept[:, here], 0, out[here])
        close(out[here], dense_answer(case, SCALE, window))
        assert out[:before].isnan().all() and out[before + rows :].isnan().all()


@pytest.mark.parametrize("window", [None, 40])
def test_captured_chunks_equal_dense_attention_whatever_the_batch(buffers, window):
    """One graph, fed by `plan` alone: other chunks, more of them, other places, none at all."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("fa3 needs a Hopper GPU")
    from superinfer.kernels import flashinfer_chunks as chunks

    rows, before = 640, 37
    multiprocessors = torch.cuda.get_device_properties(CUDA).multi_processor_count
    size = chunks.plan_bytes(rows, HEADS, HEAD_DIM, multiprocessors)
    indices = torch.zeros(400, dtype=torch.int32, device=CUDA)
    plans = chunks.ChunkPlans(CUDA, size, torch.cuda.Stream())
    call = chunks.FlashInferChunks(buffers[0][0], plans, rows, indices, *SIZES, window)
    q = torch.zeros(rows, HEADS, HEAD_DIM, dtype=torch.bfloat16, device=CUDA)
    out = torch.zeros_like(q)
    cache = torch.zeros(400, 3, 2, PAGE, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device=CUDA)
    graph = None
    most = chunks.MOST_CHUNKS
    batches = [
        ((200,), (200,)),
        ((1, 200, 33, 300), (77, 200, 900, 301)),
        ((3,) * most, (50,) * most),
        ((600,), (999,)),
    ]
    for seed, (queries, contexts) in enumerate(batches):
        case = make_batch(queries, contexts, HEADS, KV_HEADS, HEAD_DIM, PAGE, torch.bfloat16, CUDA, seed)
        count = sum(queries)
        start = min(before, rows - count)
        indices[: len(case.batch.kv_indices)] = case.batch.kv_indices
        call.plan(dataclasses.replace(case.batch, host_qo_indptr=case.batch.host_qo_indptr + start))
        cache[: len(case.cache)] = case.cache
        q.fill_(float("nan"))
        q[start : start + count] = case.q
        if graph is None:
            call.run(q, cache[:, case.layer], out=out)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                call.run(q, cache[:, case.layer], out=out)
        out.fill_(7.0)
        graph.replay()
        close(out[start : start + count], dense_answer(case, SCALE, window))
        assert (out[:start] == 7).all() and (out[start + count :] == 7).all(), "rows of others were written to"
    many = make_batch((1,) * (most + 1), (5,) * (most + 1), HEADS, KV_HEADS, HEAD_DIM, PAGE, torch.bfloat16, CUDA)
    with pytest.raises(ValueError, match=f"{most + 1} chunks are planned at once; {most} is the most"):
        call.plan(many.batch)
