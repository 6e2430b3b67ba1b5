"""What the next requests are like where the last ones become dearer or cheaper, and where they do not."""

from __future__ import annotations

import numpy as np
import pytest

from superinfer.runtime.scheduler.forecast import CHANCE, changing


@pytest.mark.parametrize("count", [64, 175])
def test_requests_that_do_not_change_are_hardly_ever_thought_to(count):
    rng = np.random.default_rng(0)
    found = [changing(rng.lognormal(0.0, 1.5, count)) is not None for _ in range(2000)]
    assert CHANCE == 3.0
    assert sum(found) < 20  # 5 expected


def test_requests_that_are_all_alike_or_too_few_to_tell_do_not_change():
    for costs in ([], [1.0], [1.0, 2.0], [1.0, 2.0, 3.0], [5.0] * 64, [5.0] * 63 + [6.0]):
        assert changing(np.array(costs)) is None


def test_where_each_is_dearer_than_any_before_it_nobody_cheaper_is_foreseen_and_the_other_way_round():
    costs = np.repeat(np.linspace(1.0, 1.2, 32), 2)  # two at a time alike
    assert set(costs[changing(costs)]) == {1.2}
    assert set(costs[changing(costs[::-1])]) == {1.2}, "the places of the cheapest of the reversed"


@pytest.mark.parametrize("growth", [1.0, 0.5, -0.7])
def test_the_next_requests_are_as_dear_among_the_last_ones_as_is_foreseen(growth):
    """Costs drift by `growth` of their deviation within 64 requests."""
    rng = np.random.default_rng(3)
    drift = growth * np.arange(96) / 64
    foreseen, came = [], []
    for _ in range(400):
        costs = rng.normal(drift)
        last, following = costs[:64], costs[64:66]
        places = changing(last)
        if places is None:
            continue
        assert np.all(np.diff(places) >= 0)
        median = np.median(last)
        foreseen.append(float((last[places] > median).mean()))
        came.append(float((following > median).mean()))
    assert len(came) > 5
    assert (np.mean(foreseen) > 0.5) == (growth > 0.0)
    assert abs(np.mean(foreseen) - 0.5) > 0.1
