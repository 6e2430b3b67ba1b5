"""Our engine and vLLM beside each other, on the same GPUs, in one command that ends in time.

python benchmarks/peer/run.py ample slo tiers --gpus 0,1 [--swap] [--lanes 0,1] [--budget 560] [--out FOLDER]

Each schedule (schedule.py) has lanes, one GPU for each: on two GPUs both run at once, on one after another. With as
many GPUs as all schedules have lanes, they all run at once; otherwise one schedule after another. Results are
<gpu>-vs-vllm-<schedule>.json, written anew after every phase; logs of the servers are in logs.tgz. A table comes last.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(ROOT)]

from arms import Sizes  # noqa: E402
from lane import LaneTask, run_lane  # noqa: E402
from plan import Plan  # noqa: E402
from schedule import SCHEDULES, Lane, gpu_of, only  # noqa: E402
from table import table  # noqa: E402

from superinfer.bench.record import environment  # noqa: E402
from superinfer.out_file import without_nan  # noqa: E402

END_S = 25.0  # kept back to end servers and write results
LOOK_S = 2.0
AZURE, MOONCAKE = "azure_conv_2023.csv", "mooncake_conversation.jsonl"  # in the folder of --traces


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("schedules", nargs="+", choices=list(SCHEDULES))
    parser.add_argument("--gpus", default="0", help="ids, with commas; '' for none")
    parser.add_argument("--swap", action="store_true", help="turn lanes and GPUs round")
    parser.add_argument("--lanes", default="", help="only these, with commas: 0 is vLLM's, 1 ours")
    parser.add_argument("--arms", default="", help="only these, with commas")
    parser.add_argument("--phases", default="", help="only these, with commas")
    parser.add_argument("--rates", default="", help="requests/s of slo, with commas")
    parser.add_argument("--online-rates", default="", help="the same of online")
    parser.add_argument("--slo-seconds", type=float, default=60.0, help="of arrivals at each rate")
    parser.add_argument("--drain", type=float, default=20.0, help="seconds after them, then requests are given up")
    parser.add_argument("--budget", type=float, default=560.0, help="seconds for all of it")
    parser.add_argument("--start-limit", type=float, default=240.0, help="seconds for a server to be ready")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / ".peer")
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/superinfer-peer"))
    parser.add_argument("--traces", type=Path, default=ROOT.parent / "shared" / "traces")
    parser.add_argument("--clients", type=int, default=4, help="client processes of each lane")
    parser.add_argument("--own-flags", default="", help="more flags for our server")
    parser.add_argument("--trace", action="store_true", help="our servers write ARM.trace into --out")
    parser.add_argument("--port", type=int, default=8100, help="of the first server; each lane takes ten")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-ceilings", action="store_true", help="do not measure what the GPUs can do")
    parser.add_argument("--small", action="store_true", help="the embedded model and short runs: tries the harness")
    parser.add_argument("--stand-in", action="store_true", help="our server in vLLM's place: tries the harness")
    parser.add_argument(
        "--then", default="", help="a command with {ours}, {engine} and {vllm}, once the last servers are idle"
    )
    parser.add_argument("--then-after", default="", help="the schedule of those servers; the last one given")
    given = parser.parse_args()
    given.then_after = given.then_after or given.schedules[-1]
    if given.then_after not in given.schedules:
        parser.error(f"--then-after {given.then_after} is none of {', '.join(given.schedules)}")
    for trace in _traces(given):
        if not trace.is_file():  # said now, not when servers have started
            parser.error(f"there is no {trace}; say with --traces where it is")
    return given


def _traces(given: argparse.Namespace) -> list[Path]:
    """Those that the phases read."""
    lanes = [
        only(lane, _parts(given.arms), _parts(given.phases)) for name in given.schedules for lane in SCHEDULES[name]
    ]
    phases = {step.phase for lane in lanes for run in lane.runs for step in run.steps}
    needed = {AZURE: phases & {"online", "slo"}, MOONCAKE: phases & {"turns"}}
    return [given.traces / name for name, readers in needed.items() if readers]


def sizes_and_plan(given: argparse.Namespace) -> tuple[Sizes, Plan]:
    """What is measured, of the real model's size or a small one's."""
    traces = given.traces / AZURE, given.traces / MOONCAKE
    own = tuple(shlex.split(given.own_flags))
    if given.small:
        sizes = Sizes(
            model="embedded", block_bytes=1 << 14, ample=600, tight=60, turns=40, dram_bytes=4 << 20, max_model_len=512,
            max_seqs=32, batch_tokens=256, dummy=False, own_flags=("--threads", "1", *own), half=40, traced=given.trace,
        )  # fmt: skip
        return sizes, replace(Plan.small(*traces), seed=given.seed)
    from superinfer.bench.shapes import write_shape

    folder = given.scratch / "llama-3-8b"
    folder.mkdir(parents=True, exist_ok=True)
    write_shape("llama-3-8b", folder, tokenizer=True)
    plan = replace(Plan(*traces), seed=given.seed, slo_s=given.slo_seconds, drain_s=given.drain)
    if given.rates:
        plan = replace(plan, slo_rates=tuple(float(part) for part in _parts(given.rates)))
    if given.online_rates:
        plan = replace(plan, online_rates=tuple(float(part) for part in _parts(given.online_rates)))
    return Sizes(model=str(folder), own_flags=own, traced=given.trace), plan


class Command:
    """One call: lanes as processes, results gathered while they run."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.began = time.monotonic()
        self.until = self.began + given.budget - END_S
        self.gpus = [int(part) for part in _parts(given.gpus)]
        self.sizes, self.plan = sizes_and_plan(given)
        self.place = environment(shlex.join(["python", "benchmarks/peer/run.py", *sys.argv[1:]]))
        self.place["gpus"] = _nvidia_smi()
        self.name = _gpu_name(self.place)
        self.memory = _memory(self.place["gpus"])
        self.ceilings: dict[str, Any] = {}
        self.then_failed = False
        given.out.mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        """Exit status 1 if an arm or a phase failed."""
        if self.gpus and not self.given.no_ceilings:
            self.ceilings = _ceilings(self.gpus)
            for gpu, found in self.ceilings.items():
                print(f"GPU {gpu}: {found}", flush=True)
        lanes = {name: self._lanes(name) for name in self.given.schedules}
        at_once = len(self.gpus) >= sum(map(len, lanes.values())) and len(lanes) > 1
        rounds = [list(lanes)] if at_once else [[name] for name in lanes]
        for names in rounds:
            self._round([(name, number) for name in names for number in lanes[name]])
        for name in self.given.schedules:
            self._write(name)
        return self._report()

    def _lanes(self, schedule: str) -> list[int]:
        chosen = [int(part) for part in _parts(self.given.lanes)]
        numbers = [number for number in range(len(SCHEDULES[schedule])) if not chosen or number in chosen]
        return [number for number in numbers if self._lane(schedule, number).runs]

    def _lane(self, schedule: str, number: int) -> Lane:
        return only(SCHEDULES[schedule][number], _parts(self.given.arms), _parts(self.given.phases))

    def _round(self, lanes: list[tuple[str, int]]) -> None:
        """As many lanes at once as there are GPUs."""
        width = max(1, len(self.gpus))
        for at in range(0, len(lanes), width):
            self._together(lanes[at : at + width])

    def _together(self, group: list[tuple[str, int]]) -> None:
        context = multiprocessing.get_context("spawn")
        cores = sorted(os.sched_getaffinity(0))
        share = len(cores) // len(group)
        running = []
        for place, (schedule, number) in enumerate(group):
            folder = self._folder(schedule)
            (folder / "end").unlink(missing_ok=True)
            task = LaneTask(
                number=number,
                lane=self._lane(schedule, number),
                gpu=(gpu := self._gpu(place if len(group) > 1 else number)),
                gpu_bytes=self.memory.get(gpu) if gpu is not None else None,
                cores=cores[place * share : (place + 1) * share] if len(group) > 1 else (),
                sizes=self.sizes,
                plan=self.plan,
                folder=folder,
                port=self.given.port + 10 * place,
                until=self.until,
                start_limit_s=self.given.start_limit,
                clients=self.given.clients,
                stand_in=self.given.stand_in,
                hold=self._held(schedule),
            )
            process = context.Process(target=run_lane, args=(task,), name=f"{schedule}-{number}")
            process.start()
            running.append(process)
        try:
            self._watch(running, {name for name, _ in group})
        finally:
            for process in running:
                if process.is_alive():
                    process.terminate()
            for process in running:
                process.join(END_S)
                if process.is_alive():
                    process.kill()

    def _gpu(self, place: int) -> int | None:
        return gpu_of(place, self.gpus, self.given.swap) if self.gpus else None

    def _held(self, schedule: str) -> bool:
        """Whether its lanes keep their last servers for --then. On fewer GPUs than it has lanes, each lane is held
        for itself: the command is run once for each."""
        return bool(self.given.then) and schedule == self.given.then_after

    def _watch(self, running: list[Any], schedules: set[str]) -> None:
        """Until the lanes are done or time is up; results are gathered meanwhile."""
        asked: subprocess.Popen[bytes] | None = None
        held = [process for process in running if self._held(process.name.rsplit("-", 1)[0])]
        folder = self._folder(self.given.then_after)
        try:
            while any(process.is_alive() for process in running) and time.monotonic() < self.until:
                time.sleep(LOOK_S)
                for name in schedules:
                    self._write(name)
                if held and asked is None and self._all_held(held, folder):
                    asked = self._then(folder)
                if asked is not None and asked.poll() is not None and not (folder / "end").exists():
                    self.then_failed |= asked.returncode != 0
                    (folder / "end").touch()
        finally:
            if asked is not None and asked.poll() is None:
                print("--then was out of time", flush=True)
                self.then_failed = True
                os.killpg(asked.pid, signal.SIGKILL)
                asked.wait()
            for path in folder.glob("urls-*.json"):
                path.unlink()

    def _all_held(self, held: list[Any], folder: Path) -> bool:
        """Every lane that lives keeps its servers, and one does."""
        kept = len(list(folder.glob("urls-*.json")))
        return kept > 0 and kept >= sum(process.is_alive() for process in held)

    def _then(self, folder: Path) -> subprocess.Popen[bytes]:
        """The user's own command, while the servers that it names are idle."""
        found = [json.loads(path.read_text()) for path in folder.glob("urls-*.json")]
        where = {"ours": "", "engine": "", "vllm": "", "out": str(self.given.out)}
        for name, at in (pair for each in found for pair in each.items()):
            if name.startswith("vllm"):
                where["vllm"] = at["url"]
            else:
                where |= {"ours": at["url"], "engine": at["engine"]}
        command = self.given.then.format(**where)
        print(f"+ {command}", flush=True)
        environ = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        return subprocess.Popen(command, shell=True, cwd=ROOT, env=environ, process_group=0)

    def _folder(self, schedule: str) -> Path:
        folder: Path = self.given.scratch / f"{schedule}-{os.getpid()}"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def record(self, schedule: str) -> dict[str, Any]:
        """All that is known of a schedule so far."""
        arms = [json.loads(path.read_text()) for path in sorted(self._folder(schedule).glob("*.json")) if _is_arm(path)]
        settings = asdict(self.plan) | {"sizes": asdict(self.sizes), "swap": self.given.swap}
        settings["azure"], settings["mooncake"] = self.plan.azure.name, self.plan.mooncake.name
        settings["slo"] = {"ttft": self.plan.slo.ttft, "tbt": self.plan.slo.tbt}
        return {
            **self.place,
            "ceilings": self.ceilings,
            "settings": settings,
            "arms": {arm["arm"]: arm for arm in arms},
        }

    def _write(self, schedule: str) -> None:
        path = self.given.out / f"{self.name}-vs-vllm-{schedule}.json"
        text = json.dumps(_rounded(without_nan(self.record(schedule))), separators=(",", ":"))
        path.with_suffix(".new").write_text(text)
        path.with_suffix(".new").replace(path)

    def _report(self) -> int:
        for name in self.given.schedules:
            for trace in self._folder(name).glob("*.trace"):
                shutil.copy(trace, self.given.out / trace.name)
        with tarfile.open(self.given.out / "logs.tgz", "w:gz") as kept:
            for name in self.given.schedules:
                for log in self._folder(name).glob("*.log"):
                    kept.add(log, f"{name}/{log.name}")
        failed = self.then_failed
        for name in self.given.schedules:
            found = self.record(name)
            # A report within a phase counts its failed requests under that name too: those are a result.
            failed |= any("failed" in one for arm in found["arms"].values() for one in (arm, *arm["phases"].values()))
            print(f"\n=== {name}\n{table(found)}", flush=True)
        print(f"{time.monotonic() - self.began:.0f} s; results in {self.given.out}", flush=True)
        return int(failed)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _is_arm(path: Path) -> bool:
    return not path.name.startswith("urls-")


