"""What the engine tells of itself when it is asked: health, gauges and counters."""

from __future__ import annotations

from dataclasses import dataclass

from superinfer.runtime.engine.attainment import Attainment
from superinfer.runtime.engine.executor import TierLimits
from superinfer.runtime.engine.tier_stats import tier_stats
from superinfer.runtime.protocol import HealthReport, StatsReport
from superinfer.runtime.scheduler.base import Scheduler
from superinfer.runtime.scheduler.sequence import SequenceUpdate


@dataclass
class Counters:
    """What happened since the start. Sequences, tokens, seconds. not_finite: of the failed, those whose own logits were
    no numbers."""

    steps: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    not_finite: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    prefill_tokens: int = 0
    output_tokens: int = 0
    slo_met: int = 0
    slo_missed: int = 0
    step_s: float = 0.0
    schedule_s: float = 0.0

    def ended(self, update: SequenceUpdate, met: bool | None) -> None:
        """A sequence ended. met: its promise; None: it had none."""
        if update.finish_reason == "cancelled":
            self.cancelled += 1
        else:
            self.finished += 1
        self.prompt_tokens += update.sequence.num_prompt
        self.cached_tokens += update.sequence.cached
        self.slo_met += met is True
        self.slo_missed += met is False


def health_report(token: int, scheduler: Scheduler, *, stopping: bool, uptime_s: float, idle_s: float) -> HealthReport:
    """token: of who asks. idle_s: since the loop last turned."""
    counts = scheduler.counts()
    return HealthReport(
        token=token,
        status="stopping" if stopping else "ok",
        uptime_s=uptime_s,
        running=counts.running,
        waiting=counts.waiting,
        idle_s=idle_s,
    )


def stats_report(
    token: int, scheduler: Scheduler, counters: Counters, attainment: Attainment, tier: TierLimits | None
) -> StatsReport:
    """token: of who asks. tier: the second one, if there is one."""
    counts, steps, cost_error = scheduler.counts(), max(1, counters.steps), scheduler.cost.error()
    return StatsReport(
        token=token,
        steps=counters.steps,
        running=counts.running,
        waiting=counts.waiting,
        finished=counters.finished,
        cancelled=counters.cancelled,
        failed=counters.failed,
        preemptions=counts.preemptions,
        prompt_tokens=counters.prompt_tokens,
        cached_tokens=counters.cached_tokens,
        output_tokens=counters.output_tokens,
        slo_met=counters.slo_met,
        slo_missed=counters.slo_missed,
        blocks_total=counts.blocks_total,
        blocks_free=counts.blocks_free,
        blocks_cached=counts.blocks_cached,
        step_s_mean=counters.step_s / steps,
        schedule_s_mean=counters.schedule_s / steps,
        tiers=tier_stats(counts.tiers, tier.block_bytes) if counts.tiers is not None and tier is not None else None,
        classes=attainment.report(),
        cost_error_p50=cost_error.median,
        cost_error_p90=cost_error.p90,
        prefill_tokens=counters.prefill_tokens,
        not_finite=counters.not_finite,
    )
