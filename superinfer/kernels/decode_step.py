"""The start and the end of a decode step, captured with it: its inputs come from pinned memory, its tokens go there.

All that differs from step to step lies in memory that the host fills before a replay, in one of two halves by turns, so
that a step costs the host no launch but the replay. The device knows whose turn it is: it counts them in `turn`, [1]
int32. What follows from a sequence's slot and position is worked out there too, from block tables that stay on the
device and learn of changes alone.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from superinfer.kernels.sampling import NO_TOKEN

HEAD = 4  # words before the inputs; the first is the number of changes
_BLOCK = 512
_NOWHERE = tl.constexpr(1 << 30)  # behind any token id
_NO_TOKEN = tl.constexpr(NO_TOKEN)  # also in place of where the largest is, of a part that holds NaN


@triton.jit(do_not_specialize=["half", "inputs", "changes"])
def _receive(host, there, table, turn, half, inputs, changes, HEAD: tl.constexpr, BLOCK: tl.constexpr):
    source = host + (tl.load(turn) % 2) * half
    count = tl.load(source)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(there + at, tl.load(source + HEAD + at, mask=at < inputs), mask=at < inputs)
    changed = at < count
    place = tl.load(source + HEAD + inputs + at, mask=changed)
    tl.store(table + place, tl.load(source + HEAD + inputs + changes + at, mask=changed), mask=changed)


def receive(host: torch.Tensor, there: torch.Tensor, table: torch.Tensor, turn: torch.Tensor, changes: int) -> None:
    """Bring a step's inputs to `there`, and the block tables up to date.

    host: [2, HEAD + inputs + 2 · changes] int32, pinned: the number of changes made to `table`, HEAD − 1 words of
    nothing, the inputs, then the changes' places in the flat table and the blocks there, with room for `changes`.
    there: [inputs] int32. table: [slots, blocks] int32.
    """
    most = max(len(there), changes)
    _receive[(triton.cdiv(most, _BLOCK),)](
        host, there, table, turn, host.shape[1], len(there), changes, HEAD=HEAD, BLOCK=_BLOCK, num_warps=4
    )


@triton.jit(do_not_specialize=["sequences", "padding_slot"])
def _describe(
    positions, slots, places, last_page_len, indptr, indices, table, turn, sequences, padding_slot, width, page,
    EMPTY: tl.constexpr, SEQUENCES_2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One sequence."""
    sequence = tl.program_id(0)
    position, slot = tl.load(positions + sequence), tl.load(slots + sequence)
    before = tl.arange(0, SEQUENCES_2)
    mask = before < sequence
    counts = tl.load(positions + before, mask=mask, other=0) // page + 1
    pages = position // page + 1
    if EMPTY:
        counts = tl.where(tl.load(slots + before, mask=mask, other=0) == padding_slot, 0, counts)
        pages = tl.where(slot == padding_slot, 0, pages)
    start = tl.sum(tl.where(mask, counts, 0), axis=0)
    row = table + slot.to(tl.int64) * width
    tl.store(places + sequence, tl.load(row + position // page) * page + position % page)
    tl.store(last_page_len + sequence, position % page + 1)
    tl.store(indptr + sequence, start)
    if sequence == sequences - 1:
        tl.store(indptr + sequences, start + pages)
        tl.store(turn, tl.load(turn) + 1)
    for first in range(0, pages, BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(indices + start + at, tl.load(row + at, mask=at < pages), mask=at < pages)


def describe(
    positions: torch.Tensor, slots: torch.Tensor, places: torch.Tensor, last_page_len: torch.Tensor,
    indptr: torch.Tensor, indices: torch.Tensor, table: torch.Tensor, turn: torch.Tensor, page: int,
    empty_padding: bool,
) -> None:  # fmt: skip
    """Fill a PagedBatch of decodes, and `places` as in Rows, from slots and positions; the turn is over.

    All int32. positions, slots, places, last_page_len: [sequences]; indptr: [sequences + 1]; indices: room for all.
    table: [slots + 1, blocks]; the last row is padding's. empty_padding: sequences of that slot have no blocks.
    """
    sequences = len(positions)
    _describe[(sequences,)](
        positions, slots, places, last_page_len, indptr, indices, table, turn, sequences, len(table) - 1,
        table.shape[1], page, EMPTY=empty_padding, SEQUENCES_2=triton.next_power_of_2(sequences), BLOCK=256,
        num_warps=2,
    )  # fmt: skip


@triton.jit
def _largest_of_part(logits, best, at_best, vocab, row_step, part, BLOCK: tl.constexpr):
    row, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = piece * part
    end = tl.minimum(first + part, vocab)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    at_top = tl.zeros((BLOCK,), tl.int32) + first
    for start in range(first, end, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(logits + row * row_step + column, mask=column < end, other=float("-inf")).to(tl.float32)
        at_top = tl.where(value > top, column, at_top)
        top = tl.maximum(top, value, propagate_nan=tl.PropagateNan.ALL)  # once NaN, it stays so
    maximum = tl.max(top, axis=0)  # of the numbers
    at_top = tl.where(top == maximum, at_top, _NOWHERE)
    to = row * tl.num_programs(1) + piece
    tl.store(best + to, maximum)
    tl.store(at_best + to, tl.min(tl.where(top == top, at_top, _NO_TOKEN), axis=0))


@triton.jit(do_not_specialize=["rows", "half"])
def _keep_largest(best, at_best, slots, last_tokens, host, turn, rows, half, PARTS: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    there = row < rows
    at = row[:, None] * PARTS + tl.arange(0, PARTS)[None, :]
    value = tl.load(best + at, mask=there[:, None], other=float("-inf"))
    column = tl.load(at_best + at, mask=there[:, None], other=0)
    maximum = tl.max(value, axis=1)
    largest = (value == maximum[:, None]) | (column == _NO_TOKEN)
    token = tl.min(tl.where(largest, column, _NOWHERE), axis=1).to(tl.int64)
    token = tl.where(tl.abs(maximum) < float("inf"), token, _NO_TOKEN)  # all are -inf, or one is inf
    tl.store(last_tokens + tl.load(slots + row, mask=there, other=0), tl.maximum(token, 0), mask=there)
    tl.store(host + (tl.load(turn) + 1) % 2 * half + row, token, mask=there)


PARTS = 8  # that a row of logits is looked through in


def keep_largest(
    logits: torch.Tensor, slots: torch.Tensor, last_tokens: torch.Tensor, host: torch.Tensor, turn: torch.Tensor
) -> None:
    """Each row's largest logit, the first of equals: its id goes to the row's slot in `last_tokens`, and to the half of
    `host` whose turn `describe` ended. Of a row with NaN, or whose largest is infinite, the host is told NO_TOKEN, and
    the slot has token 0, which the next step may look up.

    logits: [rows, vocab], any float type. slots: [rows] int32; rows of one slot leave it any of their tokens.
    last_tokens: [slots] int64. host: int64, pinned; [2, rows or more], or [rows] whoever's turn it is.
    """
    rows = len(logits)
    best = logits.new_empty(rows, PARTS, dtype=torch.float32)
    at_best = logits.new_empty(rows, PARTS, dtype=torch.int32)
    look_through(logits, best, at_best)
    together, half = min(64, triton.next_power_of_2(rows)), host.shape[1] if host.dim() == 2 else 0
    _keep_largest[(triton.cdiv(rows, together),)](
        best, at_best, slots, last_tokens, host, turn, rows, half, PARTS=PARTS, ROWS=together, num_warps=2
    )


def look_through(logits: torch.Tensor, best: torch.Tensor, at_best: torch.Tensor) -> None:
    """The largest logit of each part of each row, and its id, below 0 where the part holds NaN.

    logits: [rows, vocab], any float type. best: [rows, PARTS] float32; at_best: the same of int32. Both may be pinned.
    """
    rows, vocab = logits.shape
    part = triton.cdiv(vocab, PARTS)
    _largest_of_part[(rows, PARTS)](
        logits, best, at_best, vocab, logits.stride(0), part, BLOCK=min(2048, triton.next_power_of_2(part)), num_warps=4
    )


def are_finite(best: np.ndarray, at_best: np.ndarray) -> np.ndarray:
    """Whether rows have a largest logit, of what `look_through` found: [rows] bool."""
    found: np.ndarray = np.isfinite(best.max(axis=1)) & (at_best >= 0).all(axis=1)
    return found
