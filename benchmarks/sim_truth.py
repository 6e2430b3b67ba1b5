"""The simulator held against an H200: the very jobs of the overload runs, simulated, beside what was measured.

python benchmarks/sim_truth.py azure_conv_2023.csv [--measured h200-vs-vllm-slo] [--arms ours-fcfs,ours-rota]

The measured runs are this engine behind its HTTP server (benchmarks/peer/run.py slo, or truth), one rate after another
on one server, after a run `online` where there was one; so are the simulated ones, and what an engine has learnt in one
it knows in the next. Nothing in the profile was fitted to them: sim_calibrate.py says what it was fitted to. --steps:
what sim_steps.py fits to the steps of another run on the very GPUs, which its file has; the scheduler starts from the
profile all the same, as it does in service. Times are the client's: from when a request was due. A prediction is the
mean of --seeds runs, whose step times are drawn anew.

GPUs of one kind differ by more than the bounds. --paced: all step times are scaled by one factor for each GPU, with
which the mean TPOT of another run on it, `online` of the same record, comes out as measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from record import RESULTS, write
from sim_steps import LEAST_OF_A_KIND, fitted

from superinfer.runtime.scheduler.cost import StepLoad
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.sim.executor import NO_QUIRKS, Quirks
from superinfer.runtime.sim.hardware import HardwareProfile, profile_of
from superinfer.runtime.sim.result import Passed
from superinfer.runtime.sim.shapes import ModelShape, shape_of
from superinfer.runtime.sim.simulate import HostTimes, SimConfig, simulate
from superinfer.runtime.sim.workload import Job, make_jobs
from superinfer.runtime.slo import SLO

SHAPE = shape_of("llama-3-8b")
PLAN_S = 4e-4  # results/scheduler-speed.json: rota, 256 decoding
SPREAD = 0.05  # of steps around their fit: 4 % of decodes, 5 % of others (results/sim-calibration-h200.json)
PACES = 0.8, 1.25  # among which a GPU's is looked for
APART_S = 1.0  # from what was given up to the next rate
POLICIES = {"ours": "fcfs", "ours-fcfs": "fcfs", "ours-rota": "rota", "ours-edf": "edf"}
APART = 10**6  # ids of prompts' blocks between one run and the next; those of jobs count down from -1
HALF = "-half"  # of an arm's name: the same policy with half of the pool
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
    """The figures of BOUNDS, by the definitions of superinfer/bench/load_report.py, of an engine that has just started.
    Also each request."""
    ((figures, found),) = session([jobs], profile, shape, config)
    return figures, found


def session(
    runs: list[list[Job]],
    profile: HardwareProfile,
    shape: ModelShape,
    config: SimConfig,
    believed: HardwareProfile | None = None,
) -> list[tuple[dict[str, float | None], list[Asked]]]:
    """The same of several runs on one engine, one after another: what is left `give_up_s` after the last request of one
    is given up."""
    found: dict[int, Asked] = {}
    way_s, give_up_s = config.way_s or 0.0, config.give_up_s
    begins, leave_at, jobs = [0.0], [], []
    for number, run in enumerate(runs):
        jobs += [_moved(job, begins[-1], number) for job in run]
        leave_at.append(jobs[-1].at + (give_up_s or 0.0))
        begins.append(leave_at[-1] + APART_S)
    config = msgspec.structs.replace(config, leave_at=tuple(leave_at[:-1]))

    def ended(sequence: Sequence) -> None:
        found[sequence.id] = asked(sequence, jobs[sequence.id], way_s)

    whole = simulate(jobs, profile, shape, config, ended, believed)
    moved = whole.moved
    rotations, moved_bytes = (
        (moved.rotations_in + moved.rotations_out, moved.bytes_in + moved.bytes_out) if moved else (0, 0)
    )
    passed = [Passed(0, 0, 0, 0), *whole.passed, Passed(whole.steps, whole.preemptions, rotations, moved_bytes)]
    figures, first = [], 0
    for number, run in enumerate(runs):
        ids = range(first, first + len(run))
        one = figures_of([(jobs[id], found[id]) for id in ids if id in found])
        before, after = passed[number], passed[number + 1]
        one |= {
            "steps": float(after.steps - before.steps),
            "preemptions": float(after.preemptions - before.preemptions),
        }
        if moved:
            one["link_bytes"] = float(after.moved_bytes - before.moved_bytes)
            one["rotations"] = float(after.rotations - before.rotations)
        figures.append((one, [found[id] for id in ids if id in found]))
        first += len(run)
    return figures


def _moved(job: Job, begin: float, number: int) -> Job:
    """Later, and with a prompt that no other run has."""
    return job._replace(at=job.at + begin, blocks=tuple(block - number * APART for block in job.blocks))


def figures_of(run: list[tuple[Job, Asked]]) -> dict[str, float | None]:
    """Those of one run that its requests tell."""
    every = [one for _, one in run]
    done = [one for one in every if one.completed]
    seen = [(job.at + one.last, one) for job, one in run if one.last is not None]
    first = [o.first for o in done if o.first is not None]
    duration = max(at for at, _ in seen) - min(job.at for job, _ in run)
    return {
        "ttft_met": mean([one.ttft_met for one in every]),
        "met": mean([one.met for one in every]),
        "tpot_s": mean([(o.last - o.first) / (o.tokens - 1) for o in done if o.tokens > 1 and o.first and o.last]),
        "e2e_s": mean([one.last for one in done if one.last is not None]),
        "ttft_s": mean(first),
        "tokens_per_s": sum(one.tokens for _, one in seen) / duration,
        "link_bytes": None,
        "rotations": None,
        "completed": float(len(done)),
        "steps": None,
        "preemptions": None,
        "ttft_p50_s": _quantile(first, 0.5),
        "ttft_p99_s": _quantile(first, 0.99),
    }


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


def compared(name: str, drawn: list[float | None], measured: float | None) -> dict[str, Any] | None:
    """One figure's error beside its bound, of the mean of what was simulated; None where it was not measured or cannot
    be. A share of 0 has no error."""
    values = [value for value in drawn if value is not None]
    predicted = mean(values)
    if predicted is None or measured is None:
        return None
    if name in SHARES:
        error: float | None = predicted - measured
    else:
        error = predicted / measured - 1.0 if measured else (0.0 if predicted == measured else None)
    bound = BOUNDS.get(name)
    found: dict[str, Any] = {"predicted": predicted, "least": min(values), "most": max(values), "measured": measured}
    found["error"] = error
    return found if bound is None else found | {"bound": bound, "within": error is not None and abs(error) <= bound}


class Machine(NamedTuple):
    """What is simulated of a GPU and its host. spread: of its steps' times around what the profile and quirks say.
    pace: times which they take that."""

    profile: HardwareProfile
    host: HostTimes
    spread: float
    quirks: Quirks = NO_QUIRKS
    pace: float = 1.0


def host_of(calibration: dict[str, Any] | None) -> HostTimes:
    """What steps cost the host: as h200-mixed-steps and h200-host-time have it, or a calibration's trace."""
    alone = _host_alone()
    if calibration is None:
        return alone
    run = calibration["runs"][0]
    decodes, chunks, longer = run["decodes"], run["chunks"], run.get("long", {"steps": 0})
    eager_s = alone.eager_s
    if longer["steps"] >= LEAST_OF_A_KIND:
        eager_s = max(0.0, longer["submit_s"]["p50"] - chunks["submit_s"]["p50"])
    return HostTimes(
        plan_s=decodes["plan_s"]["p50"],
        plan_chunks_s=max(0.0, chunks["plan_s"]["p50"] - decodes["plan_s"]["p50"]),
        decodes_s=decodes["submit_s"]["p50"],
        chunks_s=chunks["submit_s"]["p50"],
        eager_s=eager_s,
        commit_s=decodes["commit_s"]["p50"],
        in_steps=True,
    )


