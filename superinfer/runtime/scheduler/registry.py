"""Policies by name. Imports one only when it is built: help texts name them all, and some need NumPy."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from superinfer.errors import InvalidRequestError

if TYPE_CHECKING:
    from superinfer.runtime.config import Admission
    from superinfer.runtime.kv.cache import KVCache
    from superinfer.runtime.scheduler.base import Scheduler, SchedulerLimits
    from superinfer.runtime.scheduler.batching import BatchScheduler
    from superinfer.runtime.scheduler.cost import StepCost

# Module in this package, and class.
POLICIES = {
    "fcfs": ("fcfs", "FCFS"),
    "edf": ("edf", "EDF"),
    "sjf": ("sjf", "SJF"),
    "priority": ("priority", "Priority"),
    "lru": ("lru", "LRU"),
    "lvf-time": ("lvf_time", "LVFTime"),
    "rota": ("rota", "Rota"),
}


def check_policy(policy: str) -> None:
    """Raises InvalidRequestError for a name nobody has."""
    if policy not in POLICIES:
        raise InvalidRequestError(f"policy {policy!r} is unknown; choose one of {', '.join(sorted(POLICIES))}")


def build_scheduler(
    policy: str, kv: KVCache, limits: SchedulerLimits, cost: StepCost | None = None, admission: Admission = "accept"
) -> Scheduler:
    """A scheduler of the named policy over `kv`. cost: what is known of the machine beforehand. admission: see
    EngineConfig.

    Raises InvalidRequestError for a name nobody has.
    """
    check_policy(policy)
    module, name = POLICIES[policy]
    found: type[BatchScheduler] = getattr(import_module(f"{__package__}.{module}"), name)
    scheduler = found(kv, limits, cost)
    scheduler.admission = admission
    return scheduler
