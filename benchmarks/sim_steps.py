"""What steps cost on one GPU under load: the simulator's step times fitted to an engine's trace (docs/tracing.md).

python benchmarks/sim_steps.py FOLDER [--name sim-steps]

FOLDER is the --out of `benchmarks/peer/run.py truth --trace`, with ARM.trace of each of our servers. The first run of a
trace is the calibration: its steps are kept and fitted to. The others are held out: of them it is only said how long
they took beside what the fit says. sim_truth.py takes the result as --steps, and fits to its steps again.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from record import write

from superinfer.cli.trace_file import EngineTrace, Span, read_trace
from superinfer.runtime.scheduler.cost import FACTORS, LAUNCH_S, StepLoad, StepRates
from superinfer.runtime.sim.executor import PER_BUCKET, Quirks
from superinfer.runtime.sim.hardware import Efficiency, HardwareProfile, profile_of
from superinfer.runtime.sim.shapes import ModelShape, shape_of
from superinfer.runtime.tracing import SCHEDULER, STEPS

IDLE_S, LEAST_STEPS = 0.2, 500  # a run: so many steps without such a pause
DECODE_S = 1e-6
DRAWN_TO_SEED = 1.0  # what the seed weighs, in observed steps
LEAST_OF_A_KIND = 32  # steps: of fewer, as of two while kernels were still being loaded, the seed is believed
SLOWER_S = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)  # among which is looked for how long clocks stay low
HOST = ("plan_s", "submit_s", "commit_s")
OUTLIER = 0.2  # relative error beyond which a step counts less: a pause of the host


class Step(NamedTuple):
    """One step of a trace. at: when it was told, s. took_s: on the device, less waiting for copies. told_s: from when
    the one before it was told, or it was submitted. plan_s, submit_s, commit_s: of the host; 0.0 where not traced."""

    at: float
    load: StepLoad
    took_s: float
    told_s: float
    plan_s: float
    submit_s: float
    commit_s: float

    def kind(self, captured: int) -> str:
        """decodes | chunks (in a graph) | long (launched kernel by kernel)."""
        if self.load.tokens == self.load.decodes:
            return "decodes"
        return "chunks" if self.load.tokens <= captured else "long"


def steps_of(trace: EngineTrace) -> list[Step]:
    """Those that computed something, in order."""
    host: dict[tuple[str, int], float] = {}
    for span in trace.tracks.get(SCHEDULER, []):
        host[span.name, span.args["step"]] = span.end - span.begin
    return [_step(span, host) for span in trace.tracks.get(STEPS, []) if span.args.get("tokens") and _is_over(span)]


def _is_over(span: Span) -> bool:
    return "executor_ms" in span.args


def _step(span: Span, host: dict[tuple[str, int], float]) -> Step:
    told = span.args
    load = StepLoad(told["tokens"], told["tokens"] - told["prefill_tokens"], told["kv_read"], told["pairs"])
    plan_s, submit_s, commit_s = (host.get((name, told["step"]), 0.0) for name in ("plan", "submit", "commit"))
    took_s = (told["executor_ms"] - told["stall_ms"]) / 1e3
    return Step(span.end, load, took_s, span.end - span.begin, plan_s, submit_s, commit_s)


def runs_of(steps: list[Step]) -> Iterator[list[Step]]:
    """Steps without a pause of IDLE_S between them, LEAST_STEPS at least."""
    run: list[Step] = []
    for step in steps:
        if run and step.at - step.told_s > run[-1].at + IDLE_S:
            if len(run) >= LEAST_STEPS:
                yield run
            run = []
        run.append(step)
    if len(run) >= LEAST_STEPS:
        yield run


def seed_of(profile: HardwareProfile, shape: ModelShape) -> StepRates:
    """The profile's rates; where it has nothing for a launch or a decode, something, so that they can be fitted."""
    rates = StepRates.seed(profile, shape)
    launches = {"pieces_s": max(rates.pieces_s, LAUNCH_S), "eager_s": max(rates.eager_s, LAUNCH_S)}
    return rates._replace(decode_s=max(rates.decode_s, DECODE_S), **launches)


