"""A plan's copies as columns say the same as one by one."""

from __future__ import annotations

import pytest

from superinfer.runtime.kv.copies import BlockCopy, Copies

COPIES = [
    BlockCopy(3, True, 10, 20),
    BlockCopy(4, False, 10, 21, (3,)),
    BlockCopy(6, True, 10, 20, (3, 4)),
    BlockCopy(9, True, 12, 21, (4,)),
]


def test_copies_come_back_one_by_one_in_the_order_of_their_ids():
    copies = Copies.of(COPIES)
    assert [*copies] == COPIES and len(copies) == 4
    assert [way.ids for way in copies.ways] == [[4], [3, 6, 9]]
    assert [way.after for way in copies.ways] == [[3], [0, 4, 4]]


def test_rows_that_are_picked_or_split_off_keep_what_they_follow():
    _, outs = Copies.of(COPIES).ways
    assert [*outs.pick([2, 1]).rows(True)] == [COPIES[3], COPIES[2]]
    assert [*outs.without([0, 2]).rows(True)] == [COPIES[2]]
    chosen, others = outs.split([False, True, False])
    assert [*chosen.rows(True)] == [COPIES[2]] and [*others.rows(True)] == [COPIES[0], COPIES[3]]
    assert outs.split([True] * 3)[0].ids == outs.split([False] * 3)[1].ids == [3, 6, 9]


@pytest.mark.parametrize(
    ("copies", "message"),
    [
        (COPIES[::-1], "id 6 comes behind that with id 9"),
        ([COPIES[0], COPIES[0]], "id 3 comes behind that with id 3"),
        ([BlockCopy(0, True, 0, 0), BlockCopy(1, False, 0, 1, (0,))], "ids begin at 1"),
    ],
)
def test_ids_that_do_not_grow_or_cannot_be_followed_are_refused(copies, message):
    with pytest.raises(ValueError, match=message):
        Copies.of(copies)