def _host_alone() -> HostTimes:
    steps = json.loads((RESULTS / "h200-mixed-steps.json").read_text())["results"]
    host = json.loads((RESULTS / "h200-host-time.json").read_text())["results"]
    commit_ms = next(row for row in host if row["batch"] == 128 and row["temperature"] == 0.0)["median_ms"]["commit"]
    decodes, chunks, longer = (steps[name]["host_ms"]["submit"] for name in ("128 decodes", "128 + 1200", "128 + 4000"))
    return HostTimes(
        plan_s=PLAN_S, decodes_s=decodes / 1e3, chunks_s=chunks / 1e3, eager_s=(longer - chunks) / 1e3,
        commit_s=commit_ms / 1e3,
    )  # fmt: skip


def machine_of(hardware: str, steps: str, arm: str) -> Machine:
    """The profile, or what was fitted to the calibration of the arm's GPU."""
    profile = profile_of(hardware)
    if not steps:
        return Machine(profile, host_of(None), SPREAD)
    found = json.loads((RESULTS / f"{steps}.json").read_text())["arms"][arm.removesuffix(HALF)]
    observed = [(StepLoad(*load), took_ms / 1e3) for *load, took_ms in found["steps"]]
    known = fitted(profile, SHAPE, observed)
    return Machine(profile._replace(efficiency=known.efficiency), host_of(found), known.spread, known.quirks)


