"""The Triton kernels of mixtures of experts: on a GPU where there is one, else through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", reason="triton has no wheel for this platform")

from moe_cases import case, dense_answer  # noqa: E402

from superinfer.kernels import fused_moe, moe  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
HALVES = [torch.bfloat16, torch.float16] if CUDA else [torch.float16]  # the interpreter's numpy has no bfloat16


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("experts,top_k", [(3, 1), (8, 2), (5, 5), (128, 8)])
def test_routing_picks_what_the_reference_picks(experts, top_k, normalize):
    logits = case(11, experts, 8, 8)[1]
    weights, chosen = fused_moe.route(logits.to(DEVICE), top_k, normalize)
    expected_weights, expected = moe.route(logits, top_k, normalize)
    assert torch.equal(chosen.cpu().long(), expected)
    torch.testing.assert_close(weights.cpu(), expected_weights)


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy, which the interpreter computes with
def test_of_equally_probable_experts_the_first_are_picked_and_nan_picks_none_outside():
    logits = torch.zeros(2, 5)
    logits[1] = float("nan")
    weights, chosen = fused_moe.route(logits.to(DEVICE), 3, True)
    assert chosen[0].tolist() == [0, 1, 2] and weights[0].tolist() == pytest.approx([1 / 3] * 3)
    assert weights[1].isnan().all() and ((chosen >= 0) & (chosen < 5)).all()


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("tokens,experts,top_k", [(1, 8, 2), (7, 3, 3), (200, 5, 2), (9, 40, 4)])
def test_every_row_lies_once_in_a_block_of_its_expert(tokens, experts, top_k, block):
    torch.manual_seed(tokens)
    chosen = torch.rand(tokens, experts).topk(top_k).indices.int()
    rows, block_expert = fused_moe.align(chosen.to(DEVICE), experts, block)
    rows, block_expert, total = rows.cpu().view(-1, block), block_expert.cpu().tolist(), tokens * top_k
    used = [expert for expert in block_expert if expert >= 0]
    assert used == sorted(used) and block_expert[len(used) :] == [-1] * (len(block_expert) - len(used))
    found = []
    for expert, part in zip(used, rows, strict=False):
        own = part[part < total]
        assert len(own) and (part[len(own) :] == total).all() and (chosen.flatten()[own.long()] == expert).all()
        found += own.tolist()
    assert sorted(found) == list(range(total))


@pytest.mark.parametrize("tokens,block", [(1, 16), (40, 16), (64, 64)])
def test_all_tokens_may_go_to_one_expert(tokens, block):
    rows, block_expert = fused_moe.align(torch.full((tokens, 1), 3, dtype=torch.int32, device=DEVICE), 4, block)
    used = -(-tokens // block)
    assert block_expert.tolist()[:used] == [3] * used and set(block_expert.tolist()[used:]) <= {-1}
    assert rows[:tokens].tolist() == list(range(tokens))


# Sizes that no tile divides; one expert that nobody picks, and one that all do.
SHAPES = [(1, 4, 2, 48, 24), (5, 3, 3, 40, 72), (33, 8, 2, 80, 40)]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("tokens,experts,top_k,hidden,size", SHAPES)
def test_the_layer_equals_the_dense_answer(tokens, experts, top_k, hidden, size, dtype, normalize):
    x, logits, gate_up, down = case(tokens, experts, hidden, size)
    x, gate_up, down = x.to(dtype), gate_up.to(dtype), down.to(dtype)
    logits[:, 1] += 20.0
    expected = dense_answer(x, logits, gate_up, down, top_k, normalize)
    found = fused_moe.moe_mlp(*(t.to(DEVICE) for t in (x, logits, gate_up, down)), top_k, normalize)
    assert found.dtype == dtype
    error = (found.cpu().double() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype], f"{error:.1e}"


@pytest.mark.parametrize("tiles", [*(tiles for _, tiles in fused_moe.TILES), fused_moe.TALLEST])
def test_the_tiles_of_prefills_change_nothing(tiles, monkeypatch):
    inputs = case(150, 2, 144, 136)
    monkeypatch.setattr(fused_moe, "choose_tiles", lambda *_: tiles)
    if CUDA:  # float32 tiles of this size do not fit a multiprocessor
        inputs = tuple(t.half() for t in inputs)
    found = fused_moe.moe_mlp(*(t.to(DEVICE) for t in inputs), 2, True).cpu().double()
    expected = dense_answer(*inputs, 2, True)
    assert (found - expected).norm() / expected.norm() < (2e-3 if CUDA else 1e-5)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("tokens,experts,top_k,hidden,size", [(5, 4, 3, 40, 72), (33, 8, 2, 80, 40)])
def test_grouped_products_of_many_rows_equal_the_dense_answer(
    tokens, experts, top_k, hidden, size, normalize, monkeypatch
):
    asked = []
    grouped = fused_moe._grouped
    monkeypatch.setattr(fused_moe, "GROUPED_FROM", 1)
    monkeypatch.setattr(fused_moe, "GROUPED_LEAST", 1)
    monkeypatch.setattr(fused_moe, "takes_grouped", lambda x: True)
    monkeypatch.setattr(fused_moe, "_grouped", lambda *given: asked.append(1) or grouped(*given))
    x, logits, gate_up, down = case(tokens, experts, hidden, size)
    x, gate_up, down = x.bfloat16(), gate_up.bfloat16(), down.bfloat16()
    logits[:, 1] += 20.0  # an expert that all pick, and one that nobody does
    logits[:, 2] -= 20.0
    expected = dense_answer(x, logits, gate_up, down, top_k, normalize)
    found = fused_moe.moe_mlp(*(t.to(DEVICE) for t in (x, logits, gate_up, down)), top_k, normalize)
    assert asked
    assert (found.cpu().double() - expected).norm() / expected.norm() < 2e-2


def test_tiles_fit_the_shared_memory_there_is():
    for rows in (8, 64, 128, 256, 512, 4096, 1 << 20):
        for most in (99 << 10, 163 << 10, 227 << 10):
            tiles = fused_moe.choose_tiles(rows, 8, torch.bfloat16, most)
            for tile, lines in (
                (tiles.gate_up, tiles.rows + 2 * tiles.gate_up.columns),
                (tiles.down, tiles.rows + tiles.down.columns),
            ):
                assert lines * tile.depth * 2 * tile.stages <= most
                assert tile.stages >= 2


def test_no_tokens_are_no_work():
    x, logits, gate_up, down = case(0, 4, 16, 8)
    assert fused_moe.moe_mlp(*(t.to(DEVICE) for t in (x, logits, gate_up, down)), 2, True).shape == (0, 16)
