"""The Triton kernels against their torch references: on a GPU where there is one, else through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="triton has no wheel for this platform")

from paged_batches import dense_answer, make_batch  # noqa: E402

from superinfer.kernels import activation, filters, fused, host_memory, norm, rope, sampling, skinny  # noqa: E402
from superinfer.kernels.paged import TorchAttention  # noqa: E402
from superinfer.kernels.paged_triton import TritonAttention  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
HALF = torch.float16 if not CUDA else torch.bfloat16  # the interpreter computes with numpy, which has no bfloat16
DTYPES = [torch.float32, HALF]


def tolerance(dtype: torch.dtype) -> dict[str, float]:
    return dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,size", [(1, 32), (5, 96), (3, 4096)])
def test_the_fused_residual_norm_equals_the_reference(dtype, tokens, size):
    x, residual, weight = randn(tokens, size, dtype=dtype), randn(tokens, size, dtype=dtype), randn(size, dtype=dtype)
    floor = torch.tensor(1e-3, device=DEVICE)
    total = x + residual
    expected = norm.rms_norm(total.cpu().float(), weight.cpu().float(), floor.cpu())
    normed, kept = fused.add_rms_norm(x, residual, weight, floor)
    assert torch.equal(kept, total) and kept.data_ptr() == residual.data_ptr()
    torch.testing.assert_close(normed.cpu().float(), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_of_heads_reads_them_where_they_lie(dtype):
    qkv, weight, floor = randn(6, 7, 48, dtype=dtype), randn(48, dtype=dtype), torch.tensor(1e-3, device=DEVICE)
    for part in (qkv[:, :4], qkv[:, 4:6]):
        expected = norm.rms_norm(part.cpu().float(), weight.cpu().float(), floor.cpu())
        torch.testing.assert_close(fused.rms_norm(part, weight, floor).cpu().float(), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens,size", [(1, 14), (4, 96), (2, 2500)])
def test_silu_and_mul_equals_the_reference(dtype, tokens, size):
    x = randn(tokens, 2 * size, dtype=dtype)
    expected = activation.silu_and_mul(x.cpu().float())
    torch.testing.assert_close(fused.silu_and_mul(x).cpu().float(), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads,kv_heads,head_dim", [(4, 2, 16), (7, 1, 24), (3, 3, 64), (8, 2, 128)])
def test_rope_and_store_rotates_and_writes_one_layer_of_a_block_first_cache(dtype, heads, kv_heads, head_dim):
    tokens, blocks, layers, page, layer = 5, 6, 3, 4, 1
    qkv = randn(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype)
    frequencies = torch.rand(head_dim // 2).repeat(2).to(DEVICE)
    amplitudes = torch.full((2, head_dim), 1.3, device=DEVICE)
    amplitudes[1, : head_dim // 2] *= -1
    positions = torch.tensor([0, 3, 100, 7, 8], device=DEVICE)
    cos, sin = rope.rope_angles(positions, frequencies, amplitudes, dtype)
    cache = torch.full((blocks, layers, 2, page, kv_heads, head_dim), float("nan"), device=DEVICE, dtype=dtype)
    places = torch.tensor([5, 6, 7, 20, 0], dtype=torch.int32, device=DEVICE)

    kept = torch.full((2, tokens, kv_heads, head_dim), float("nan"), device=DEVICE, dtype=dtype)
    q = fused.rope_and_store(qkv, cos, sin, places, cache[:, layer], kv_heads, kept=kept)
    rotated = rope.apply_rope(qkv[:, : heads + kv_heads].float(), cos.float(), sin.float())
    torch.testing.assert_close(q.float(), rotated[:, :heads], **tolerance(dtype))
    keys, values = cache[:, layer].transpose(0, 1).flatten(1, 2)
    torch.testing.assert_close(keys[places.long()].float(), rotated[:, heads:], **tolerance(dtype))
    assert torch.equal(values[places.long()], qkv[:, heads + kv_heads :])
    assert torch.equal(kept[0], keys[places.long()]) and torch.equal(kept[1], values[places.long()])
    written = torch.zeros(blocks * page, dtype=torch.bool, device=DEVICE)
    written[places.long()] = True
    assert keys[~written].isnan().all() and cache[:, [0, 2]].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "heads,kv_heads,head_dim,page", [(4, 2, 16, 4), (7, 1, 24, 3), (8, 8, 64, 16), (8, 2, 128, 16)]
)
@pytest.mark.parametrize("queries", [(1, 1, 1), (1, 9, 20)])
def test_paged_attention_equals_dense_attention(dtype, heads, kv_heads, head_dim, page, queries):
    case = make_batch(queries, (6, 9, 41), heads, kv_heads, head_dim, page, dtype, DEVICE)
    expected = dense_answer(case)
    for call in (TritonAttention(0.3), TorchAttention(0.3)):
        call.plan(case.batch)
        found = call.run(case.q, case.cache[:, case.layer])
        torch.testing.assert_close(found.cpu().float(), expected, **tolerance(dtype))


@pytest.mark.filterwarnings("ignore:invalid value")  # of rows behind the last query, which are not stored
@pytest.mark.parametrize("window", [1, 5, 40])
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("queries", [(1, 1, 1), (1, 9, 90)])
def test_paged_attention_looks_no_further_back_than_its_window(queries, heads, window):
    """Ninety queries of one head fill tiles whose later ones see none of the keys that the first see."""
    case = make_batch(queries, (6, 9, 100), heads, 2, 16, 4, torch.float32, DEVICE)
    expected = dense_answer(case, window=window)
    for call in (TritonAttention(0.3, window), TorchAttention(0.3, window)):
        call.plan(case.batch)
        found = call.run(case.q, case.cache[:, case.layer])
        torch.testing.assert_close(found.cpu(), expected, **tolerance(torch.float32))


def test_filters_find_the_threshold_that_a_sort_finds():
    torch.manual_seed(3)
    scaled = sampling.temper(torch.randn(9, 300) * 3, torch.ones(9))
    scaled[3] = 0.0  # ties
    scaled[4, 5:] = -torch.inf
    top_k = torch.tensor([0, 1, 20, 7, 0, 300, 299, 50, 0])
    top_p = torch.tensor([0.9, 1.0, 1.0, 0.5, 0.99, 0.3, 0.7, 0.8, 1.0], dtype=torch.float64)
    min_p = torch.tensor([0, 0, 0.1, 0, 0, 0, 0.02, 0, 0], dtype=torch.float64)
    expected = sampling.filter_threshold(scaled, scaled.exp().double(), top_k, top_p, min_p)
    columns = torch.stack((top_p, min_p), dim=1).to(DEVICE)  # as the sampler has them: columns of one tensor
    found = filters.filter_threshold(scaled.to(DEVICE), top_k.to(DEVICE), columns[:, 0], columns[:, 1]).cpu()
    kept, wanted = scaled >= found[:, None], scaled >= expected[:, None]
    assert torch.equal(kept, wanted), (kept.sum(1), wanted.sum(1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("count", [0, 1, 513, 4096])
def test_small_copies_take_every_byte_and_no_other(dtype, count):
    torch.manual_seed(4)
    source = torch.randint(0, 100, (count + 2,)).to(dtype)
    if CUDA:
        source = source.pin_memory()
    target = torch.full((count + 2,), 101, dtype=dtype, device=DEVICE)
    host_memory.copy(target[1 : count + 1], source[1 : count + 1])
    assert torch.equal(target[1 : count + 1].cpu(), source[1 : count + 1])
    assert target[[0, -1]].tolist() == [101, 101]


def test_a_small_copy_between_different_sizes_is_refused():
    with pytest.raises(ValueError, match="8 bytes do not fit 4 bytes"):
        host_memory.copy(torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("parts,depth", [(1, 128), (2, 64)])
def test_parts_of_a_product_add_up_to_it(rows, parts, depth):
    torch.manual_seed(5)
    x, weight = randn(rows, 256, dtype=HALF), randn(128, 256, dtype=HALF)
    found = skinny.run(x, weight, skinny.Tiles(16, 64, depth, parts, 2, 4))
    assert found.shape == (parts, rows, 128) and found.dtype == torch.float32
    torch.testing.assert_close(found.sum(0).cpu(), x.cpu().float() @ weight.cpu().float().T, rtol=1e-3, atol=1e-3)


def test_tiles_give_every_multiprocessor_its_share_and_leave_other_products_to_cublas():
    for rows, outputs, depth in ((1, 4096, 4096), (16, 6144, 4096), (33, 4096, 14336), (64, 4096, 4096)):
        tiles = skinny.choose_tiles(rows, outputs, depth, 132)
        assert tiles is not None and tiles.rows >= rows and depth % (tiles.parts * tiles.depth) == 0
        programs = outputs // tiles.columns * tiles.parts
        assert -(-programs // 132) * 132 / programs <= skinny.EVEN
    for rows, outputs, depth in ((65, 4096, 4096), (1, 28672, 4096), (1, 4100, 4096), (1, 512, 4096), (1, 4096, 100)):
        assert skinny.choose_tiles(rows, outputs, depth, 132) is None


def test_a_norm_and_a_rotation_of_parts_equal_those_of_their_sum():
    torch.manual_seed(6)
    parts = randn(3, 4, 64)
    whole = parts.sum(0).to(HALF)
    residual, weight, floor = randn(4, 64, dtype=HALF), randn(64, dtype=HALF), torch.tensor(1e-3, device=DEVICE)
    expected = fused.add_rms_norm(whole, residual.clone(), weight, floor)
    found = fused.add_rms_norm(parts, residual.clone(), weight, floor)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)

    qkv = randn(2, 4, 6, 16)
    cos, sin = randn(4, 1, 16, dtype=HALF), randn(4, 1, 16, dtype=HALF)
    places = torch.arange(4, dtype=torch.int32, device=DEVICE)
    caches = [torch.zeros(1, 2, 16, 1, 16, dtype=HALF, device=DEVICE) for _ in range(2)]
    found = fused.rope_and_store(qkv, cos, sin, places, caches[0], 1)
    expected = fused.rope_and_store(qkv.sum(0).to(HALF), cos, sin, places, caches[1], 1)
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(*caches, rtol=2e-3, atol=2e-3)
