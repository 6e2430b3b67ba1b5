"""Policies by name."""

from __future__ import annotations

from superinfer.errors import InvalidRequestError
from superinfer.runtime.kv.cache import KVCache
from superinfer.runtime.scheduler.base import Scheduler, SchedulerLimits
from superinfer.runtime.scheduler.cost import StepCost
from superinfer.runtime.scheduler.edf import EDF
from superinfer.runtime.scheduler.fcfs import FCFS
from superinfer.runtime.scheduler.lru import LRU
from superinfer.runtime.scheduler.priority import Priority
from superinfer.runtime.scheduler.rota import Rota
from superinfer.runtime.scheduler.sjf import SJF

POLICIES = {policy.name: policy for policy in (FCFS, EDF, SJF, Priority, LRU, Rota)}


def build_scheduler(policy: str, kv: KVCache, limits: SchedulerLimits, cost: StepCost | None = None) -> Scheduler:
    """A scheduler of the named policy over `kv`. cost: what is known of the machine beforehand.

    Raises InvalidRequestError for a name nobody has.
    """
    found = POLICIES.get(policy)
    if found is None:
        raise InvalidRequestError(f"policy {policy!r} is unknown; choose one of {', '.join(sorted(POLICIES))}")
    return found(kv, limits, cost)
