"""The paper's grid on a simulated GH200 (144 GB HBM, 400 GiB of DRAM): three models, two workloads and a real trace.

SuperInfer (MLSys 2026, arXiv 2601.20309) ran these models, workloads and rates; its engine was slower than the
simulated one, which keeps up at most of the rates. So the grid goes on beyond them until first come first served fails.
With --azure FILE also lengths of the Azure 2023 conversation trace (CC-BY; Patel et al., Splitwise, ISCA 2024).
KV pools are what the paper's vLLM 0.6.6 would have at its default of 256 sequences, unless --batch says otherwise.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from record import RESULTS, write
from sim_rows import commit, draw, kept_rows

from superinfer.runtime.sim.hardware import profile_of
from superinfer.runtime.sim.report import check_can_plot
from superinfer.runtime.sim.result import SimResult
from superinfer.runtime.sim.shapes import shape_of
from superinfer.runtime.sim.simulate import SimConfig, simulate
from superinfer.runtime.sim.workload import make_jobs
from superinfer.runtime.slo import SLO

STREAM = SLO(ttft=1.0, tbt=0.1)
DRAM_BYTES = 400 * 2**30
# Requests/s: the paper's range, then beyond it.
GRID = {
    ("llama-3-8b", "sharegpt"): (35, 50, 60, 70, 80),
    ("llama-3-8b", "lmsys"): (50, 75, 100, 120, 140),
    ("qwen2.5-32b", "sharegpt"): (5, 12, 20, 25, 30),
    ("qwen2.5-32b", "lmsys"): (10, 25, 40, 50),
    ("mixtral-8x7b", "sharegpt"): (5, 12, 20, 35, 45),
    ("mixtral-8x7b", "lmsys"): (10, 25, 40, 60, 75),
    ("llama-3-8b", "azure"): (20, 30, 35, 40),
    ("qwen2.5-32b", "azure"): (5, 8, 10, 12),
    ("mixtral-8x7b", "azure"): (5, 10, 15, 20),
}
POLICIES = ("fcfs", "lvf-time", "rota")
KEY = ("model", "workload", "rate", "policy")


def main() -> None:
    """Simulate, print, write results/sim-gh200.json and pictures beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--duration", type=float, default=120.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="MODEL/WORKLOAD/RATE,RATE", help="cells of the grid, rather than all"
    )
    parser.add_argument("--azure", type=Path, help="azure_conv_2023.csv")
    parser.add_argument("--batch", type=int, default=1024, help="sequences in one step")
    parser.add_argument("--policies", default=",".join(POLICIES))
    parser.add_argument("--keep", action="store_true", help="keep the file's rows of other cells and policies")
    arguments = parser.parse_args()
    check_can_plot(RESULTS)
    profile = profile_of("gh200-144")
    cells = [cell for cell in _cells(arguments.only) if cell[1] != "azure" or arguments.azure]
    policies = arguments.policies.split(",")
    rows = kept_rows("sim-gh200", KEY, set()) if arguments.keep else []
    for model, workload, rates in cells:
        shape = shape_of(model)
        for rate in rates:
            jobs = make_jobs(
                workload, rate=rate, duration=arguments.duration, seed=arguments.seed, slos=[(1.0, STREAM)],
                trace=arguments.azure if workload == "azure" else None,
            )  # fmt: skip
            for policy in policies:
                config = SimConfig(
                    policy=policy,
                    dram_tokens=int(DRAM_BYTES / shape.kv_bytes_per_token),
                    max_batch_size=arguments.batch,
                )
                result = simulate(jobs, profile, shape, config)
                cell = {"model": model, "workload": workload, "rate": rate, "policy": policy, "commit": commit()}
                rows = [row for row in rows if any(row[name] != cell[name] for name in KEY)] + [cell | _columns(result)]
                print(_line(rows[-1]), flush=True)
            _write(arguments, profile.name, rows)  # what there is so far: the whole grid takes hours
        mine = [row for row in rows if (row["model"], row["workload"]) == (model, workload)]
        draw(mine, f"sim-gh200-{model}-{workload}")


