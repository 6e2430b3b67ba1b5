"""Everything that only a GPU can show, in one command: tests, the link, what rotation costs, where a step's time goes.

python benchmarks/gpu_session.py [--only tests link host variants skinny kernels products moe ...] [--out FOLDER]

Each part has a time limit and is a process of its own, so that one that fails or hangs costs only itself. Results are
benchmarks/results/<gpu>-*.json; with --out they and all output are copied there too. A short table comes last. Needs no
network. Exit status 1 if a part failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NEEDED = (
    "torch",
    "triton",
    "transformers",
    "msgspec",
    "zmq",
    "typer",
    "rich",
    "fastapi",
    "uvicorn",
    "jinja2",
    "pytest",
)
TESTS_TOO = ("hypothesis", "pytest_timeout")
FASTER = ("flashinfer", "pynvml")


@dataclass(frozen=True)
class Part:
    """name: for --only. limit_s: after which it is killed. result: of the JSON file, "" for none. row: its line of the
    last table, from that file."""

    name: str
    command: list[str]
    limit_s: int
    result: str = ""
    row: Callable[[dict[str, Any]], str] = lambda record: ""


def parts(gpu: str) -> list[Part]:
    """In the order of what is worth most, should time run out."""
    python = sys.executable
    names = ("link", "rotation", "host-time", "profile", "decode-variants", "latency", "kernels", "products", "moe")
    link, rotation, host, profile, variants, latency, kernels, products, moe = (f"{gpu}-{name}" for name in names)
    skinny = f"{gpu}-skinny"
    bench = [python, "-m", "superinfer", "bench"]
    sizes = ["--model", "llama-3-8b", "--max-batch-size", "256", "--max-batch-tokens", "8192"]
    measured = ["--batch", "1,32,128,256", "--prefill", "16x2048"]
    tests = [python, "-m", "pytest", "-rs", "-p", "no:cacheprovider", "--timeout", "200", "--durations", "5"]
    return [
        Part("duplex", [*tests, "tests/gpu/test_duplex.py"], 400),
        Part("link", [*bench, "link", "--json", f"{RESULTS / link}.json"], 240, link, _link),
        Part("rotation", [python, "benchmarks/gpu_rotation.py", "--name", rotation], 400, rotation, _rotation),
        Part("tests", [*tests, "tests/gpu", "--ignore", "tests/gpu/test_duplex.py"], 500),
        Part("host", [python, "benchmarks/gpu_host_time.py", "--name", host, "--steps", "60"], 240, host, _host),
        Part("profile", [python, "benchmarks/gpu_profile.py", "--name", profile], 120, profile),
        Part("variants", [python, "benchmarks/gpu_decode_variants.py", "--name", variants], 180, variants),
        Part("skinny", [python, "benchmarks/gpu_skinny.py", "--name", skinny], 120, skinny),
        Part(
            "latency",
            [*bench, "latency", *sizes, *measured, "--json", f"{RESULTS / latency}.json"],
            300,
            latency,
            _latency,
        ),
        Part("kernels", [*bench, "kernels", "--json", f"{RESULTS / kernels}.json"], 240, kernels),
        Part("products", [python, "benchmarks/gpu_products.py", "--name", products], 120, products, _products),
        Part("moe", [python, "benchmarks/gpu_moe.py", "--name", moe], 120, moe),
    ]


def _link(record: dict[str, Any]) -> str:
    return str(record["verdict"]["text"])


def _rotation(record: dict[str, Any]) -> str:
    said = [f"TPOT {row['tpot_slower']:+.1%} at batch {row['batch']} beside copies" for row in record["traffic"]]
    for run in record.get("overload", ()):
        tier = f"{run['dram_blocks']} DRAM blocks" if run["dram_blocks"] else "no DRAM"
        said.append(f"overload, {tier}: {run['tokens_per_s']:.0f} tokens/s, TTFT p50 {run['ttft_p50_s']:.2f} s")
    return "; ".join(said)


def _products(record: dict[str, Any]) -> str:
    rows = [row for row in record["results"] if row["matrix"] == "all"]
    return "; ".join(f"{row['rows']} rows {row['torch_ms'] / row['tuned_ms']:.3f} x torch's" for row in rows)


def _host(record: dict[str, Any]) -> str:
    rows = [row for row in record["results"] if row["temperature"] == 0]
    return "; ".join(
        f"batch {row['batch']}: {sum(row['median_ms'][p] for p in ('plan', 'submit', 'commit')):.2f} ms of host, "
        f"submit {row['median_ms']['submit']:.2f}"
        for row in rows
    )


def _latency(record: dict[str, Any]) -> str:
    return "; ".join(f"batch {row['batch']}: TPOT {row['tpot_ms']:.2f} ms" for row in record["tpot"])


def run(part: Part, log: Path) -> tuple[str, float]:
    """Run one part with its output shown and kept. Returns what became of it, and seconds."""
    print(f"\n=== {part.name}: {' '.join(part.command)} (at most {part.limit_s} s)", flush=True)
    began = time.monotonic()
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    with log.open("w") as kept:
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        killer = subprocess.Popen(
            [sys.executable, "-c", _KILLER, str(part.limit_s), str(process.pid)], start_new_session=True
        )
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            sys.stdout.write(line)
            sys.stdout.flush()
        status = process.wait()
        killer.kill()
        killer.wait()
    seconds = time.monotonic() - began
    if status == 0:
        return "ok", seconds
    return (f"killed after {part.limit_s} s" if seconds >= part.limit_s else f"exit status {status}"), seconds


# Ends the whole session that a part leads: a test's engine must not outlive it.
_KILLER = """
import os, signal, sys, time
time.sleep(float(sys.argv[1]))
os.killpg(int(sys.argv[2]), signal.SIGKILL)
"""


def preflight() -> str:
    """Says what is there; returns the GPU's name for file names. Exits where something needed is missing."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"these packages are missing: {', '.join(missing)}")
    for names, what in (
        (TESTS_TOO, "some tests will be skipped or fail"),
        (FASTER, "attention is Triton's, or the link's kind is read from /sys"),
    ):
        absent = [name for name in names if importlib.util.find_spec(name) is None]
        if absent:
            print(f"missing: {', '.join(absent)}; {what}")
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU")
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {os.cpu_count()} cores", flush=True)
    words = [word for word in re.split(r"[^a-z0-9]+", name.lower()) if word not in ("nvidia", "")]
    return words[0] if words else "gpu"


