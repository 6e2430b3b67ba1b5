"""Fits a hardware profile's efficiencies to what was measured on an H200 apart from the runs under overload.

python benchmarks/sim_calibrate.py azure_conv_2023.csv

Reads results/h200-{mixed-steps,link,http-vs-client}.json and the arm `ours` of h200-vs-vllm-ample-before.json; prints
what runtime/sim/hardware.py has for `h200-pcie5` and how far off each measured figure is with it. The overload runs
(h200-vs-vllm-slo.json) are not read: sim_truth.py compares with them.

A step of decodes takes up to a sixth longer between steps with prefill chunks than among its own kind (128 of them 11.4
ms against 10.0): products bring the GPU to its power limit, and its clocks stay low for a while. Under load steps are
mixed, so it is steps in turn that are fitted to, and single streams, which draw little.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from record import RESULTS, write

from superinfer.runtime.scheduler.sequence import Sequence
from superinfer.runtime.sim.hardware import Efficiency, HardwareProfile, profile_of
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.sim.simulate import SimConfig, SimResult, simulate
from superinfer.runtime.sim.workload import Job, make_jobs

SHAPE = shape_of("llama-3-8b")
H200 = profile_of("h200-pcie5")
ALONE = 512 + 160 // 2  # tokens a decode of the ample arm attends to: the prompt and half of the output
BESIDE = 1100  # the same of gpu_mixed_steps.py
CAPTURED = 2048  # tokens of the largest step with chunks that is one graph: engine/cuda_mixed.py
BOUND = 200  # tokens in a step from which arithmetic bounds the matmuls
PAIR = "128, 128 + {}"  # decodes, and decodes beside a chunk, in turn
AMPLE = SimConfig(
    policy="fcfs", kv_tokens=384_000, max_batch_size=512, max_batch_tokens=8192, max_model_len=8192, depth=2
)


class Point(NamedTuple):
    """A measured time, ms, and its load. kv: GB read. pairs: millions. steps; pieces, eager: of them, those with
    prefill chunks, of at most CAPTURED tokens and of more."""

    name: str
    ms: float
    tokens: int
    decodes: int
    kv: float
    pairs: float
    steps: int
    pieces: int
    eager: int


def result(name: str) -> dict[str, Any]:
    """A result's file."""
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text())
    return found


def step(name: str, ms: float, decodes: int, context: int, chunk: int = 0) -> Point:
    """A step of decodes and of one prompt's first tokens."""
    tokens = decodes + chunk
    kv = decodes * context * SHAPE.kv_bytes_per_token / 1e9
    pieces, eager = int(chunk > 0 and tokens <= CAPTURED), int(chunk > 0 and tokens > CAPTURED)
    return Point(name, ms, tokens, decodes, kv, chunk * (chunk + 1) / 2e6, 1, pieces, eager)


