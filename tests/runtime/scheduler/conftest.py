"""Cohorts of a few sequences, as no scheduler would make them: what they get wrong is to be found here."""

from __future__ import annotations

import pytest

from superinfer.runtime.scheduler.batching import BatchScheduler


@pytest.fixture(autouse=True, scope="module", params=[1, 1000], ids=["cohorts", "one by one"])
def least_cohort(request):
    """Every decode that can be in a cohort is, or none."""
    before, BatchScheduler.least_cohort = BatchScheduler.least_cohort, request.param
    yield request.param
    BatchScheduler.least_cohort = before
