"""Output lengths learnt from answers that ended and from those still under way."""

from __future__ import annotations

import numpy as np
import pytest

from superinfer.runtime.scheduler.lengths import ENOUGH, HISTORY, MAX_KINDS, LengthPredictor, Lengths

NOBODY = np.zeros(0)


def test_a_kind_is_believed_only_after_enough_answers():
    predictor = LengthPredictor()
    assert predictor.median(("a",), 100) == 100
    for _ in range(ENOUGH):
        predictor.learn(("other",), 10)
    assert predictor.median(("a",), 100) == 10  # of all
    assert predictor.median(("a",), 6) == 6
    for _ in range(ENOUGH):
        predictor.learn(("a",), 50)
    assert predictor.median(("a",), 100) == 50
    for _ in range(HISTORY):
        predictor.learn(("a",), 70)
    assert predictor.median(("a",), 100) == 70


def test_no_more_kinds_are_kept_than_may_be():
    predictor = LengthPredictor()
    for at in range(2 * MAX_KINDS):
        predictor.learn((f"program {at}",), 5)
    assert len(predictor._kinds) == MAX_KINDS
    assert f"program {2 * MAX_KINDS - 1}" in predictor._kinds
    assert "" in predictor._kinds


def test_what_remains_is_the_mean_of_those_that_were_longer():
    lengths = Lengths()
    for length in (10, 10, 10, 50):
        lengths.learn(length)
    remaining = lengths.remaining(np.array([0.0, 10.0, 30.0]), NOBODY)
    assert remaining == pytest.approx([20.0, 40.0, 20.0], rel=0.2, abs=tail_share(lengths))


def tail_share(lengths: Lengths) -> float:
    """What the tail beyond the longest answer can add."""
    return sum(lengths._sorted) / len(lengths)


@pytest.mark.parametrize("seed", range(5))
def test_answers_under_way_correct_for_the_short_ones_ending_first(seed):
    rng = np.random.default_rng(seed)
    true = rng.exponential(200.0, 400) + 1
    started = rng.uniform(0, 150, 400)  # tokens that each has had time for: the long ones have not ended
    ended, under_way = true[true <= started], started[true > started]
    lengths = Lengths()
    for length in ended.astype(int):
        lengths.learn(int(length))
    naive = float(ended.mean())
    expected = float(lengths.remaining(np.zeros(1), under_way)[0])
    assert naive < 80
    assert 130 < expected < 300
