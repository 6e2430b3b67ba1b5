"""What an SLO accepts, how SLOs nest, and who met theirs."""

from __future__ import annotations

import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from superinfer.runtime.slo import SLO, TokenTimeline, why_late, why_late_at_client


@pytest.mark.parametrize("field", ["ttft", "tbt", "deadline", "weight"])
@pytest.mark.parametrize("value", [-1.0, 0.0, math.nan, math.inf, "1", True])
def test_a_promise_must_be_a_positive_finite_number(field, value):
    with pytest.raises(ValueError, match=field):
        SLO(**{field: value})


def test_on_miss_must_be_known():
    with pytest.raises(ValueError, match="'shrug' must be"):
        SLO(on_miss="shrug")


@pytest.mark.parametrize("bad", [{"ttft": -1.0}, {"ttft": "soon"}, {"tftt": 1.0}])
def test_a_bad_slo_does_not_come_in_over_the_wire(bad):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(bad, SLO)


def test_the_nearest_value_wins_and_deadlines_take_the_minimum():
    outer = SLO(ttft=1.0, tbt=0.1, deadline=5.0, on_miss="truncate")
    assert SLO(ttft=0.2, deadline=9.0).within(outer) == SLO(ttft=0.2, tbt=0.1, deadline=5.0, on_miss="truncate")
    assert SLO(deadline=2.0).within(outer).deadline == 2.0
    assert SLO(ttft=3.0).within(None) == SLO(ttft=3.0)


def test_token_k_is_due_at_ttft_plus_k_tbt_and_none_after_the_deadline():
    timeline = TokenTimeline(SLO(ttft=1.0, tbt=0.1, deadline=1.25))
    assert [timeline.due(k) for k in range(4)] == pytest.approx([1.0, 1.1, 1.2, 1.25])


def test_slack_earned_by_fast_tokens_pays_for_a_pause():
    timeline = TokenTimeline(SLO(ttft=1.0, tbt=0.1))
    for at in (0.2, 0.25, 0.3, 1.25):  # the fourth token was due at 1.3
        timeline.tokens(1, at)
    assert timeline.verdict(1.25).met
    assert timeline.max_tbt == pytest.approx(0.95)
    timeline.tokens(1, 1.45)
    verdict = timeline.verdict(1.45)
    assert (verdict.met, verdict.ttft_met, verdict.tbt_met) == (False, True, False)
    assert verdict.lateness == pytest.approx(0.05)


def test_without_ttft_the_pace_counts_from_the_first_token():
    timeline = TokenTimeline(SLO(tbt=0.1))
    timeline.tokens(1, 50.0)
    timeline.tokens(1, 50.05)
    assert timeline.verdict(50.05).met


def test_a_request_without_a_token_missed_its_ttft_only_once_that_has_passed():
    timeline = TokenTimeline(SLO(ttft=1.0))
    assert timeline.verdict(0.9).met
    assert not timeline.verdict(1.1).met


@given(
    ttft=st.floats(0.01, 2),
    tbt=st.floats(0.01, 1),
    gaps=st.lists(st.floats(0, 1), min_size=1, max_size=30),
)
def test_the_running_verdict_agrees_with_the_definition(ttft, tbt, gaps):
    timeline = TokenTimeline(SLO(ttft=ttft, tbt=tbt))
    times = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    for at in times:
        timeline.tokens(1, at)
    verdict = timeline.verdict(times[-1])
    assert verdict.tbt_met == all(at <= ttft + k * tbt for k, at in enumerate(times))
    assert verdict.ttft_met == (times[0] <= ttft)
    assert verdict.lateness == pytest.approx(max(at - ttft - k * tbt for k, at in enumerate(times)))


def blamed(slo: SLO, times: list[float], before: dict[str, float], after: dict[str, float]) -> str:
    timeline = TokenTimeline(slo)
    for at in times:
        timeline.tokens(1, at)
    return why_late(timeline.verdict(times[-1]), slo, len(times), before, after)


def test_what_was_promised_to_take_its_time_is_not_blamed():
    slo = SLO(ttft=1.0, tbt=0.1)
    on_pace = [3.0 + 0.1 * k for k in range(200)]  # 3 s late all along, 20 s of decoding
    assert blamed(slo, on_pace, {"queue": 2.5, "prefill": 0.5}, {"decode": 19.9}) == "queue"
    paused = [0.9] + [1.0 + 0.1 * k + 2.0 for k in range(1, 100)]
    assert blamed(slo, paused, {"queue": 0.8, "prefill": 0.1}, {"decode": 9.9, "rotated out": 2.1}) == "rotated out"
    slow = [0.9] + [1.0 + 0.2 * k for k in range(1, 100)]
    assert blamed(slo, slow, {"queue": 0.8, "prefill": 0.1}, {"decode": 19.9}) == "decode"


def test_a_deadline_blames_what_took_longest():
    slo = SLO(deadline=2.0)
    assert blamed(slo, [1.5, 2.5], {"queue": 1.4, "prefill": 0.1}, {"decode": 0.5, "copy wait": 0.5}) == "queue"


def test_a_kept_promise_blames_nobody():
    assert blamed(SLO(ttft=1.0), [0.5, 9.0], {"queue": 0.5}, {"decode": 8.5}) == ""


@pytest.mark.parametrize(
    ("seen", "engine", "why", "blamed"),
    [
        (0.5, -0.2, "", "client"),  # the engine kept it
        (0.5, None, "", "client"),  # the engine said nothing
        (0.5, 0.4, "queue", "queue"),
        (5.0, 0.4, "queue", "client"),  # most of the lateness came afterwards
    ],
)
def test_the_client_is_blamed_for_what_the_engine_did_not_see(seen, engine, why, blamed):
    assert why_late_at_client(seen, engine, why) == blamed
