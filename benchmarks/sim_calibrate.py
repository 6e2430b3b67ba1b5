"""Fits a hardware profile's efficiencies to what was measured on an H200 apart from the runs under overload.

python benchmarks/sim_calibrate.py azure_conv_2023.csv

Reads results/h200-{latency,decode-variants,profile,link,http-vs-client}.json and the arm `ours` of
h200-vs-vllm-ample-turns.json; prints what runtime/sim/hardware.py has for `h200-pcie5` and how far off each measured
figure is with it. The overload runs (h200-vs-vllm-slo-before.json) are not read: sim_truth.py compares with them.
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
WEIGHTS = 2.73 / 3.35  # the share that an H100 reaches in a weight-bound linear; the H200's own was not measured
CONTEXT = 592  # tokens: 512 of prompt and half of 160 of output
WINDOW = 521  # tokens of gpu_profile.py's and gpu_decode_variants.py's decodes
BOUND = 200  # tokens in a step from which arithmetic bounds the matmuls
AMPLE = SimConfig(
    policy="fcfs", kv_tokens=384_000, max_batch_size=512, max_batch_tokens=8192, max_model_len=8192, depth=2
)


class Point(NamedTuple):
    """A measured time, ms, and its load. kv: GB read. pairs: millions. steps; pieces, eager: of them, those with
    prefill chunks, of at most 1,024 tokens and of more."""

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


def decode(name: str, ms: float, batch: int, context: int) -> Point:
    """A step of decodes."""
    return Point(name, ms, batch, batch, batch * context * SHAPE.kv_bytes_per_token / 1e9, 0.0, 1, 0, 0)


def prefill(name: str, ms: float, prompts: int, length: int, steps: int) -> Point:
    """Prompts in steps of 8,192 tokens."""
    return Point(name, ms, prompts * length, 0, 0.0, prompts * length * (length + 1) / 2e6, steps, 0, steps)


def alone(ttft_ms: float, length: int, outside_ms: float) -> Point:
    """One prompt on an idle engine, without what its first token takes to the client."""
    return Point(f"TTFT {length}", ttft_ms - outside_ms, length, 0, 0.0, length * (length + 1) / 2e6, 1, 1, 0)


def points(ample: dict[str, Any]) -> list[Point]:
    """All measured step times."""
    latency, profiled, variants = result("h200-latency"), result("h200-profile"), result("h200-decode-variants")
    found = [decode(f"latency {r['batch']}", r["tpot_ms"], r["batch"], CONTEXT) for r in latency["tpot"]]
    found += [decode(f"ample {r['batch']}", r["streamed_ms"], r["batch"], CONTEXT) for r in ample["tpot"]["tpot"]]
    found += [decode(f"variants {b}", ms, int(b), WINDOW) for b, ms in variants["step_ms"]["both"].items()]
    for row in latency["prefill"] + ample["prefill"]["prefill"]:
        count, length = row["prompts"], row["tokens"]
        total = count * length
        found.append(
            prefill(f"prefill {count}x{length}", total / row["tokens_per_s"] * 1e3, count, length, -(-total // 8192))
        )
    http = result("h200-http-vs-client")
    direct, prompt = http["batch_1"]["direct"], int(http["settings"]["prompt"])
    outside_ms = direct["outside_engine_ms_p50"]
    found += [alone(r["ttft_ms"], r["prompt_tokens"], outside_ms) for r in latency["ttft"]]
    found.append(alone(direct["ttft_ms_p50"], prompt, outside_ms))
    found.append(prefill("profile 16x512", profiled["results"]["prefill 16 x 512"]["step_ms"], 16, 512, 1))
    return found


def kv_rate() -> float:
    """TB/s at which attention reads the KV cache within a step of 256 decodes, 17.5 GB: nearest to a full pool."""
    attention_ms = result("h200-profile")["results"]["decode 256"]["groups_ms"]["attention"]
    return decode("", 0.0, 256, WINDOW).kv / float(attention_ms)


def fit(measured: list[Point], eager_s: float) -> tuple[Efficiency, np.ndarray]:
    """Least squares of relative errors, with `eager_s` given. Also each point's relative error."""
    rows = np.array([point[1:] for point in measured], dtype=float)
    ms, tokens, decodes, kv, pairs, steps, pieces, eager = rows.T
    weights_ms = SHAPE.read_bytes() / (H200.memory_rate * WEIGHTS) * 1e3
    by_arithmetic = tokens / steps > BOUND
    known = np.where(by_arithmetic, 0.0, weights_ms * steps) + kv / kv_rate() + eager * eager_s * 1e3
    terms = np.column_stack([np.where(by_arithmetic, tokens, 0.0), pairs, decodes, steps, pieces])
    (token, pair, each, step, piece), *_ = np.linalg.lstsq(terms / ms[:, None], (ms - known) / ms, rcond=None)
    errors = (terms @ np.array([token, pair, each, step, piece]) + known) / ms - 1.0
    return (
        Efficiency(
            weights=WEIGHTS,
            kv=kv_rate() * 1e12 / H200.memory_rate,
            matmul=float(SHAPE.flops_per_token / (token * 1e-3) / H200.flops),
            attention=float(SHAPE.flops_per_pair / (pair * 1e-9) / H200.flops),
            step_s=float(step * 1e-3),
            decode_s=float(each * 1e-3),
            pieces_s=float(piece * 1e-3),
            eager_s=eager_s,
        ),
        errors,
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
    ample = result("h200-vs-vllm-ample-turns")["arms"]["ours"]["phases"]
    measured = points(ample)
    there = ample["online"]["runs"][0]["report"]
    way_s = result("h200-http-vs-client")["batch_1"]["http"]["outside_engine_ms_p50"] / 2e3
    low, high = 0.0, 0.016  # seconds: mean TPOT grows with it
    for _ in range(7):
        middle = (low + high) / 2
        efficiency, errors = fit(measured, middle)
        run, ttft = online(H200._replace(efficiency=efficiency), trace, way_s)
        print(f"eager_s {middle * 1e3:.2f} ms: TPOT {run.tpot.mean * 1e3:.2f} ms, {run.steps} steps", flush=True)
        low, high = (middle, high) if run.tpot.mean < there["tpot"]["mean"] else (low, middle)
    for point, error in zip(measured, errors, strict=True):
        print(f"{point.name:18} {point.ms:9.2f} ms  {error:+.1%}")
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
