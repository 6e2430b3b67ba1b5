"""Who rotates and stores a step's newest tokens: attention itself where it can and is alone, else a kernel in front."""

from __future__ import annotations

import pytest
import torch

from superinfer.kernels.paged import AttentionByLayer, PagedBatch, Projected, TorchAttention
from superinfer.kernels.rope import apply_rope
from superinfer.runtime.engine.cuda_attention import Part, SplitAttention

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 8, 4
CONTEXTS = (3, 4, 6)


class RotatingReference(TorchAttention):
    """The reference as a `RotatingCall`."""

    rotated = 0

    def rotate_and_run(self, given: Projected, kv: torch.Tensor, out: torch.Tensor) -> None:
        """See RotatingCall."""
        batch = self._batch
        assert batch is not None
        qkv = given.qkv.sum(0) if given.qkv.dim() == 4 else given.qkv
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        blocks, offsets = batch.kv_indices[batch.kv_indptr[1:].long() - 1].long(), batch.last_page_len.long() - 1
        kv[blocks, 0, offsets], kv[blocks, 1, offsets] = apply_rope(k, given.cos, given.sin), v
        self.run(apply_rope(q, given.cos, given.sin), kv, out=out)
        self.rotated += 1


def decodes(contexts: tuple[int, ...], first_block: int) -> PagedBatch:
    """On blocks in order."""
    pages = [-(-context // PAGE) for context in contexts]
    ends = torch.arange(len(contexts) + 1, dtype=torch.int32)
    indptr = torch.tensor([0, *pages]).cumsum(0).int()
    indices = torch.arange(first_block, first_block + sum(pages), dtype=torch.int32)
    last = torch.tensor([(context - 1) % PAGE + 1 for context in contexts], dtype=torch.int32)
    return PagedBatch(ends, indptr, indices, last, ends, indptr, indices, last, 1)


@pytest.mark.parametrize("parts", [0, 2])
@pytest.mark.parametrize("alone", [True, False])
def test_who_rotates_makes_no_difference(alone, parts, monkeypatch):
    pytest.importorskip("triton")
    from plain_kernels import use_plain_kernels

    use_plain_kernels(monkeypatch)
    torch.manual_seed(0)
    batch, rows = decodes(CONTEXTS, 0), len(CONTEXTS)
    shape = rows, HEADS + 2 * KV_HEADS, DIM
    qkv = torch.randn((parts, *shape) if parts else shape)
    angle = torch.randn(rows, 1, DIM // 2)
    cos, sin = torch.cat((angle.cos(),) * 2, -1), torch.cat((-angle.sin(), angle.sin()), -1)
    places = batch.kv_indices[batch.kv_indptr[1:].long() - 1] * PAGE + batch.last_page_len - 1
    cache = torch.randn(int(batch.kv_indptr[-1]), 2, PAGE, KV_HEADS, DIM)

    batches = [batch] if alone else [decodes(CONTEXTS[:2], 0), decodes(CONTEXTS[2:], int(batch.kv_indptr[2]))]

    answers, calls = [], []
    for reference in (TorchAttention, RotatingReference):
        view, made = cache.clone(), []
        for one in batches:
            calls.append(reference(0.3))
            made.append(Part(one.sequences, AttentionByLayer([None], lambda _: calls[-1])))
            made[-1].call.plan(one)
        split = SplitAttention([view], places.int(), KV_HEADS, made)
        answers.append((split.rotate_and_attend(0, qkv, cos, sin, 0.3), view))
    assert [getattr(call, "rotated", 0) for call in calls] == [0] * len(batches) + [int(alone)] * len(batches)
    for mine, expected in zip(answers[1], answers[0], strict=True):
        assert torch.allclose(mine, expected, atol=1e-6)
    assert not torch.equal(answers[0][1], cache)
