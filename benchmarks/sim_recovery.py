"""After an overload: how long until first tokens and throughput are as they were before it. Simulated; scheduler and KV
bookkeeping are the real ones.

Llama-3-8B on an H100, a KV pool of 153,600 tokens, Azure 2023 conversation lengths, Poisson arrivals: a calm stretch,
60 s of more than the machine can do, calm again. Two endings:

served: everybody stays, and what the overload has left is computed, whoever has to wait for it.
left: the clients of all that is under way leave when the overload ends.

Windows of WINDOW_S: median and 90th percentile of TTFT by arrival, and output tokens/s. A window is as before the
overload if it is no worse than the worst of the calm before, or, by NEAR, than the same window of a run whose middle
is calm too, in which the same requests arrive: calm stretches have bursts of their own. A figure is back from when
all windows are so for STAYS_S; `in_time` from when all first tokens come within their second. Each is told in seconds
from the last arrival of the overload, and from when no more wait than ever did in the calm before: until then the
machine has more to do than what comes, in whatever order. Needs the trace's file (CC-BY; Patel et al., Splitwise,
ISCA 2024).
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from record import write

from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.result import SimResult
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.sim.simulate import SimConfig, simulate
from superinfer.runtime.sim.workload import Job, make_jobs
from superinfer.runtime.slo import SLO

STREAM = SLO(ttft=1.0, tbt=0.1)
KV_TOKENS, DRAM_TOKENS = 153_600, 524_288
WARM_S = 10.0  # of the first calm stretch, in which the machine fills
WINDOW_S, EVERY_S = 2.0, 0.5
STAYS_S = 10.0
NEAR, NEAR_S = 0.1, 0.01  # of the value, and of a TTFT so many seconds more: a step
ENDINGS = ("served", "left")
# Policy and DRAM tokens. `lru` with one tier is `fcfs`.
ARMS = (("fcfs", 0), ("fcfs", DRAM_TOKENS), ("lru", DRAM_TOKENS), ("rota", 0), ("rota", DRAM_TOKENS))
FIGURES = ("in_time", "ttft_p50", "ttft_p90", "tokens_per_s")
LEAST = ("in_time", "tokens_per_s")  # of which less is worse


class Stretches(NamedTuple):
    """Seconds, and requests/s."""

    before_s: float = 60.0
    overload_s: float = 60.0
    after_s: float = 170.0
    calm: float = 12.0
    overload: float = 35.0

    @property
    def end(self) -> float:
        """Of the overload's arrivals."""
        return self.before_s + self.overload_s


class Window(NamedTuple):
    """TTFT in seconds of the requests that arrived in it, NaN if none did; tokens/s put out in it."""

    begin: float
    ttft_p50: float
    ttft_p90: float
    in_time: float
    tokens_per_s: float


def jobs_of(stretches: Stretches, trace: Path, seed: int, *, overload: bool) -> list[Job]:
    """Arrivals of the three stretches; without `overload`, the middle one is calm too. Prompts share nothing."""
    jobs: list[Job] = []
    parts = (
        (0.0, stretches.before_s, stretches.calm),
        (stretches.before_s, stretches.overload_s, stretches.overload if overload else stretches.calm),
        (stretches.end, stretches.after_s, stretches.calm),
    )
    for number, (begin, seconds, rate) in enumerate(parts):
        slos = [(1.0, STREAM)]
        made = make_jobs("azure", rate=rate, duration=seconds, seed=3 * seed + number, trace=trace, slos=slos)
        jobs += [job._replace(at=begin + job.at, blocks=(-1 - len(jobs) - at,)) for at, job in enumerate(made)]
    return jobs


def windows_of(done: list[Sequence], result: SimResult, until: float) -> list[Window]:
    """From 0 to `until`, one begun every EVERY_S."""
    ordered = sorted((s for s in done if s.timeline.first is not None), key=lambda s: s.arrival)
    arrivals = np.array([sequence.arrival for sequence in ordered])
    ttft = np.array([sequence.timeline.first for sequence in ordered])
    times = np.array([sample.at for sample in result.residency])
    tokens = np.array([sample.tokens for sample in result.residency])
    windows = []
    for begin in np.arange(0.0, until - WINDOW_S + 1e-9, EVERY_S).tolist():
        first, last = np.searchsorted(arrivals, (begin, begin + WINDOW_S))
        rate = float(np.diff(np.interp((begin, begin + WINDOW_S), times, tokens))[0]) / WINDOW_S
        if first == last:
            windows.append(Window(begin, np.nan, np.nan, np.nan, rate))
            continue
        p50, p90 = np.quantile(ttft[first:last], (0.5, 0.9)).tolist()
        in_time = float(np.mean(ttft[first:last] <= (STREAM.ttft or 0.0)))
        windows.append(Window(begin, p50, p90, in_time, rate))
    return windows


def back_after(
    windows: list[Window], control: list[Window], column: str, calm: list[Window], end: float
) -> float | None:
    """Seconds from `end` until no window is worse than before for STAYS_S; None if that is not seen. A window without
    requests is not worse."""
    sign = -1.0 if column in LEAST else 1.0  # larger is worse
    bound = max(sign * getattr(window, column) for window in calm)
    begins, worse = [], []
    for window, other in zip(windows, control, strict=True):
        if window.begin >= end:
            value, usual = sign * getattr(window, column), sign * getattr(other, column)
            begins.append(window.begin)
            worse.append(value > bound and not value <= usual + NEAR * abs(usual) + NEAR_S)
    stays = round(STAYS_S / EVERY_S)
    for at in range(len(begins) - stays):
        if not any(worse[at : at + stays]):
            return begins[at] - end
    return None