def _cells(only: list[str]) -> list[tuple[str, str, tuple[float, ...]]]:
    if not only:
        return [(model, workload, rates) for (model, workload), rates in GRID.items()]
    parts = [text.split("/") for text in only]
    return [(model, workload, tuple(map(float, rates.split(",")))) for model, workload, rates in parts]


def _write(arguments: argparse.Namespace, hardware: str, rows: list[dict[str, Any]]) -> None:
    rows.sort(key=lambda row: (row["model"], row["workload"], row["rate"], POLICIES.index(row["policy"])))
    only = f" --only {' '.join(arguments.only)}" if arguments.only else ""
    only += f" --policies {arguments.policies}" if arguments.policies != ",".join(POLICIES) else ""
    trace = " --azure azure_conv_2023.csv" if arguments.azure else ""
    command = f"python benchmarks/sim_gh200.py --duration {arguments.duration:g} --seed {arguments.seed} "
    out = write(
        "sim-gh200",
        f"{command}--batch {arguments.batch}{trace}{only}{' --keep' if arguments.keep else ''}",
        {
            "simulated": True, "hardware": hardware, "duration_s": arguments.duration, "dram_bytes": DRAM_BYTES,
            "slo": {"ttft": STREAM.ttft, "tbt": STREAM.tbt}, "gains": _gains(rows), "runs": rows,
        },
    )  # fmt: skip
    print(f"written to {out}", flush=True)


def _columns(result: SimResult) -> dict[str, float]:
    moved = result.moved
    assert moved is not None
    return {
        "ttft_met": result.ttft_met or 0.0,
        "met": result.met or 0.0,
        "goodput": result.goodput,
        "tokens_per_s": result.tokens_per_s,
        "tbt_p50_ms": result.tbt.p50 * 1e3,
        "tbt_p99_ms": result.tbt.p99 * 1e3,
        "tpot_ms": result.tpot.mean * 1e3,
        "rotations": moved.rotations_out,
        "gbps_in": moved.gbps_in,
        "gbps_out": moved.gbps_out,
        "stall_share": moved.stall_share,
    }


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['model']:13} {row['workload']:8} {row['rate']:4g}/s {row['policy']:9} TTFT {row['ttft_met']:6.1%}  "
        f"all {row['met']:6.1%}  {row['tokens_per_s']:6,.0f} tok/s  TBT p50 {row['tbt_p50_ms']:.0f} p99 "
        f"{row['tbt_p99_ms']:.0f} ms  {row['rotations']:,} rotations"
    )


def _gains(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of rota and lvf-time over fcfs, in points of TTFT attainment; and the worst ratios where fcfs keeps its TBT."""
    cells: dict[tuple[str, str, float], dict[str, dict[str, Any]]] = {}
    for row in rows:
        cells.setdefault((row["model"], row["workload"], row["rate"]), {})[row["policy"]] = row
    gains = {
        policy: [100 * (cell[policy]["ttft_met"] - cell["fcfs"]["ttft_met"]) for cell in cells.values()]
        for policy in ("rota", "lvf-time")
    }
    kept = [cell for cell in cells.values() if cell["fcfs"]["tbt_p99_ms"] <= 100]
    return {
        "best_points": {policy: max(values) for policy, values in gains.items()},
        "mean_points": {policy: statistics.mean(values) for policy, values in gains.items()},
        "worst_tbt_p99_ratio": max((c["rota"]["tbt_p99_ms"] / c["fcfs"]["tbt_p99_ms"] for c in kept), default=None),
        "worst_throughput_ratio": min(
            (c["rota"]["tokens_per_s"] / c["fcfs"]["tokens_per_s"] for c in kept), default=None
        ),
        "cells_where_fcfs_keeps_tbt": len(kept),
    }


if __name__ == "__main__":
    main()