def config_of(arm: dict[str, Any], settings: dict[str, Any], machine: Machine, late: bool, way_s: float) -> SimConfig:
    """The engine of a measured arm on a machine. late: it plans steps late."""
    sizes = settings["sizes"]
    return SimConfig(
        policy=POLICIES[arm["arm"].removesuffix(HALF)],
        kv_tokens=arm["pool_tokens"],
        dram_tokens=arm["dram_bytes"] // (16 * SHAPE.kv_bytes_per_token) * 16,
        max_batch_size=sizes["max_seqs"],
        max_batch_tokens=sizes["batch_tokens"],
        max_model_len=sizes["max_model_len"],
        depth=2,
        plan_late=late,
        host=machine.host,
        spread=machine.spread,
        quirks=machine.quirks,
        paces=((0.0, machine.pace),),
        way_s=way_s,
        give_up_s=settings["drain_s"],
    )


def paced(
    machine: Machine, record: dict[str, Any], arm: str, trace: Path, late: bool, way_s: float
) -> tuple[Machine, str]:
    """With the pace of the arm's GPU, and by which arm's `online` run it was found. Raises RuntimeError without one."""
    gpu = record["arms"][arm]["gpu"]
    found = (record["arms"].get(name) for name in (arm, arm.removesuffix(HALF), "ours"))
    known = next(
        (one for one in found if one and one["gpu"] == gpu and "runs" in one["phases"].get("online", {})), None
    )
    if known is None:
        raise RuntimeError(f"no run `online` on GPU {gpu} of {arm}, by which it could be paced")
    run, believed = known["phases"]["online"]["runs"][0], machine.profile
    jobs, wanted = _jobs(run, record["settings"], trace), run["report"]["tpot"]["mean"]
    least, most = PACES
    for _ in range(8):
        tried = machine._replace(pace=(least + most) / 2)
        config = config_of(known, record["settings"], tried, late, way_s)
        ((figures, _),) = session([jobs], machine.profile, SHAPE, config, believed)
        assert figures["tpot_s"] is not None
        least, most = (tried.pace, most) if figures["tpot_s"] < wanted else (least, tried.pace)
    return machine._replace(pace=(least + most) / 2), known["arm"]


