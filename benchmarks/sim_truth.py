"""The simulator held against an H200: the very jobs of the overload runs, simulated, beside what was measured.

python benchmarks/sim_truth.py azure_conv_2023.csv [--measured h200-vs-vllm-slo-before] [--arms ours-fcfs,ours-rota]

The measured runs are this engine behind its HTTP server (benchmarks/peer/run.py slo). Nothing in the profile was fitted
to them: sim_calibrate.py says what it was fitted to. Times are the client's: from when a request was due.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from record import RESULTS, write

from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.sim.hardware import HardwareProfile, profile_of
from superinfer.runtime.sim.shapes import ModelShape, shape_of
from superinfer.runtime.sim.simulate import SimConfig, simulate
from superinfer.runtime.sim.workload import Job, make_jobs
from superinfer.runtime.slo import SLO

POLICIES = {"ours-fcfs": "fcfs", "ours-rota": "rota", "ours-edf": "edf"}
# The bounds: points of attainment, else relative.
BOUNDS = {
    "ttft_met": 0.05, "met": 0.05, "tpot_s": 0.05, "e2e_s": 0.05, "ttft_s": 0.10, "tokens_per_s": 0.02,
    "link_bytes": 0.10, "rotations": 0.10,
}  # fmt: skip
SHARES = ("ttft_met", "met")


class Asked(NamedTuple):
    """One simulated request as its client saw it, seconds from when it was due. None: it never came."""

    first: float | None
    last: float | None
    tokens: int
    ttft_met: bool
    met: bool
    completed: bool


def mean(values: list[float]) -> float | None:
    """None of nothing."""
    return sum(values) / len(values) if values else None


def asked(sequence: Sequence, job: Job, way_s: float) -> Asked:
    """Judged where the client stands: its promise begins `way_s` and the engine's reading before the engine's."""
    line, completed = sequence.timeline, sequence.finish_reason == "length"
    later = sequence.arrival + way_s - job.at
    first = None if line.first is None else line.first + later
    last = None if line.last is None else line.last + later
    slo = job.slo
    assert slo is not None and slo.ttft is not None
    in_time = first is not None and first <= slo.ttft
    assert sequence.finished_at is not None
    lateness = line.verdict(sequence.finished_at - sequence.arrival).lateness + later
    return Asked(first, last, line.count, in_time, completed and lateness <= 0, completed)


def simulated(
    jobs: list[Job], profile: HardwareProfile, shape: ModelShape, config: SimConfig
) -> tuple[dict[str, float | None], list[Asked]]:
    """The figures of BOUNDS, by the definitions of superinfer/bench/load_report.py. Also each request."""
    found: dict[int, Asked] = {}
    way_s = config.way_s or 0.0

    def ended(sequence: Sequence) -> None:
        found[sequence.id] = asked(sequence, jobs[sequence.id], way_s)

    run = simulate(jobs, profile, shape, config, ended)
    done = [one for one in found.values() if one.completed]
    seen = [(jobs[at].at + one.last, one) for at, one in found.items() if one.last is not None]
    duration = max(at for at, _ in seen) - jobs[0].at
    moved = run.moved
    return {
        "ttft_met": mean([one.ttft_met for one in found.values()]),
        "met": mean([one.met for one in found.values()]),
        "tpot_s": mean([(o.last - o.first) / (o.tokens - 1) for o in done if o.tokens > 1 and o.first and o.last]),
        "e2e_s": mean([one.last for one in done if one.last is not None]),
        "ttft_s": mean([one.first for one in done if one.first is not None]),
        "tokens_per_s": sum(one.tokens for _, one in seen) / duration,
        "link_bytes": float(moved.bytes_in + moved.bytes_out) if moved else None,
        "rotations": float(moved.rotations_in + moved.rotations_out) if moved else None,
        "completed": float(len(done)),
        "steps": float(run.steps),
        "preemptions": float(run.preemptions),
        "ttft_p50_s": _quantile([o.first for o in done if o.first is not None], 0.5),
        "ttft_p99_s": _quantile([o.first for o in done if o.first is not None], 0.99),
    }, list(found.values())


def _quantile(values: list[float], share: float) -> float | None:
    return sorted(values)[round(share * (len(values) - 1))] if values else None


def real(run: dict[str, Any]) -> dict[str, float | None]:
    """The same figures of a measured run."""
    report, counters = run["report"], run["counters"]
    tiers = "superinfer:link_bytes_total" in counters
    return {
        "ttft_met": report["attainment"]["ttft_met"],
        "met": report["attainment"]["met"],
        "tpot_s": report["tpot"]["mean"],
        "e2e_s": report["e2e"]["mean"],
        "ttft_s": report["ttft"]["mean"],
        "tokens_per_s": report["output_tokens_per_s"],
        "link_bytes": counters["superinfer:link_bytes_total"] if tiers else None,
        "rotations": counters.get("superinfer:rotations_total", 0.0) if tiers else None,
        "completed": float(report["completed"]),
        "steps": counters["superinfer:engine_steps_total"],
        "preemptions": counters.get("superinfer:num_preemptions_total", 0.0),
        "ttft_p50_s": report["ttft"]["p50"],
        "ttft_p99_s": report["ttft"]["p99"],
    }


def compared(name: str, predicted: float | None, measured: float | None) -> dict[str, Any] | None:
    """One figure's error beside its bound; None where it was not measured or cannot be. A share of 0 has no error."""
    if predicted is None or measured is None:
        return None
    if name in SHARES:
        error: float | None = predicted - measured
    else:
        error = predicted / measured - 1.0 if measured else (0.0 if predicted == measured else None)
    bound = BOUNDS.get(name)
    found: dict[str, Any] = {"predicted": predicted, "measured": measured, "error": error}
    return found if bound is None else found | {"bound": bound, "within": error is not None and abs(error) <= bound}


