"""The engine process. Started by `runtime.launch`; see there for the report pipe and the lifeline."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
import time

import msgspec

from superinfer.errors import SuperinferError
from superinfer.runtime.collector import spare_the_collector
from superinfer.runtime.config import EngineConfig
from superinfer.runtime.engine.frontdoor import FrontDoor
from superinfer.runtime.engine.intake import Intake
from superinfer.runtime.engine.loop import EngineLoop
from superinfer.runtime.kv.duplex import build_cache
from superinfer.runtime.launch import StartReport
from superinfer.runtime.protocol import ModelInfo
from superinfer.runtime.scheduler.base import SchedulerLimits
from superinfer.runtime.scheduler.registry import build_scheduler, check_policy
from superinfer.runtime.tracing import TraceRecorder


def main() -> int:
    """Load, serve, end. Exit status 0 after an orderly end, 1 when the start failed."""
    parser = argparse.ArgumentParser(prog="python -m superinfer.runtime.engine", description=__doc__)
    parser.add_argument("--config", required=True, help="EngineConfig as JSON")
    parser.add_argument("--report-fd", type=int, help="pipe to report the start on")
    parser.add_argument("--lifeline-fd", type=int, help="pipe whose end means that the parent is gone")
    parser.add_argument("--own-folder", help="folder of the socket, removed at the end")
    arguments = parser.parse_args()
    logging.basicConfig(format="engine %(levelname)s %(message)s", level=logging.WARNING)
    reporter = StartReporter(arguments.report_fd)
    try:
        config = msgspec.json.decode(arguments.config, type=EngineConfig)
        loop, address = build_engine(config, reporter, arguments.lifeline_fd)
    except SuperinferError as error:
        reporter.say(StartReport(error=str(error), code=error.code))
        return 1
    except Exception as error:
        reporter.say(StartReport(error=f"the engine could not start: {error!r}", code=SuperinferError.code))
        raise
    signal.signal(signal.SIGTERM, lambda *_: loop.stop("it was terminated"))
    reporter.say(StartReport(address=address))
    spare_the_collector()
    try:
        loop.run()
    finally:
        if arguments.own_folder:
            shutil.rmtree(arguments.own_folder, ignore_errors=True)
    return 0


class StartReporter:
    """Writes start reports to the parent's pipe, or to stderr when there is none."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def progress(self, stage: str, fraction: float) -> None:
        """Tell how far a stage of the start has come, 0..1."""
        self.say(StartReport(stage=stage, progress=fraction))

    def say(self, report: StartReport) -> None:
        """Write one line; a parent that has gone is no reason to fail here, the lifeline will tell."""
        if self._fd is None:
            print(msgspec.json.encode(report).decode(), file=sys.stderr)
            return
        try:
            os.write(self._fd, msgspec.json.encode(report) + b"\n")
        except BrokenPipeError:
            self._fd = None


def build_engine(config: EngineConfig, reporter: StartReporter, lifeline_fd: int | None) -> tuple[EngineLoop, str]:
    """An engine ready to run, bound to its address, which is returned too. Raises SuperinferError."""
    check_policy(config.policy)  # before minutes of loading, not after
    trace = TraceRecorder(config.trace, time.monotonic()) if config.trace else None
    from superinfer.runtime.engine.model_executor import build_executor  # imports torch: after the cheap checks
    from superinfer.runtime.engine.seed_cost import seed_cost

    executor = build_executor(config, reporter.progress)
    executor.grammars.jumps = config.jump_forward
    limits = executor.limits
    info = ModelInfo(
        model=executor.model_name,
        path=executor.path,
        architecture=executor.architecture,
        vocab_size=limits.vocab_size,
        max_model_len=limits.max_model_len,
        eos_token_ids=tuple(executor.eos_token_ids),
        dtype=executor.dtype,
        device=executor.device,
        page_size=limits.page_size,
        num_blocks=limits.num_blocks,
        policy=config.policy,
        pid=os.getpid(),
    )
    num_dram, link = (executor.tier.num_blocks, executor.tier.link) if executor.tier is not None else (0, None)
    kv = build_cache(limits.num_blocks, num_dram, limits.page_size, prefix_cache=config.prefix_cache, link=link)
    batch = SchedulerLimits(limits.num_slots, config.max_batch_tokens, limits.max_model_len)
    cost = seed_cost(executor.device, executor.path, executor.captured_tokens)
    scheduler = build_scheduler(config.policy, kv, batch, cost, config.admission)
    door = FrontDoor(config.address, info, lifeline_fd)
    intake = Intake(info, config.seed)
    loop = EngineLoop(
        door, intake, scheduler, executor, config.max_queue, trace,
        plan_late=config.plan_late, prepare=executor.grammars.prepare,
    )  # fmt: skip
    return loop, door.address


if __name__ == "__main__":
    sys.exit(main())
