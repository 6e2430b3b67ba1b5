"""What came of one simulated run."""

from __future__ import annotations

from collections.abc import Sequence as Many

import msgspec
import numpy as np

from superinfer.runtime.scheduler.cost import CostError


class Quantiles(msgspec.Struct, frozen=True):
    """Of a sample; NaN where it is empty."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Many[float]) -> Quantiles:
        if not len(values):
            return cls(*[float("nan")] * 4)
        data = np.asarray(values, dtype=float)
        p50, p90, p99 = np.quantile(data, (0.5, 0.9, 0.99))
        return cls(float(data.mean()), float(p50), float(p90), float(p99))


class Movement(msgspec.Struct, frozen=True):
    """What moved between the tiers. in: DRAM to HBM. Blocks are whole.

    rotations_out, rotations_in: sequences. bytes_*: copied; mirrored: of those out, in the background.
    gbps_*: 10^9 bytes/s over the run. busy_*: share of the run that the link was busy, both: both ways at once.
    stall_share: of the run, steps waiting for copies. dram_peak: most of DRAM that rotated-out sequences needed, 0..1.
    dram_hits: blocks of cached prefixes loaded rather than computed.
    """

    rotations_out: int
    rotations_in: int
    bytes_in: int
    bytes_out: int
    mirrored: int
    gbps_in: float
    gbps_out: float
    busy_in: float
    busy_out: float
    busy_both: float
    stall_share: float
    dram_peak: float
    dram_hits: int


class Residency(msgspec.Struct, frozen=True, array_like=True):
    """Sequences at a moment: with KV in HBM, rotated out, and waiting without any KV; output tokens up to then."""

    at: float
    resident: int
    rotated: int
    waiting: int
    tokens: int = 0


class Passed(msgspec.Struct, frozen=True, array_like=True):
    """What there had been by a moment of `SimConfig.leave_at`: counts, and bytes copied both ways."""

    steps: int
    preemptions: int
    rotations: int
    moved_bytes: int


class SimResult(msgspec.Struct, frozen=True, kw_only=True):
    """What came of one run. Seconds of simulated time, unless a name says otherwise.

    requests: finished. refused: longer than the engine takes, not run. given_up: or left, see `SimConfig`; they kept no
        promise, and count in ttft_met and met alone. ttft, tbt (between tokens, all gaps) and tpot
        (each request's mean gap): quantiles. within_1s, within_5s: of first tokens.
    ttft_met, met: shares of requests whose first token, and whose whole promise, was in time, of those that have such
        a promise; None if none has. met_by_class: `met` for each SLO, as JSON.
    goodput: requests per second with all met. duration: from the first arrival to the last token. tokens_per_s: output.
    preemptions, steps: counts. cached: share of prompt tokens not computed. peak_live: unfinished requests at most.
    plan_ms: CPU time of `plan`, milliseconds. wall_s: of the run.
    requests_per_wall_s: requests simulated in one second of wall time.
    cost_error: of the cost model's predictions against the simulated steps.
    moved: None with one tier. residency: who was where, every SAMPLE_S seconds. passed: by each `SimConfig.leave_at`.
    """

    policy: str
    requests: int
    refused: int
    duration: float
    ttft: Quantiles
    tbt: Quantiles
    tpot: Quantiles
    ttft_met: float | None
    met: float | None
    met_by_class: dict[str, float]
    within_1s: float
    within_5s: float
    goodput: float
    tokens_per_s: float
    preemptions: int
    steps: int
    cached: float
    peak_live: int
    plan_ms: Quantiles
    plan_ms_max: float
    wall_s: float
    requests_per_wall_s: float
    cost_error: CostError
    moved: Movement | None = None
    residency: list[Residency] = []
    given_up: int = 0
    passed: list[Passed] = []