def parser_of_options() -> argparse.ArgumentParser:
    """Those of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="azure_conv_2023.csv")
    parser.add_argument("--measured", default="h200-vs-vllm-slo", help="a file of results/ without .json, or a path")
    parser.add_argument("--arms", default="ours-fcfs,ours-rota")
    parser.add_argument("--hardware", default="h200-pcie5")
    parser.add_argument("--steps", default="", help="of sim_steps.py, a file of results/ without .json")
    parser.add_argument("--paced", action="store_true", help="scale step times by another run on the same GPU")
    parser.add_argument("--at-once", action="store_true", help="the measured engine planned each step at once")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--name", default="sim-truth-h200", help="of the result")
    return parser


def main() -> None:
    """Simulate, print beside the measured, write results/<name>.json."""
    given = parser_of_options().parse_args()
    measured = Path(given.measured) if given.measured.endswith(".json") else RESULTS / f"{given.measured}.json"
    record = json.loads(measured.read_text())
    way_s = json.loads((RESULTS / "sim-calibration-h200.json").read_text())["way_s"]
    settings, believed, late = record["settings"], profile_of(given.hardware), not given.at_once
    rows: list[dict[str, Any]] = []
    machines: dict[str, Any] = {}
    for arm in given.arms.split(","):
        measured_arm = record["arms"][arm]
        machine = machine_of(given.hardware, given.steps, arm)
        by = ""
        if given.paced:
            machine, by = paced(machine, record, arm, given.trace, late, way_s)
            print(f"{arm}: steps take {machine.pace:.3f} times what the profile says, by `online` of {by}", flush=True)
        machines[arm] = {
            "efficiency": machine.profile.efficiency._asdict(),
            "host": msgspec.to_builtins(machine.host),
            "spread": machine.spread,
            "quirks": machine.quirks._asdict(),
            "pace": machine.pace,
            "paced_by": by,
        }
        config = config_of(measured_arm, settings, machine, late, way_s)
        runs, before = measured_arm["phases"]["slo"]["runs"], _before(measured_arm)
        jobs = [_jobs(run, settings, given.trace) for run in [*before, *runs]]
        seeds = [
            session(jobs, machine.profile, SHAPE, msgspec.structs.replace(config, spread_seed=seed), believed)
            for seed in range(given.seeds)
        ]
        for number, run in enumerate(runs):
            there, drawn = real(run), [seed[len(before) + number][0] for seed in seeds]
            errors = {name: compared(name, [figures[name] for figures in drawn], there[name]) for name in there}
            pool = measured_arm["pool_tokens"]
            rows.append({"arm": arm, "pool_tokens": pool, "rate": run["rate"], "figures": errors})
            _show(arm, run["rate"], errors)
    judged = [f for row in rows for f in row["figures"].values() if f is not None and "bound" in f]
    print(f"{sum(f['within'] for f in judged)} of {len(judged)} figures within their bounds")
    options = " --paced" * given.paced + f" --steps {given.steps}" * bool(given.steps) + " --at-once" * given.at_once
    out = write(
        given.name,
        f"python benchmarks/sim_truth.py {given.trace.name} --measured {measured.name} --arms {given.arms}"
        f"{options} --seeds {given.seeds}",
        {
            "hardware": given.hardware,
            "machines": machines,
            "way_s": way_s,
            "measured": measured.name,
            "measured_at": record["date"],
            "measured_commit": record["commit"],
            "within": sum(f["within"] for f in judged),
            "judged": len(judged),
            "runs": rows,
        },
    )
    print(f"written to {out}")


def _before(arm: dict[str, Any]) -> list[dict[str, Any]]:
    """Runs at other rates that its server had behind it when it came to those: what it had learnt then, it knew."""
    names = list(arm["phases"])
    return arm["phases"]["online"]["runs"] if "online" in names[: names.index("slo")] else []


def _jobs(run: dict[str, Any], settings: dict[str, Any], trace: Path) -> list[Job]:
    """Those that were measured. Raises RuntimeError where they are others."""
    slo = SLO(ttft=settings["slo"]["ttft"], tbt=settings["slo"]["tbt"])
    jobs = make_jobs(
        "azure", rate=run["rate"], duration=run["duration_s"], seed=settings["seed"], trace=trace, slos=[(1.0, slo)]
    )
    longest = settings["sizes"]["max_model_len"]
    jobs = [job for job in jobs if job.prompt_length + job.output_length <= longest]
    _check_same(jobs, run)
    return jobs


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
        told = f"{found['predicted']:16,.4f} ({found['least']:,.4f} to {found['most']:,.4f})"
        print(f"  {name:13} predicted {told:60} measured {found['measured']:16,.4f} {error}{verdict}")


if __name__ == "__main__":
    main()
