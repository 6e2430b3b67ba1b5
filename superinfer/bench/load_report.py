"""What a load test found: quantiles, attainment, goodput, and where late requests lost their time."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from superinfer.bench.load import ClientDelay
from superinfer.bench.openai_stream import Sample
from superinfer.runtime.slo import SLO, Verdict, why_late_at_client

# Stages as the report names them, and where a superinfer server's answer has them.
ENGINE_STAGES = {
    "queue": "queue_ms",
    "prefill": "prefill_ms",
    "rotated out": "rotated_ms",
    "copy wait": "copy_wait_ms",
    "preempted": "preempted_ms",
    "decode": "decode_ms",
}


class Spread(msgspec.Struct, frozen=True):
    """Quantiles of a sample of seconds; None where it is empty."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        if not len(values):
            return None
        data = np.asarray(values, dtype=float)
        p50, p90, p95, p99 = map(float, np.quantile(data, (0.5, 0.9, 0.95, 0.99)))
        return cls(float(data.mean()), p50, p90, p95, p99, float(data.max()))


class Attainment(msgspec.Struct, frozen=True, kw_only=True):
    """Of requests with a promise, the shares whose first token came in time and whose whole timeline was kept.

    A request that failed kept nothing. None: nobody was promised that.
    """

    requests: int
    ttft_met: float | None
    met: float | None


