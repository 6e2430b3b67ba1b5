"""Block tables against plain lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from superinfer.runtime.engine import step_inputs
from superinfer.runtime.engine.step_inputs import BlockTables
from superinfer.runtime.scheduler.plan import SlotWork

SLOTS, PER_SLOT, BLOCKS, PAGE = 5, 12, 40, 4

steps = st.lists(
    st.dictionaries(st.integers(0, SLOTS - 1), st.lists(st.integers(0, BLOCKS - 1), max_size=3), min_size=1),
    max_size=12,
)


@given(steps, st.sampled_from([0, 64]))
def test_what_was_appended_is_what_is_listed(growths, copied_lists):
    before, step_inputs.COPIED_LISTS = step_inputs.COPIED_LISTS, copied_lists
    try:
        tables, plain = BlockTables(SLOTS, PER_SLOT, BLOCKS, PAGE), {slot: [] for slot in range(SLOTS)}
        for growth in growths:
            fits = {slot: blocks for slot, blocks in growth.items() if len(plain[slot] + blocks) <= PER_SLOT}
            tables.extend([SlotWork(slot, 0, 1, (), tuple(blocks)) for slot, blocks in fits.items()])
            for slot, blocks in fits.items():
                plain[slot] += blocks
        slots = np.array([slot for slot in plain if plain[slot]], dtype=np.int64)
        counts = np.array([len(plain[slot]) for slot in slots.tolist()], dtype=np.int64)
        out = np.full(counts.sum(), -1, dtype=np.int32)
        tables.ragged(slots, counts, out)
        assert out.tolist() == [block for slot in slots.tolist() for block in plain[slot]]
        if len(slots):
            tables.check(slots, counts * PAGE, PAGE)
            last = tables.rows_at(slots, counts * PAGE - 1, PAGE)
            assert last.tolist() == [plain[slot][-1] * PAGE + PAGE - 1 for slot in slots.tolist()]
    finally:
        step_inputs.COPIED_LISTS = before


@pytest.mark.parametrize("wrong", [-1, BLOCKS])
def test_a_block_that_is_not_there_is_refused_and_the_others_are_kept(wrong):
    tables = BlockTables(SLOTS, PER_SLOT, BLOCKS, PAGE)
    with pytest.raises(ValueError, match=f"block ids .* are not within 0..{BLOCKS - 1}"):
        tables.extend([SlotWork(0, 0, 1, (), (wrong,)), SlotWork(1, 0, 1, (), (7,)), SlotWork(2, 0, 1, (), (8, 9))])
    assert tables._used.tolist() == [0, 1, 2, 0, 0]


def test_a_slot_holds_no_more_than_the_longest_sequence():
    tables = BlockTables(2, 1, BLOCKS, PAGE)
    tables.extend([SlotWork(0, 0, 1, (), (1,)), SlotWork(1, 0, 1, (), (2,))])
    with pytest.raises(ValueError, match="slot 1 would hold 2 blocks; 1 is the most"):
        tables.extend([SlotWork(1, 0, 1, (), (3,))])