def main() -> int:
    """Run the parts asked for; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[part.name for part in parts("gpu")])
    parser.add_argument("--out", type=Path, help="copy results and output here")
    parser.add_argument("--budget", type=float, default=1500, help="seconds; parts that would not fit are left out")
    arguments = parser.parse_args()
    gpu = preflight()
    out = arguments.out or ROOT / "benchmarks" / ".gpu_session"
    out.mkdir(parents=True, exist_ok=True)
    began, table, failed = time.monotonic(), [], False
    for part in parts(gpu):
        if arguments.only and part.name not in arguments.only:
            continue
        left = arguments.budget - (time.monotonic() - began)
        if left < 30:
            table.append((part.name, "left out", 0.0, "no time left"))
            continue
        part = Part(part.name, part.command, min(part.limit_s, int(left)), part.result, part.row)
        log = out / f"{part.name}.log"
        path = RESULTS / f"{part.result}.json"
        started = time.time()
        status, seconds = run(part, log)
        failed |= status != "ok"
        said = log.read_text().strip().splitlines()[-1:]
        text = said[0] if said else ""
        if part.result and path.exists() and path.stat().st_mtime >= started:  # not an older run's
            text = part.row(json.loads(path.read_text()))
            if arguments.out:
                shutil.copy(path, out)
        table.append((part.name, status, seconds, text))
    print("\n=== summary")
    for name, status, seconds, text in table:
        print(f"{name:9} {status:18} {seconds:5.0f} s  {text}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
