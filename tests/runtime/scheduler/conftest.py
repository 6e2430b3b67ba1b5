"""Cohorts of a few sequences, as no scheduler would make them: what they get wrong is to be found here."""

from __future__ import annotations

import pytest

from superinfer.runtime.scheduler.batching import BatchScheduler

COHORTS = pytest.param(1, id="cohorts"), pytest.param(1000, id="one by one", marks=pytest.mark.slow)


@pytest.fixture(autouse=True, scope="module", params=COHORTS)
def least_cohort(request):
    """Every decode that can be in a cohort is, or none."""
    before, BatchScheduler.least_cohort = BatchScheduler.least_cohort, request.param
    yield request.param
    BatchScheduler.least_cohort = before
