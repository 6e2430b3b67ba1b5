"""The `simulate` command. Imports what it needs to say its help; numpy and rich come in when it runs."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from superinfer.errors import InvalidRequestError
from superinfer.runtime.scheduler.registry import POLICIES, check_policy
from superinfer.runtime.sim.hardware import PROFILES, profile_of
from superinfer.runtime.sim.shapes import SHAPES, shape_of
from superinfer.runtime.slo import SLO

if TYPE_CHECKING:
    from superinfer.runtime.sim.report import Point

Promises = Annotated[
    str,
    typer.Option(
        help="What is promised: any of ttft, tbt and deadline, in seconds, and weight. Several classes, each with its "
        "share: '0.8: ttft=1; 0.2: deadline=60'."
    ),
]


def simulate(
    hardware: Annotated[str, typer.Option(help=f"One of {', '.join(PROFILES)}.")] = "h100-pcie5",
    model: Annotated[
        str, typer.Option(help=f"One of {', '.join(SHAPES)}, embedded, or a checkpoint's folder.")
    ] = "llama-3-8b",
    workload: Annotated[str, typer.Option(help="sharegpt, lmsys, azure or mooncake.")] = "sharegpt",
    trace: Annotated[Path | None, typer.Option(help="The trace's file, for azure and mooncake.")] = None,
    arrivals: Annotated[str, typer.Option(help="poisson, or trace: the trace's own times, stretched.")] = "poisson",
    turns: Annotated[
        bool, typer.Option("--turns", help="Prompts of a mooncake conversation have its earlier answers in them.")
    ] = False,
    rate: Annotated[str, typer.Option(help="Requests/s; several with commas.")] = "10",
    policy: Annotated[str, typer.Option(help=f"{', '.join(POLICIES)}; several with commas.")] = "fcfs",
    slo: Promises = "ttft=1,tbt=0.1",
    max_tokens: Annotated[
        int, typer.Option(help="max_tokens of every request, though its answer may end before; 0: what the answer has.")
    ] = 0,
    kv_tokens: Annotated[
        int | None, typer.Option(help="Size of the KV cache, in tokens.", show_default="what fits")
    ] = None,
    dram_tokens: Annotated[
        int, typer.Option(help="Second tier of the KV cache, in CPU memory, in tokens; 0: none.")
    ] = 0,
    max_batch_size: Annotated[int, typer.Option(help="Most sequences in one step.")] = 1024,
    max_batch_tokens: Annotated[int, typer.Option(help="Most tokens in one step.")] = 8192,
    depth: Annotated[int, typer.Option(help="Steps planned ahead of their results, 1 or 2.")] = 1,
    duration: Annotated[float, typer.Option(help="Seconds of arrivals.")] = 60.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same run.")] = 0,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="Write everything here; - is stdout, instead of the table.")
    ] = None,
    plot_folder: Annotated[
        Path | None, typer.Option("--plot", help="Folder for three plots (needs matplotlib).")
    ] = None,
) -> None:
    """Run the real scheduler and KV bookkeeping on hardware that is only simulated, and say what each policy keeps."""
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items()}
    from superinfer.out_file import check_writable
    from superinfer.runtime.sim.report import Point, check_can_plot, plot
    from superinfer.runtime.sim.simulate import SimConfig
    from superinfer.runtime.sim.simulate import simulate as run_jobs
    from superinfer.runtime.sim.workload import make_jobs

    profile, shape = profile_of(hardware), shape_of(model)
    rates = [_number("--rate", part) for part in _listed("--rate", rate)]
    policies = _listed("--policy", policy)
    for name in policies:
        check_policy(name)  # before minutes of simulating the others
    classes = parse_slos(slo)
    check_writable(json_path, or_stdout=True)
    if depth not in (1, 2):
        raise InvalidRequestError(f"depth={depth} must be 1 or 2, as an engine's")
    if plot_folder is not None:
        check_can_plot(plot_folder)
    points = []
    made = [  # before any of them runs: what cannot be made is said at once
        make_jobs(
            workload,
            rate=at,
            duration=duration,
            seed=seed,
            trace=trace,
            arrivals=arrivals,
            slos=classes,
            turns=turns,
            max_tokens=max_tokens,
        )
        for at in rates
    ]
    for at, jobs in zip(rates, made, strict=True):
        for name in policies:
            config = SimConfig(
                policy=name,
                kv_tokens=kv_tokens,
                dram_tokens=dram_tokens,
                max_batch_size=max_batch_size,
                max_batch_tokens=max_batch_tokens,
                depth=depth,
            )
            points.append(Point(at, run_jobs(jobs, profile, shape, config)))
            if sys.stderr.isatty():
                print(f"{name} at {at:g}/s: {points[-1].result.requests} requests", file=sys.stderr)
    _show(points, settings, json_path, f"{workload} on {hardware}, {model}")
    if plot_folder is not None:
        for path in plot(points, plot_folder, f"{workload}-{hardware}-{shape.name.replace('/', '-')}"):
            print(f"written to {path}", file=sys.stderr)


def _show(points: list[Point], settings: dict[str, object], json_path: Path | None, title: str) -> None:
    from superinfer.out_file import json_text, write_json
    from superinfer.runtime.sim.report import as_json, tables

    if json_path is not None and str(json_path) == "-":
        print(json_text(as_json(points, settings)))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 1000)  # in a file or a pipe nothing is cut
    for each in tables(points, title):
        console.print(each)
        console.print()
    if json_path is not None:
        write_json(json_path, as_json(points, settings))


def parse_slos(text: str) -> list[tuple[float, SLO]]:
    """(share, SLO) of each class in "SHARE: key=value,...; ..."; without a share it is 1. "" is no SLO at all.

    Raises InvalidRequestError for what cannot be read as one.
    """
    classes = []
    for part in text.split(";"):
        if not part.strip():
            continue
        head, colon, rest = part.partition(":")
        share = _number("the share of an SLO class", head) if colon else 1.0
        fields = {}
        for pair in _parts(rest if colon else head):
            name, equals, value = pair.partition("=")
            if not equals or name.strip() not in ("ttft", "tbt", "deadline", "weight"):
                raise InvalidRequestError(f"--slo {pair!r} must be one of ttft, tbt, deadline, weight = a number")
            fields[name.strip()] = _number(f"--slo {name.strip()}", value)
        if not 0 < share < math.inf:
            raise InvalidRequestError(f"--slo {part.strip()!r} has a share that is not finite and above 0")
        try:
            classes.append((share, SLO(**fields)))  # type: ignore[arg-type]
        except (ValueError, msgspec.ValidationError) as error:
            raise InvalidRequestError(str(error)) from None
    return classes


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _listed(name: str, text: str) -> list[str]:
    parts = _parts(text)
    if not parts:
        raise InvalidRequestError(f"{name} {text!r} names nothing; give one, or several with commas")
    return parts


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidRequestError(f"{name} {text.strip()!r} is not a number") from None
