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
    remaining = lengths.curve(NOBODY).remaining(np.array([0.0, 10.0, 30.0]), np.full(3, 1e6))
    assert remaining == pytest.approx([20.0, 40.0, 20.0], rel=0.2, abs=tail_share(lengths))


def tail_share(lengths: Lengths) -> float:
    """What the tail beyond the longest answer can add."""
    return lengths.curve(NOBODY).tail


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
    expected = float(lengths.curve(under_way).remaining(np.zeros(1), np.full(1, 1e6))[0])
    assert naive < 80
    assert 130 < expected < 300


def test_answers_cut_at_their_max_tokens_tell_that_it_is_what_they_produce():
    """Whoever always uses up max_tokens will again: a mean capped by each max_tokens would foresee too little."""
    rng = np.random.default_rng(0)
    most = rng.exponential(300.0, 200).astype(int) + 1
    lengths = Lengths()
    for length in most.tolist():
        lengths.learn(length, is_cut=True)
    curve = lengths.curve(np.array([50.0, 700.0]))
    assert curve.below(most.astype(float)) == pytest.approx(most, rel=1e-6)
    asked = np.array([30.0, 5000.0, 9000.0])
    assert curve.remaining(np.array([10.0, 100.0, 8000.0]), asked) == pytest.approx([20.0, 4900.0, 1000.0], rel=1e-6)


@pytest.mark.parametrize("most", [20.0, 150.0, 400.0, 5000.0])
@pytest.mark.parametrize("produced", [0.0, 60.0, 800.0])
def test_what_is_foreseen_of_many_is_what_they_produce_whatever_max_tokens_cuts(most, produced):
    """Their ends would be exponential, so any age may be asked for; half of the known answers were cut."""
    rng = np.random.default_rng(1)
    lengths = Lengths()
    for own, cut in zip(rng.exponential(200.0, HISTORY) + 1, rng.uniform(50.0, 800.0, HISTORY), strict=True):
        lengths.learn(int(min(own, cut)), is_cut=own > cut)
    if produced >= most:
        return
    expected = float(lengths.curve(NOBODY).remaining(np.array([produced]), np.array([most]))[0])
    assert expected == pytest.approx(200.0 * (1.0 - np.exp(-(most - produced) / 200.0)), rel=0.25)