def run(policy: str, dram: int, jobs: list[Job], leave_at: tuple[float, ...]) -> tuple[SimResult, list[Sequence]]:
    """One simulation, and what finished or was given up in it."""
    done: list[Sequence] = []
    config = SimConfig(policy=policy, kv_tokens=KV_TOKENS, dram_tokens=dram, leave_at=leave_at)
    return simulate(jobs, profile_of("h100-pcie5"), shape_of("llama-3-8b"), config, done.append), done


def measure(policy: str, dram: int, trace: Path, seed: int) -> dict[str, dict[str, Any]]:
    """Both endings, of one seed."""
    stretches = Stretches()
    end, until = stretches.end, stretches.end + stretches.after_s
    result, done = run(policy, dram, jobs_of(stretches, trace, seed, overload=False), ())
    control = windows_of(done, result, until)
    rows = {}
    for ending in ENDINGS:
        jobs = jobs_of(stretches, trace, seed, overload=True)
        result, done = run(policy, dram, jobs, (end,) if ending == "left" else ())
        windows = windows_of(done, result, until)
        calm = [window for window in windows if WARM_S <= window.begin <= stretches.before_s - WINDOW_S]
        waits = [(sample.at, sample.waiting + sample.rotated) for sample in result.residency]
        usual = max(number for at, number in waits if at < stretches.before_s)
        gone = next(at for at, number in waits if at >= end and number <= usual)
        early = [sequence.timeline.first or np.inf for sequence in done if end <= sequence.arrival < end + 5.0]
        rows[ending] = {
            "seed": seed,
            "worked_off_s": gone - end,
            "ttft_p50_before": statistics.median(window.ttft_p50 for window in calm),
            "ttft_p50_drain": _mean(windows, "ttft_p50", end + 5.0, gone),
            "tokens_per_s_before": _mean(windows, "tokens_per_s", WARM_S, stretches.before_s),
            "tokens_per_s_overload": _mean(windows, "tokens_per_s", stretches.before_s + 30.0, end),
            "tokens_per_s_drain": _mean(windows, "tokens_per_s", end, gone),
            "first_5s_ttft_p50": float(np.median(early)),
            "first_5s_in_time": float(np.mean(np.array(early) <= 1.0)),
            "preemptions": result.preemptions,
        } | {
            f"back_from_{origin}": {column: back_after(windows, control, column, calm, begin) for column in FIGURES}
            for origin, begin in (("arrivals", end), ("worked_off", gone))
        }  # fmt: skip
    return rows


def _mean(windows: list[Window], column: str, begin: float, end: float) -> float | None:
    values = [getattr(w, column) for w in windows if begin <= w.begin <= end - WINDOW_S]
    return float(np.nanmean(values)) if values else None


def worst(rows: list[dict[str, Any]], origin: str) -> dict[str, float | None]:
    """Of all seeds; None where one was not back."""
    found = {}
    for column in FIGURES:
        values = [row[origin][column] for row in rows]
        found[column] = None if None in values else max(values)
    return found


def main() -> None:
    """Simulate, print, write results/sim-recovery.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="azure_conv_2023.csv")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    arms = []
    for policy, dram in ARMS:
        seeds = [measure(policy, dram, arguments.trace, seed) for seed in range(arguments.seeds)]
        for ending in ENDINGS:
            rows = [seed[ending] for seed in seeds]
            back = {origin: worst(rows, f"back_from_{origin}") for origin in ("arrivals", "worked_off")}
            arms.append({"ending": ending, "policy": policy, "dram_tokens": dram, "worst": back, "runs": rows})
            print(
                f"{policy:4} {'two tiers' if dram else 'one tier':9} {ending:6}: worked off after "
                f"{max(row['worked_off_s'] for row in rows):5.1f} s; back from the last arrival "
                f"{_shown(back['arrivals'])}, from then {_shown(back['worked_off'])}; in the first 5 s TTFT p50 "
                f"{max(row['first_5s_ttft_p50'] for row in rows):.2f} s, "
                f"{min(row['first_5s_in_time'] for row in rows):.0%} in time",
                flush=True,
            )
    record = {
        "simulated": True, "hardware": "h100-pcie5", "model": "llama-3-8b", "workload": "azure",
        "kv_tokens": KV_TOKENS, "stretches": Stretches()._asdict(), "window_s": WINDOW_S, "stays_s": STAYS_S,
        "slo": {"ttft": STREAM.ttft, "tbt": STREAM.tbt}, "arms": arms,
    }  # fmt: skip
    command = f"python benchmarks/sim_recovery.py azure_conv_2023.csv --seeds {arguments.seeds}"
    print(f"written to {write('sim-recovery', command, record)}")


def _shown(back: dict[str, float | None]) -> str:
    return ", ".join(f"{column} {'never' if s is None else format(s, '.1f')}" for column, s in back.items())


if __name__ == "__main__":
    main()
