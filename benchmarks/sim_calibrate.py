"""Fits a hardware profile's efficiencies to what was measured on an H200 apart from the runs under overload.

python benchmarks/sim_calibrate.py azure_conv_2023.csv

Reads the steps of results/h200-online-steps.json, each with its rows and contexts, and of the arm `ours` of
h200-vs-vllm-ample.json what a step costs alone, TPOT at batch 1 and 32 and prefill; h200-{link,http-vs-client}.json.
Prints what runtime/sim/hardware.py has for `h200-pcie5` and how far off each measured figure is with it. The overload
runs (h200-vs-vllm-slo.json) are not read: sim_truth.py compares with them. A run of one's own on the very GPU is
better: sim_steps.py.

Steps are those of a loaded engine, since products bring the GPU to its power limit and what comes next runs at lower
clocks: 128 decodes take a sixth longer between steps with prefill chunks than among their own kind.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from record import RESULTS, write
from sim_steps import efficiency_of, fit, seed_of

from superinfer.runtime.scheduler.cost import StepLoad, StepRates
from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.sim.hardware import HardwareProfile, profile_of
from superinfer.runtime.sim.result import SimResult
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.sim.simulate import SimConfig, simulate
from superinfer.runtime.sim.workload import Job, make_jobs

SHAPE = shape_of("llama-3-8b")
H200 = profile_of("h200-pcie5")
ALONE = 512 + 160 // 2  # tokens a decode of the ample arm attends to: the prompt and half of the output
CONTEXT = 1100  # the same of a sequence that has come back from the second tier, whose context is not in the file
WARM_S = 1.0
ANCHORED = 20  # steps that a figure of the ample arm counts as: a median of hundreds
AMPLE = SimConfig(
    policy="fcfs", kv_tokens=384_000, max_batch_size=512, max_batch_tokens=8192, max_model_len=8192, depth=2
)


def result(name: str) -> dict[str, Any]:
    """A result's file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def online_steps() -> list[tuple[StepLoad, float]]:
    """Steps of gpu_online_steps.py and their seconds. A prompt's tokens are taken as its first; a chunk of one token is
    a sequence that came back, which the engine computes as a decode."""
    found = []
    for step in result("h200-online-steps")["steps"]:
        if step["at"] < WARM_S:
            continue
        chunks = [length for length in step["chunks"] if length > 1]
        back = len(step["chunks"]) - len(chunks)
        decodes = step["decodes"] + back
        pairs = sum(length * (length + 1) / 2 for length in chunks)
        load = StepLoad(decodes + sum(chunks), decodes, step["context"] + back * CONTEXT, pairs)
        found.append((load, step["device_ms"] / 1e3))
    return found


