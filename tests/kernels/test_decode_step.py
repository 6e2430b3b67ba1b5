"""What begins and ends a captured decode step, on a GPU where there is one, else through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="triton has no wheel for this platform")

from superinfer.kernels import decode_step
from superinfer.kernels.decode_step import HEAD, PARTS
from superinfer.kernels.sampling import NO_TOKEN

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = torch.bfloat16 if DEVICE.type == "cuda" else torch.float16  # the interpreter has no bfloat16
INTS = dict(dtype=torch.int32, device=DEVICE)
PAGE, WIDTH, SLOTS = 4, 9, 5


def pinned(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, pin_memory=DEVICE.type == "cuda")


@pytest.mark.parametrize("turn", [0, 1, 6])
def test_inputs_and_changes_are_those_of_the_half_whose_turn_it_is(turn):
    inputs, room = 12, 700
    host = pinned(2, HEAD + inputs + 2 * room)
    host[:, :] = -1
    mine = host[turn % 2]
    mine[0] = 3
    mine[HEAD : HEAD + inputs] = torch.arange(100, 100 + inputs)
    mine[HEAD + inputs :][:3] = torch.tensor([0, 7, 44])
    mine[HEAD + inputs + room :][:3] = torch.tensor([11, 12, 13])
    there, table = torch.zeros(inputs, **INTS), torch.zeros(SLOTS, WIDTH, **INTS)
    decode_step.receive(host, there, table, torch.tensor([turn], **INTS), room)
    assert there.tolist() == list(range(100, 100 + inputs))
    assert {i: b for i, b in enumerate(table.flatten().tolist()) if b} == {0: 11, 7: 12, 44: 13}


@pytest.mark.parametrize("empty_padding", [False, True])
def test_a_batch_follows_from_slots_and_positions(empty_padding):
    table = torch.randint(0, 90, (SLOTS + 1, WIDTH), **INTS)
    table[SLOTS] = 99
    slots, positions = [3, 0, 4, SLOTS, SLOTS], [0, 35, 7, 0, 0]
    place, last = torch.zeros(5, **INTS), torch.zeros(5, **INTS)
    indptr, indices, turn = torch.zeros(6, **INTS), torch.zeros(60, **INTS), torch.tensor([8], **INTS)
    decode_step.describe(
        torch.tensor(positions, **INTS), torch.tensor(slots, **INTS), place, last, indptr, indices, table, turn, PAGE,
        empty_padding,
    )  # fmt: skip
    blocks = [table[s, : p // PAGE + 1].tolist() for s, p in zip(slots, positions, strict=True)]
    if empty_padding:
        blocks[3:] = [[], []]
    wanted = [b for each in blocks for b in each]
    assert indptr.tolist() == [0, *torch.tensor([len(b) for b in blocks]).cumsum(0).tolist()]
    assert indices[: len(wanted)].tolist() == wanted and not indices[len(wanted) :].any()
    assert last.tolist() == [p % PAGE + 1 for p in positions]
    assert place[:3].tolist() == [blocks[i][-1] * PAGE + positions[i] % PAGE for i in range(3)]
    assert place[3:].tolist() == [99 * PAGE] * 2
    assert turn.item() == 9


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize(("rows", "vocab"), [(1, 9), (5, 5000), (65, 2100)])
def test_the_first_of_the_largest_logits_is_kept_by_slot_and_for_the_host(dtype, rows, vocab):
    torch.manual_seed(rows)
    logits = torch.randn(rows, vocab, device=DEVICE).to(dtype)  # in half precision there are equals among the largest
    logits[-1, vocab // 2 :] = 50.0
    logits[-1, 0] = -torch.inf
    slots = torch.randperm(rows + 3, device=DEVICE)[:rows].to(torch.int32)
    last, host = torch.full((rows + 3,), -1, dtype=torch.int64, device=DEVICE), pinned(2, rows + 2, dtype=torch.int64)
    decode_step.keep_largest(logits, slots, last, host, torch.tensor([6], **INTS))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    wanted = [int((row == row.max()).nonzero()[0]) for row in logits.float().cpu()]
    assert host[1, :rows].tolist() == wanted and not host[0].any()
    assert last[slots.long()].tolist() == wanted and (last == -1).sum() == 3


def spoilt_logits(rows: int, vocab: int, dtype: torch.dtype) -> tuple[torch.Tensor, list[int]]:
    """Logits, and what is to be told of each row: of every other one that it has no token."""
    torch.manual_seed(vocab)
    logits = torch.randn(rows, vocab, device=DEVICE).to(dtype)
    logits[:, 1] = 30.0
    logits[0, 0] = torch.nan
    logits[2, vocab - 1] = torch.nan
    logits[4] = torch.nan
    logits[6] = -torch.inf
    logits[8, vocab // 2] = torch.inf
    logits[10, : vocab // 2] = torch.nan
    logits[12, 1] = torch.nan
    logits[1, 0] = -torch.inf  # a vocabulary may be padded by these
    logits[3, 2:] = -torch.inf
    return logits, [1 if row % 2 else NO_TOKEN for row in range(rows)]


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("vocab", [9, 5000])
@pytest.mark.parametrize("by_turn", [True, False])
def test_a_row_that_is_no_numbers_has_no_token_but_the_next_step_one_it_can_look_up(dtype, vocab, by_turn):
    rows = 14
    logits, wanted = spoilt_logits(rows, vocab, dtype)
    slots = torch.arange(rows, device=DEVICE).to(torch.int32)
    last = torch.full((rows,), 7, dtype=torch.int64, device=DEVICE)
    host = pinned(2, rows, dtype=torch.int64) if by_turn else pinned(rows, dtype=torch.int64)
    decode_step.keep_largest(logits, slots, last, host, torch.tensor([6], **INTS))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert (host[1] if by_turn else host).tolist() == wanted
    assert last.tolist() == [max(token, 0) for token in wanted]


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("vocab", [9, 5000])
def test_rows_that_are_no_numbers_are_found_by_a_look_at_their_parts(dtype, vocab):
    logits, wanted = spoilt_logits(14, vocab, dtype)
    best, at_best = pinned(14, PARTS, dtype=torch.float32), pinned(14, PARTS)
    decode_step.look_through(logits, best, at_best)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert decode_step.are_finite(best.numpy(), at_best.numpy()).tolist() == [token != NO_TOKEN for token in wanted]