class LoadReport(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Seconds, from when a request was due; a client that sends late makes its own figures worse.

    completed, failed: requests. errors: failures by kind, with the words of one. duration: first arrival to the
    last token, or to the last arrival where nothing came after it, as from a server that died.
    ttft, e2e: of requests that completed. tbt: gaps between arrivals of tokens, of which tokens_per_chunk came at once.
    tpot: of each request, its mean gap. goodput: requests/s with all promises met.
    by_class: attainment for each SLO, as JSON. late_by: late requests by the stage that cost most;
    late_stages: mean seconds those spent in each stage. Both only where a superinfer server reported.
    """

    requests: int
    completed: int
    failed: int
    errors: dict[str, dict[str, Any]]
    duration: float
    ttft: Spread | None
    tbt: Spread | None
    tpot: Spread | None
    e2e: Spread | None
    attainment: Attainment
    by_class: dict[str, Attainment]
    goodput: float
    output_tokens: int
    output_tokens_per_s: float
    prompt_tokens_per_s: float
    tokens_per_chunk: float
    late_by: dict[str, int]
    late_stages: dict[str, float]
    client_sent: Spread | None
    client_loop: Spread | None
    client_cpu: float
    client_warning: str


def report(samples: Sequence[Sample], delay: ClientDelay) -> LoadReport:
    """Sum up one run."""
    good = [sample for sample in samples if not sample.error]
    started = min((sample.due for sample in samples), default=0.0)
    last_due = max((sample.due for sample in samples), default=0.0)
    ended = max((s.due + s.timeline.last for s in samples if s.timeline.first is not None), default=last_due)
    duration = max(ended - started, last_due - started, 1e-9)
    verdicts = [verdict_of(sample) for sample in samples]
    promised = [(s, v) for s, v in zip(samples, verdicts, strict=True) if _promises(s)]
    late = [(s, v) for s, v in promised if not v.met and s.engine is not None]
    tokens = sum(sample.tokens for sample in samples)
    chunks = sum(len(s.gaps) + (s.timeline.first is not None) for s in samples)
    classes: dict[str, list[tuple[Sample, Verdict]]] = {}
    for sample, verdict in promised:
        classes.setdefault(msgspec.json.encode(sample.slo).decode(), []).append((sample, verdict))
    return LoadReport(
        requests=len(samples),
        completed=len(good),
        failed=len(samples) - len(good),
        errors=_errors(samples),
        duration=duration,
        ttft=Spread.of([s.timeline.first for s in good if s.timeline.first is not None]),
        tbt=Spread.of([gap for s in good for gap in s.gaps]),
        tpot=Spread.of([tpot for s in good if (tpot := tpot_of(s)) is not None]),
        e2e=Spread.of([s.finished for s in good if s.finished is not None]),
        attainment=_attainment(promised),
        by_class={name: _attainment(members) for name, members in classes.items()},
        goodput=sum(verdict.met for _, verdict in promised) / duration,
        output_tokens=tokens,
        output_tokens_per_s=tokens / duration,
        prompt_tokens_per_s=sum(s.prompt_tokens for s in good) / duration,
        tokens_per_chunk=tokens / max(1, chunks),
        late_by=dict(collections.Counter(why_of(s, v) for s, v in late).most_common()),
        late_stages=_late_stages([s for s, _ in late]),
        client_sent=Spread.of(delay.sent_s),
        client_loop=Spread.of(delay.loop_s),
        client_cpu=delay.cpu,
        client_warning=delay.warning,
    )


def verdict_of(sample: Sample) -> Verdict:
    """Judged where the client stands. A failed request kept none of its promises from when it failed on."""
    verdict = sample.timeline.verdict(sample.finished if sample.finished is not None else 0.0)
    if not sample.error:
        return verdict
    slo = sample.slo or SLO()
    has_first = sample.timeline.first is not None
    return verdict._replace(
        met=False,
        ttft_met=verdict.ttft_met and (has_first or slo.ttft is None),
        tbt_met=verdict.tbt_met and slo.tbt is None,
        deadline_met=slo.deadline is None,
    )


def why_of(sample: Sample, verdict: Verdict) -> str:
    """The stage that made a request late, "" where it was not or the server does not tell."""
    if verdict.met or sample.engine is None:
        return ""
    lateness = sample.engine.lateness_ms
    return why_late_at_client(verdict.lateness, None if lateness is None else lateness / 1e3, sample.engine.why)


def stages_of(sample: Sample) -> dict[str, float]:
    """Seconds by stage, summing to the request's whole time as the client saw it. Empty where nothing was reported."""
    engine = sample.engine
    if engine is None or sample.finished is None:
        return {}
    stages = {name: getattr(engine, key) / 1e3 for name, key in ENGINE_STAGES.items()}
    return stages | {"client": sample.finished - sum(stages.values())}


def tpot_of(sample: Sample) -> float | None:
    """Mean gap between tokens; None for one token."""
    line = sample.timeline
    if line.first is None or line.last is None or line.count < 2:
        return None
    return (line.last - line.first) / (line.count - 1)


def columns(samples: Sequence[Sample]) -> dict[str, list[Any]]:
    """The raw samples, a list for each figure: smaller than a record for each request."""
    verdicts = [verdict_of(sample) for sample in samples]
    found: dict[str, list[Any]] = {
        "due": [round(s.due, 6) for s in samples],
        "sent": [_rounded(s.sent) for s in samples],
        "ttft": [_rounded(s.timeline.first) for s in samples],
        "e2e": [_rounded(s.finished) for s in samples],
        "tpot": [_rounded(tpot_of(s)) for s in samples],
        "max_tbt": [_rounded(s.timeline.max_tbt) for s in samples],
        "prompt_tokens": [s.prompt_tokens for s in samples],
        "output_tokens": [s.tokens for s in samples],
        "met": [v.met if _promises(s) else None for s, v in zip(samples, verdicts, strict=True)],
        "ttft_met": [v.ttft_met if _promises(s) else None for s, v in zip(samples, verdicts, strict=True)],
        "why": [why_of(s, v) for s, v in zip(samples, verdicts, strict=True)],
        "error": [s.error for s in samples],
    }
    slos = sorted({msgspec.json.encode(s.slo).decode() for s in samples})
    found["slos"] = slos
    found["slo"] = [slos.index(msgspec.json.encode(s.slo).decode()) for s in samples]
    if any(s.engine is not None for s in samples):
        for name in (*ENGINE_STAGES, "client"):
            found[f"{name} s"] = [_rounded(stages_of(s).get(name)) for s in samples]
    return found


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 6)


def _promises(sample: Sample) -> bool:
    return sample.slo is not None and sample.slo.promises_anything


def _attainment(judged: Sequence[tuple[Sample, Verdict]]) -> Attainment:
    first = [verdict.ttft_met for sample, verdict in judged if sample.slo is not None and sample.slo.ttft is not None]
    return Attainment(
        requests=len(judged),
        ttft_met=sum(first) / len(first) if first else None,
        met=sum(verdict.met for _, verdict in judged) / len(judged) if judged else None,
    )


def _errors(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for sample in samples:
        if sample.error:
            entry = found.setdefault(sample.error, {"count": 0, "example": sample.detail})
            entry["count"] += 1
    return found


def _late_stages(late: Sequence[Sample]) -> dict[str, float]:
    stages = [stages_of(sample) for sample in late]
    names = (*ENGINE_STAGES, "client")
    return {name: sum(each[name] for each in stages) / len(stages) for name in names} if stages else {}
