"""How many promises of each SLO class were kept: counters that are bounded whatever names clients give."""

from __future__ import annotations

from collections import Counter

from superinfer.runtime.protocol import ClassStats, FinishReason, RequestReport

MAX_CLASSES = 256
DEFAULT, OTHERS = "default", "others"


class Attainment:
    """Counters by class. Classes beyond MAX_CLASSES are counted together as "others"."""

    def __init__(self) -> None:
        self._classes: dict[str, Counter[str]] = {}

    def ended(self, slo_class: str, reason: FinishReason | None, report: RequestReport) -> None:
        """A sequence ended. What its caller cancelled says nothing about its promise, and is only counted."""
        counts = self._of(slo_class)
        counts["requests"] += 1
        counts["degraded"] += report.degraded
        if reason == "cancelled":
            return
        counts["met"] += report.met is True
        counts["missed"] += report.met is False
        counts["ttft_met"] += report.ttft_met is True
        counts["expired"] += reason == "deadline"

    def refused(self, slo_class: str, sequences: int) -> None:
        """So many sequences were refused for overload."""
        counts = self._of(slo_class)
        counts["requests"] += sequences
        counts["refused"] += sequences

    def report(self) -> dict[str, ClassStats]:
        """For a StatsReport."""
        return {name: ClassStats(**counts) for name, counts in self._classes.items()}

    def _of(self, slo_class: str) -> Counter[str]:
        name = slo_class or DEFAULT
        if name not in self._classes and len(self._classes) >= MAX_CLASSES:
            name = OTHERS
        return self._classes.setdefault(name, Counter())