def main() -> None:
    """Simulate, print beside the measured, write results/<name>.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="azure_conv_2023.csv")
    parser.add_argument("--measured", default="h200-vs-vllm-slo-before", help="a file of results/, without .json")
    parser.add_argument("--arms", default="ours-fcfs,ours-rota")
    parser.add_argument("--hardware", default="h200-pcie5")
    parser.add_argument("--name", default="sim-truth-h200", help="of the result")
    given = parser.parse_args()
    record = json.loads((RESULTS / f"{given.measured}.json").read_text())
    way_s = json.loads((RESULTS / "sim-calibration-h200.json").read_text())["way_s"]
    settings = record["settings"]
    sizes, slo = settings["sizes"], SLO(ttft=settings["slo"]["ttft"], tbt=settings["slo"]["tbt"])
    profile, shape = profile_of(given.hardware), shape_of("llama-3-8b")
    rows: list[dict[str, Any]] = []
    for arm in given.arms.split(","):
        measured_arm = record["arms"][arm]
        tokens = measured_arm["dram_bytes"] // (16 * shape.kv_bytes_per_token) * 16
        config = SimConfig(
            policy=POLICIES[arm],
            kv_tokens=measured_arm["pool_tokens"],
            dram_tokens=tokens,
            max_batch_size=sizes["max_seqs"],
            max_batch_tokens=sizes["batch_tokens"],
            max_model_len=sizes["max_model_len"],
            depth=2,
            way_s=way_s,
            give_up_s=settings["drain_s"],
        )
        for run in measured_arm["phases"]["slo"]["runs"]:
            jobs = make_jobs(
                "azure", rate=run["rate"], duration=run["duration_s"], seed=settings["seed"], trace=given.trace,
                slos=[(1.0, slo)],
            )  # fmt: skip
            jobs = [job for job in jobs if job.prompt_length + job.output_length <= sizes["max_model_len"]]
            _check_same(jobs, run)
            figures, _ = simulated(jobs, profile, shape, config)
            there = real(run)
            errors = {name: compared(name, figures[name], there[name]) for name in figures}
            rows.append({"arm": arm, "rate": run["rate"], "figures": errors})
            _show(arm, run["rate"], errors)
    judged = [f for row in rows for f in row["figures"].values() if f is not None and "bound" in f]
    print(f"{sum(f['within'] for f in judged)} of {len(judged)} figures within their bounds")
    out = write(
        given.name,
        f"python benchmarks/sim_truth.py {given.trace.name} --measured {given.measured} --arms {given.arms}",
        {
            "hardware": profile.name,
            "efficiency": profile.efficiency._asdict(),
            "way_s": way_s,
            "measured": f"{given.measured}.json",
            "measured_at": record["date"],
            "within": sum(f["within"] for f in judged),
            "judged": len(judged),
            "runs": rows,
        },
    )
    print(f"written to {out}")


def _check_same(jobs: list[Job], run: dict[str, Any]) -> None:
    """Raises RuntimeError unless these are the jobs that were measured."""
    samples = run["samples"]
    mine = sorted((round(job.at, 4), job.prompt_length) for job in jobs)
    theirs = sorted(zip(samples["due"], samples["prompt_tokens"], strict=True))
    if len(mine) != len(theirs) or any(
        abs(a[0] - b[0]) > 2e-4 or a[1] != b[1] for a, b in zip(mine, theirs, strict=True)
    ):
        raise RuntimeError(f"at {run['rate']}/s these are other jobs than were measured; is it the same trace?")


def _show(arm: str, rate: float, errors: dict[str, dict[str, Any] | None]) -> None:
    print(f"{arm} at {rate:g}/s")
    for name, found in errors.items():
        if found is None:
            continue
        error = "" if found["error"] is None else f"{found['error'] * 100:+7.1f} {'points' if name in SHARES else '%'}"
        verdict = "" if "bound" not in found else "  within" if found["within"] else f"  MISSED ({found['bound']:.0%})"
        print(
            f"  {name:13} predicted {found['predicted']:16,.4f}  measured {found['measured']:16,.4f} {error}{verdict}"
        )


if __name__ == "__main__":
    main()