def fit(seed: StepRates, observed: list[tuple[StepLoad, float]]) -> np.ndarray:
    """FACTORS, none below 0, that make the seed's terms the observed seconds: least squares of relative errors.

    Decodes alone tell the sum of reading weights and of a step, steps with chunks that of a step and of launching them:
    of one of the three the seed has to be believed, and is, for reading weights.
    """
    terms = np.array([seed.terms(load) for load, _ in observed])
    took = np.array([seconds for _, seconds in observed])
    factors = np.ones(len(FACTORS))
    for _ in range(30):
        by_weights = terms[:, 0] >= terms[:, 1] * factors[1]
        rows = terms.copy()
        rows[by_weights, 1] = 0.0
        rows[~by_weights, 0] = 0.0
        said = rows @ factors
        weights = np.minimum(1.0, OUTLIER / np.maximum(np.abs(took / said - 1.0), 1e-9))
        rows /= said[:, None]  # not by what they took: that has the noise in it
        factors[1:] = _least_squares(rows[:, 1:], took / said - rows[:, 0], weights)
    return factors


def _least_squares(rows: np.ndarray, wanted: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What would be negative is held at 0 and the others solved again. A factor that no step tells stays 1."""
    size = rows.shape[1]
    drawn = DRAWN_TO_SEED * np.diag(np.mean(rows**2, axis=0) + 1e-9)
    matrix, moment = (rows.T * weights) @ rows + drawn, (rows.T * weights) @ wanted + drawn.diagonal()
    free, found = np.ones(size, dtype=bool), np.zeros(size)
    for _ in range(size):
        found[:] = 0.0
        found[free] = np.linalg.solve(matrix[np.ix_(free, free)], moment[free])
        if (found >= 0.0).all():
            break
        free &= found > 0.0
    return found


class Fitted(NamedTuple):
    """What a calibration's steps tell of a machine. spread: of their times around that, without outliers."""

    efficiency: Efficiency
    factors: np.ndarray
    quirks: Quirks
    spread: float


def fitted(profile: HardwareProfile, shape: ModelShape, observed: list[tuple[StepLoad, float]]) -> Fitted:
    """Rates and quirks from steps in the order in which they ran, one right behind another, with the seconds they took.

    The two are fitted in turn; how long low clocks last is what leaves the least unexplained. Of steps longer than
    graphs take, what launching them costs is the profile's where there are fewer than LEAST_OF_A_KIND.
    """
    seed = seed_of(profile, shape)
    told = np.array([load.tokens <= seed.captured for load, _ in observed])
    if (~told).sum() >= LEAST_OF_A_KIND:
        told[:] = True
    loads, took = [load for load, _ in observed], np.array([seconds for _, seconds in observed])
    decodes = np.array([load.decodes if load.tokens == load.decodes else 0 for load in loads])
    found: Fitted | None = None
    for slower_s in SLOWER_S:
        quirks = Quirks(slower_s=slower_s)
        chunks = np.array(list(_chunks_before(quirks, observed)))
        for _ in range(4):
            times = np.array([quirks.factor(load, share) for load, share in zip(loads, chunks, strict=True)])
            alone = [(load, s) for load, s, is_told in zip(loads, took / times, told, strict=True) if is_told]
            factors = fit(seed, alone)
            efficiency = efficiency_of(profile, seed, factors)
            rates = StepRates.seed(profile._replace(efficiency=efficiency), shape)
            ratios = took / np.array([rates.seconds(load) for load in loads])
            quirks = _quirks(slower_s, ratios, chunks, decodes, told)
        times = np.array([quirks.factor(load, share) for load, share in zip(loads, chunks, strict=True)])
        errors = (ratios / times)[told]
        spread = float(np.std(errors[np.abs(errors - 1.0) < OUTLIER]))
        if found is None or spread < found.spread:
            found = Fitted(efficiency, factors, quirks, spread)
    assert found is not None
    return found


def _chunks_before(quirks: Quirks, observed: list[tuple[StepLoad, float]]) -> Iterator[float]:
    """Of each step, the share of the time before it that steps with chunks had."""
    chunks = 0.0
    for load, seconds in observed:
        yield chunks
        chunks = quirks.later(chunks, seconds, load.tokens > load.decodes)


def _quirks(slower_s: float, ratios: np.ndarray, chunks: np.ndarray, decodes: np.ndarray, told: np.ndarray) -> Quirks:
    """What explains took / said best: least squares, a line over `chunks` for steps with chunks and for each bucket of
    decodes. Buckets that few steps had are drawn between those beside them. decodes: 0 where a step has chunks."""
    bucket = (decodes + PER_BUCKET - 1) // PER_BUCKET  # 0: chunks
    used = told & (np.abs(ratios - np.median(ratios)) < OUTLIER)
    lines = {
        b: np.polynomial.polynomial.polyfit(chunks[used & (bucket == b)], ratios[used & (bucket == b)], 1)
        for b in range(int(bucket.max()) + 1)
        if (used & (bucket == b)).sum() >= LEAST_OF_A_KIND
    }
    slower = {b: max(0.0, float(line[1] / line[0])) for b, line in lines.items()}
    alone = [b for b in lines if b]
    if not alone:
        return Quirks(slower.get(0, 0.0), slower_s)
    every = range(1, alone[-1] + 1)
    by_decodes = np.interp(every, alone, [lines[b][0] for b in alone])
    slower_decodes = np.interp(every, alone, [slower[b] for b in alone])
    return Quirks(slower.get(0, 0.0), slower_s, tuple(by_decodes.tolist()), tuple(slower_decodes.tolist()))


def efficiency_of(profile: HardwareProfile, seed: StepRates, factors: np.ndarray) -> Efficiency:
    """The profile's with these factors of the seed. A share whose term was fitted to nothing is 1,000 times its own."""
    had = profile.efficiency
    share = 1.0 / np.maximum(factors, 1e-3)
    return had._replace(
        weights=float(had.weights * share[0]),
        matmul=float(had.matmul * share[1]),
        kv=float(had.kv * share[2]),
        attention=float(had.attention * share[3]),
        decode_s=float(seed.decode_s * factors[4]),
        step_s=float(seed.step_s * factors[5]),
        pieces_s=float(seed.pieces_s * factors[6]),
        eager_s=float(seed.eager_s * factors[7]),
    )


def summed_up(run: list[Step], rates: StepRates, quirks: Quirks) -> dict[str, Any]:
    """How long a run's steps took beside what was fitted, and what the host took, by kind; how busy the device was."""
    found: dict[str, Any] = {}
    all_said = _said(run, rates, quirks)
    for kind in ("decodes", "chunks", "long"):
        chosen = [number for number, step in enumerate(run) if step.kind(rates.captured) == kind]
        if not chosen:
            continue
        steps, said = [run[number] for number in chosen], all_said[chosen]
        took = np.array([step.took_s for step in steps])
        found[kind] = {
            "steps": len(steps),
            "tokens": statistics.mean(step.load.tokens for step in steps),
            "took_ms": float(took.mean()) * 1e3,
            "said_over_took": float(said.sum() / took.sum()),
            "spread": float(np.std(took / said)),
            **{name: _host(getattr(step, name) for step in steps) for name in HOST},
        }
    whole = run[-1].at - (run[0].at - run[0].told_s)
    rows = [(before, after) for before, after in itertools.pairwise(run) if _in_a_row(before, after)]
    told_s = sum(after.at - before.at for before, after in rows)
    busy = sum(after.took_s for _, after in rows) / told_s if told_s else None  # none overlapped, as on a CPU
    return found | {"seconds": whole, "device_busy": busy, "begin": run[0].at - run[0].told_s}


def _said(run: list[Step], rates: StepRates, quirks: Quirks) -> np.ndarray:
    """Seconds that each step was to take behind those before it."""
    chunks = _chunks_before(quirks, [(step.load, step.took_s) for step in run])
    return np.array(
        [rates.seconds(step.load) * quirks.factor(step.load, share) for step, share in zip(run, chunks, strict=True)]
    )


def _in_a_row(before: Step, after: Step) -> bool:
    """Whether the later step was under way, or about to be, when the one before it was told."""
    return after.at - after.told_s <= before.at + 1e-4


def _host(seconds: Iterator[float]) -> dict[str, float]:
    values = np.array(list(seconds))
    return {"p50": float(np.median(values)), "p98": float(np.quantile(values, 0.98))}


def calibrated(path: Path, profile: HardwareProfile, shape: ModelShape) -> dict[str, Any]:
    """Of one trace. Raises RuntimeError where it has no run."""
    runs = list(runs_of(steps_of(read_trace(path))))
    if not runs:
        raise RuntimeError(f"{path} has no {LEAST_STEPS} steps in a row")
    found = fitted(profile, shape, [(step.load, step.took_s) for step in runs[0]])
    rates = StepRates.seed(profile._replace(efficiency=found.efficiency), shape)
    said = _said(runs[0], rates, found.quirks)
    return {
        "efficiency": found.efficiency._asdict(),
        "factors": dict(zip(FACTORS, found.factors.tolist(), strict=True)),
        "quirks": found.quirks._asdict(),
        "spread": found.spread,
        "median_error": float(np.median(np.abs(said / [step.took_s for step in runs[0]] - 1.0))),
        "runs": [summed_up(run, rates, found.quirks) for run in runs],
        "steps": [[*step.load, round(step.took_s * 1e3, 4)] for step in runs[0]],
    }


def main() -> None:
    """Fit, print, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with ARM.trace")
    parser.add_argument("--hardware", default="h200-pcie5")
    parser.add_argument("--name", default="sim-steps")
    given = parser.parse_args()
    traces = sorted(given.folder.glob("*.trace"))
    if not traces:
        parser.error(f"{given.folder} has no ARM.trace: make them with benchmarks/peer/run.py truth --trace")
    profile, shape = profile_of(given.hardware), shape_of("llama-3-8b")
    arms: dict[str, Any] = {}
    for path in traces:
        arms[path.stem] = calibrated(path, profile, shape)
        _show(path.stem, arms[path.stem])
    command = f"python benchmarks/sim_steps.py {given.folder.name} --hardware {given.hardware}"
    print(f"written to {write(given.name, command, {'hardware': profile.name, 'model': shape.name, 'arms': arms})}")


def _show(arm: str, found: dict[str, Any]) -> None:
    print(f"{arm}: {Efficiency(**found['efficiency'])}; median error {found['median_error']:.1%}")
    for number, run in enumerate(found["runs"]):
        print(f"  run {number}: {run['seconds']:.1f} s, device busy {run['device_busy'] or math.nan:.1%}")
        for kind in ("decodes", "chunks", "long"):
            if kind in run:
                one = run[kind]
                host = "  ".join(
                    f"{name[:-2]} {one[name]['p50'] * 1e3:.2f} ({one[name]['p98'] * 1e3:.2f})" for name in HOST
                )
                print(
                    f"    {kind:8}{one['steps']:5} x {one['tokens']:5.0f} tokens  {one['took_ms']:6.2f} ms  said/took "
                    f"{one['said_over_took']:.3f}  spread {one['spread']:.1%}  host ms, p50 (p98): {host}"
                )


if __name__ == "__main__":
    main()