def anchors(ample: dict[str, Any]) -> dict[str, tuple[StepLoad, float]]:
    """What the ample arm tells of single steps: batches that hardly draw power, prompts in steps of 8,192 tokens."""
    found = {}
    for row in ample["tpot"]["tpot"]:
        if row["batch"] <= 32:
            load = StepLoad(row["batch"], row["batch"], row["batch"] * ALONE, 0.0)
            found[f"TPOT at batch {row['batch']}"] = load, row["streamed_ms"] / 1e3
    for row in ample["prefill"]["prefill"]:
        prompts = max(1, 8192 // row["tokens"])
        tokens = prompts * row["tokens"]
        load = StepLoad(tokens, 0, 0, tokens * (row["tokens"] + 1) / 2)
        found[f"prefill {row['prompts']} x {row['tokens']}"] = load, tokens / row["tokens_per_s"]
    return found


def online(profile: HardwareProfile, trace: Path, way_s: float) -> tuple[SimResult, float]:
    """The ample arm's 40 s at 20 requests/s, and its mean TTFT, s, as the client sees it."""
    jobs = make_jobs("azure", rate=20.0, duration=40.0, seed=0, trace=trace)
    jobs = [job for job in jobs if job.prompt_length + job.output_length <= 8192]
    ttfts: list[float] = []

    def ended(sequence: Sequence) -> None:
        assert sequence.timeline.first is not None
        ttfts.append(sequence.arrival + sequence.timeline.first + way_s - jobs[sequence.id].at)

    found = simulate(jobs, profile, SHAPE, msgspec.structs.replace(AMPLE, way_s=way_s), ended)
    return found, sum(ttfts) / len(ttfts)


def offline(profile: HardwareProfile) -> SimResult:
    """The ample arm's 1,024 requests at once."""
    lengths = np.random.default_rng(0).integers(100, 1025, (1024, 2)).tolist()
    jobs = [Job(0.0, prompt, output, (-1 - at,), prompt) for at, (prompt, output) in enumerate(lengths)]
    return simulate(jobs, profile, SHAPE, AMPLE)


def errors_of(rates: StepRates, steps: list[tuple[StepLoad, float]]) -> dict[str, dict[str, float]]:
    """By kind of step: how many, all that was said over all that they took, and the deviation of one."""
    found = {}
    for kind in ("decodes", "chunks", "long"):
        said, took = np.array([(rates.seconds(load), s) for load, s in steps if _kind(load, rates) == kind]).T
        ratio = float(said.sum() / took.sum())
        found[kind] = {"steps": len(took), "said_over_took": ratio, "spread": float(np.std(took / said))}
    return found


def _kind(load: StepLoad, rates: StepRates) -> str:
    if load.tokens == load.decodes:
        return "decodes"
    return "chunks" if load.tokens <= rates.captured else "long"


def main() -> None:
    """Fit, print, write results/sim-calibration-h200.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="azure_conv_2023.csv")
    trace = parser.parse_args().trace
    ample = result("h200-vs-vllm-ample")["arms"]["ours"]["phases"]
    there = ample["online"]["runs"][0]
    way_s = result("h200-http-vs-client")["batch_1"]["http"]["outside_engine_ms_p50"] / 2e3
    steps, known = online_steps(), anchors(ample)
    seed = seed_of(H200, SHAPE)
    factors = fit(seed, steps + [anchor for anchor in known.values() for _ in range(ANCHORED)])
    profile = H200._replace(efficiency=efficiency_of(H200, seed, factors))
    rates = StepRates.seed(profile, SHAPE)
    errors = errors_of(rates, steps)
    for kind, error in errors.items():
        ratio, spread = error["said_over_took"] - 1.0, error["spread"]
        print(f"{kind:8} {error['steps']:4} steps: all {ratio:+.1%}, one by one {spread:.1%}")
    run, ttft = online(profile, trace, way_s)
    whole = offline(profile)
    link = next(r for r in result("h200-link")["rows"] if r["block_bytes"] == 2 << 20 and r["method"] == "engine")
    checks = {name: (rates.seconds(load) * 1e3, seconds * 1e3) for name, (load, seconds) in known.items()} | {
        "online 20/s, TPOT ms": (run.tpot.mean * 1e3, there["report"]["tpot"]["mean"] * 1e3),
        "online 20/s, TTFT ms": (ttft * 1e3, there["report"]["ttft"]["mean"] * 1e3),
        "online 20/s, steps": (float(run.steps), there["counters"]["superinfer:engine_steps_total"]),
        "offline, s": (whole.duration, ample["offline"]["seconds"]),
    }
    for name, (simulated, real) in checks.items():
        print(f"{name:22} simulated {simulated:8.2f} measured {real:8.2f}  {simulated / real - 1:+.1%}")
    print(profile.efficiency, f"\nway_s={way_s}, link: {link}")
    out = write(
        "sim-calibration-h200",
        f"python benchmarks/sim_calibrate.py {trace.name}",
        {
            "hardware": H200.name,
            "model": SHAPE.name,
            "efficiency": profile.efficiency._asdict(),
            "way_s": way_s,
            "link": link,
            "steps": errors,
            "checks": {name: {"simulated": pair[0], "measured": pair[1]} for name, pair in checks.items()},
        },
    )
    print(f"written to {out}")


if __name__ == "__main__":
    main()
