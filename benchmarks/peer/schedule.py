"""What runs where: lanes of arms, each lane on one GPU, all lanes at the same time.

A lane's servers start together, while nothing is measured, where its memory holds them; its arms are then measured one
after another, the others idle. A schedule is one command of at most ten minutes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from arms import Sizes, known_arms

RATES_OF_THE_REST = (25.0, 35.0)


@dataclass(frozen=True)
class Step:
    """A phase of an arm. seconds: what it is expected to take, or its first rate; it is left out where less is left.
    rates: only these of the plan's."""

    phase: str
    seconds: float
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Run:
    """An arm and what is measured of it."""

    arm: str
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Lane:
    """Arms of one GPU in order. together: how many of them may hold its memory at once, where it is large enough."""

    runs: tuple[Run, ...]
    together: int = 1


_SPEED = (Step("tpot", 95), Step("prefill", 20), Step("offline", 65), Step("online", 45))
_STEADY = (Step("tpot", 95), Step("online", 45))
_ALL = Step("slo", 65)
_REST = Step("slo", 65, RATES_OF_THE_REST)
_TURNS = Step("turns", 75)
_CALIBRATION = Step("online", 45, (20.0,))

SCHEDULES: dict[str, tuple[Lane, ...]] = {
    # Room for all: TPOT, prefill, offline and online.
    "ample": (Lane((Run("vllm", _SPEED),)), Lane((Run("ours", _SPEED),))),
    # The same, and conversations on a tenth of their working set; ours while vLLM starts, its servers both at once.
    "ample-turns": (
        Lane((Run("vllm", _SPEED), Run("vllm-turns-offload", (_TURNS,))), together=2),
        Lane((Run("ours-turns-tiers", (_TURNS,)), Run("ours-turns", (_TURNS,)), Run("ours", _SPEED)), together=2),
    ),
    # `ample` and `slo` in one, with TPOT where steps are planned at once.
    "whole": (
        Lane((Run("vllm", _SPEED), Run("vllm-tight", (_ALL,))), together=2),
        Lane((Run("ours", _SPEED), Run("ours-rota", (_ALL,)), Run("ours-at-once", (Step("tpot", 45),))), together=2),
    ),
    # A pool of 153,600 tokens under load with promises.
    "slo": (
        Lane((Run("vllm-tight", (_ALL,)), Run("vllm-edf", (_REST,))), together=2),
        Lane((Run("ours-rota", (_ALL,)), Run("ours-fcfs", (_ALL,))), together=2),
    ),
    # What the simulator is held against, ours alone: on each GPU a run that its step times are fitted to, then runs
    # that it is to foretell, with two sizes of the pool.
    "truth": (
        Lane((Run("ours-rota", (_CALIBRATION, _ALL)), Run("ours-rota-half", (_ALL,))), together=2),
        Lane((Run("ours-fcfs", (_CALIBRATION, _ALL)), Run("ours-fcfs-half", (_ALL,))), together=2),
    ),
    # Second tiers: vLLM's own offload under the same load, and conversations with a tenth of their working set in HBM.
    "tiers": (
        # One after the other: each pins a second tier of its own.
        Lane((Run("vllm-offload", (_REST,)), Run("vllm-turns-offload", (_TURNS,)))),
        Lane((Run("ours-turns-tiers", (_TURNS,)), Run("ours-turns", (_TURNS,))), together=2),
    ),
    # Planning steps late or at once, by turns on one GPU.
    "planning": (Lane((Run("ours", _STEADY), Run("ours-at-once", _STEADY)), together=2),),
    # Servers for `superinfer bench programs`, which asks both.
    "programs": (Lane((Run("vllm", ()),)), Lane((Run("ours", ()),))),
}


def only(lane: Lane, arms: list[str], phases: list[str]) -> Lane:
    """What is left of a lane with these arms and phases alone; empty lists leave all."""
    runs = [run for run in lane.runs if not arms or run.arm in arms]
    kept = [replace(run, steps=tuple(step for step in run.steps if not phases or step.phase in phases)) for run in runs]
    return replace(lane, runs=tuple(run for run, whole in zip(kept, runs, strict=True) if run.steps or not whole.steps))


def together(lane: Lane, at: int, sizes: Sizes, gpu_bytes: int | None) -> int:
    """How many of a lane's arms from number `at` on start together: at most `lane.together`, and no more than memory
    holds, but for the first. gpu_bytes: of its GPU; None: not known, and not asked."""
    arms, count, held = known_arms(), 0, 0
    for run in lane.runs[at : at + lane.together]:
        held += sizes.gpu_bytes(arms[run.arm].pool)
        if count and gpu_bytes is not None and held > gpu_bytes:
            break
        count += 1
    return count


def gpu_of(lane: int, gpus: list[int], swap: bool) -> int:
    """Which GPU a lane has; `swap` turns them round, to show that a difference is not the GPUs'."""
    return gpus[(lane + int(swap)) % len(gpus)]