def _rounded(value: Any) -> Any:
    """Six digits are more than any of these numbers is worth."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _nvidia_smi() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=index,name,memory.total,clocks.max.sm,pci.bus_id", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().splitlines()
    except (OSError, subprocess.CalledProcessError):
        return []


def _memory(lines: list[str]) -> dict[int, int]:
    """Bytes of each GPU, from nvidia-smi's lines; 2 % are left to the driver."""
    found = [re.match(r"(\d+),.*?,\s*(\d+) MiB", line) for line in lines]
    return {int(match[1]): int(0.98 * (int(match[2]) << 20)) for match in found if match}


def _gpu_name(place: dict[str, Any]) -> str:
    words = re.split(r"[^a-z0-9]+", str(place["device"].get("gpu", "")).lower())
    return next((word for word in words if word not in ("nvidia", "")), "cpu")


def _ceilings(gpus: list[int]) -> dict[str, Any]:
    """Copy and matrix product of each GPU, all at once, each in a process of its own."""
    found: dict[str, Any] = {}
    started = {}
    code = (
        "from superinfer.bench.ceilings import measure_here as m; import json; print(json.dumps(m('cuda','bfloat16')))"
    )
    for gpu in gpus:
        path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        environ = os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu), "PYTHONPATH": path}
        command = [sys.executable, "-c", code]
        started[gpu] = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
    for gpu, process in started.items():
        try:
            copy, matmul = json.loads(process.communicate(timeout=60)[0].strip().splitlines()[-1])
            found[str(gpu)] = {"copy_tb_s": copy / 1e12, "matmul_tflop_s": matmul / 1e12}
        except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
            process.kill()
            found[str(gpu)] = {"failed": str(error)}
    return found


def main() -> int:
    """Run; write; print a table."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    return Command(arguments()).run()


if __name__ == "__main__":
    sys.exit(main())