def prefill(prompts: int, length: int, tokens_per_s: float) -> Point:
    """Prompts in steps of 8,192 tokens."""
    total = prompts * length
    steps = -(-total // 8192)
    pairs = total * (length + 1) / 2e6
    return Point(f"prefill {prompts} x {length}", total / tokens_per_s * 1e3, total, 0, 0.0, pairs, steps, 0, steps)


def mixed(found: dict[str, Any]) -> list[Point]:
    """Steps in turn, and chunks alone, of gpu_mixed_steps.py. Beyond 1,024 rows the graphs that it ran padded to other
    sizes than today's: there its figures without graphs are taken, which pad nothing."""
    points = []
    for chunk in (256, 1200, 2000, 4000):
        for decodes in (128, 0):
            name = PAIR.format(chunk) if decodes else f"0 + {chunk}"
            row = found[name]
            (*before, ms) = row["step_ms"]
            if decodes + chunk > 1024:
                ms = row["eager"]["step_ms"][-1]
            points += [step(f"{name}: decodes", first, decodes, BESIDE) for first in before]
            points.append(step(f"{name}: chunk", ms, decodes, BESIDE, chunk))
    return points


def points(ample: dict[str, Any]) -> list[Point]:
    """All measured step times that are fitted to."""
    few = [row for row in ample["tpot"]["tpot"] if row["batch"] <= 32]
    found = [step(f"ample {row['batch']}", row["streamed_ms"], row["batch"], ALONE) for row in few]
    found += [prefill(row["prompts"], row["tokens"], row["tokens_per_s"]) for row in ample["prefill"]["prefill"]]
    return found + mixed(result("h200-mixed-steps")["results"])


def kv_rate() -> float:
    """TB/s at which attention of decodes reads the KV cache in steps in turn with a chunk of 1,200 tokens."""
    kernels = result("h200-mixed-steps")["results"][PAIR.format(1200)]["device"]["kernel_ms"]
    return step("", 0.0, 128, BESIDE).kv / float(kernels["32 x decode_attention"])


def fit(measured: list[Point]) -> tuple[Efficiency, np.ndarray]:
    """Least squares of relative errors, with no time below 0. Also each point's relative error."""
    ms, tokens, decodes, kv, pairs, steps, pieces, eager = np.array([point[1:] for point in measured], dtype=float).T
    by_arithmetic = tokens / steps > BOUND
    known = kv / kv_rate()
    by = np.where(by_arithmetic, 0.0, steps), np.where(by_arithmetic, tokens, 0.0)
    terms = np.column_stack([*by, pairs, decodes, steps, pieces, eager])
    free = np.ones(terms.shape[1], dtype=bool)
    times = np.zeros(terms.shape[1])
    while True:
        times[free] = np.linalg.lstsq(terms[:, free] / ms[:, None], (ms - known) / ms, rcond=None)[0]
        if (times >= 0.0).all():
            break
        free &= times > 0.0
        times[:] = 0.0
    weights, token, pair, each, fixed, early, late = times.tolist()
    return (
        Efficiency(
            weights=SHAPE.read_bytes() / (weights * 1e-3) / H200.memory_rate,
            kv=kv_rate() * 1e12 / H200.memory_rate,
            matmul=SHAPE.flops_per_token / (token * 1e-3) / H200.flops,
            attention=SHAPE.flops_per_pair / (pair * 1e-9) / H200.flops,
            step_s=fixed * 1e-3,
            decode_s=each * 1e-3,
            pieces_s=early * 1e-3,
            eager_s=late * 1e-3,
            captured=CAPTURED,
        ),
        (terms @ times + known) / ms - 1.0,
    )


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


def main() -> None:
    """Fit, print, write results/sim-calibration-h200.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, help="azure_conv_2023.csv")
    trace = parser.parse_args().trace
    ample = result("h200-vs-vllm-ample-before")["arms"]["ours"]["phases"]
    measured = points(ample)
    there = ample["online"]["runs"][0]["report"]
    way_s = result("h200-http-vs-client")["batch_1"]["http"]["outside_engine_ms_p50"] / 2e3
    efficiency, errors = fit(measured)
    low, high = efficiency.pieces_s, 0.010  # mean TPOT grows with it
    for _ in range(7):
        efficiency = efficiency._replace(pieces_s=(low + high) / 2)
        run, ttft = online(H200._replace(efficiency=efficiency), trace, way_s)
        print(
            f"pieces_s {efficiency.pieces_s * 1e3:.2f} ms: TPOT {run.tpot.mean * 1e3:.2f} ms, {run.steps} steps",
            flush=True,
        )
        if run.tpot.mean < there["tpot"]["mean"]:
            low = efficiency.pieces_s
        else:
            high = efficiency.pieces_s
    for point, error in zip(measured, errors, strict=True):
        print(f"{point.name:26} {point.ms:9.2f} ms  {error:+.1%}")
    whole = offline(H200._replace(efficiency=efficiency))
    link = next(r for r in result("h200-link")["rows"] if r["block_bytes"] == 2 << 20 and r["method"] == "engine")
    checks = {
        "online 20/s, TPOT ms": (run.tpot.mean * 1e3, there["tpot"]["mean"] * 1e3),
        "online 20/s, TTFT ms": (ttft * 1e3, there["ttft"]["mean"] * 1e3),
        "online 20/s, steps": (
            float(run.steps),
            ample["online"]["runs"][0]["counters"]["superinfer:engine_steps_total"],
        ),
        "offline, s": (whole.duration, ample["offline"]["seconds"]),
    }
    for name, (simulated, real) in checks.items():
        print(f"{name:22} simulated {simulated:8.2f} measured {real:8.2f}  {simulated / real - 1:+.1%}")
    print(efficiency, f"\nway_s={way_s}, link: {link}")
    out = write(
        "sim-calibration-h200",
        f"python benchmarks/sim_calibrate.py {trace.name}",
        {
            "hardware": H200.name,
            "model": SHAPE.name,
            "efficiency": efficiency._asdict(),
            "way_s": way_s,
            "link": link,
            "points": [{**p._asdict(), "error": float(e)} for p, e in zip(measured, errors, strict=True)],
            "checks": {name: {"simulated": pair[0], "measured": pair[1]} for name, pair in checks.items()},
        },
    )
    print(f"written to {out}")


if __name__ == "__main__":
    main()
