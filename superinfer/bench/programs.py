"""`superinfer bench programs`: whole programs, end to end, in our language and as the same calls with `openai`.

See docs/benchmarks.md. The two arms may run in one command, taking turns, or in one command each, joined afterwards.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from superinfer.bench.program_texts import SHAPES
from superinfer.cli.options import check_unset, with_engine_options
from superinfer.errors import InvalidRequestError, SuperinferError
from superinfer.runtime.config import EngineConfig

if TYPE_CHECKING:
    from superinfer.bench.programs_run import Arm, OurArm, Plan


@with_engine_options
def programs(
    config: EngineConfig,
    url_ours: Annotated[
        str,
        typer.Option(help="Our arm: a running engine, ipc://PATH or tcp://HOST:PORT, or a server, http://HOST:PORT."),
    ] = "",
    start: Annotated[
        bool, typer.Option("--start", help="Our arm: an engine of the options below, started here.")
    ] = False,
    url_engine: Annotated[
        str,
        typer.Option(
            help="Our arm once more, at its engine, ipc://PATH or tcp://HOST:PORT, where --url-ours is a server."
        ),
    ] = "",
    url_peer: Annotated[str, typer.Option(help="The other arm: an OpenAI-compatible server, http://HOST:PORT.")] = "",
    peer_model: Annotated[str, typer.Option(help="Which of that server's models.", show_default="the first")] = "",
    select_by: Annotated[
        str, typer.Option(help="How the other arm selects: scores, or choice (the server writes one, constrained).")
    ] = "scores",
    shapes: Annotated[
        str, typer.Option(help=f"Of {', '.join(SHAPES)}; several with commas.", show_default="all")
    ] = ",".join(SHAPES),
    at_once: Annotated[
        str, typer.Option(help="Programs that run at once; several with commas, one after another.")
    ] = "8,32",
    rounds: Annotated[int, typer.Option(help="How often each is measured; medians are shown, all are written.")] = 3,
    scale: Annotated[
        float | None,
        typer.Option(
            help="Multiplies all lengths, for models with a short context.",
            show_default="1; with --start, less where the model's context is too short for it",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same prompts.")] = 0,
    limit: Annotated[float, typer.Option(help="Seconds that the programs of one shape may take.")] = 300.0,
    join: Annotated[
        list[Path] | None, typer.Option(help="Records of one arm each: run nothing, compare these. Give it twice.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write everything here, every round.")] = None,
) -> None:
    """Run tree-shaped programs at once, ours against the `openai` client's calls, and time them end to end. With
    --start, --model also takes llama-3-8b, qwen2.5-32b and mixtral-8x7b: their sizes, with random weights."""
    from superinfer.bench.engine import numbers, save
    from superinfer.bench.programs_report import check_tokens, compare, joined, table
    from superinfer.bench.programs_run import OurArm, Plan, measure
    from superinfer.out_file import check_writable

    check_writable(json_path)
    if join:
        found = joined(join)
    else:
        plan = Plan.of(shapes, numbers("--at-once", at_once), rounds, 1.0 if scale is None else scale, seed, limit)
        with _arms(config, url_ours, start, url_engine, url_peer, peer_model, select_by) as arms:
            if start and scale is None:
                assert isinstance(arms[0], OurArm)
                plan = _fitted(plan, arms[0])
            found = asyncio.run(measure(arms, plan))
    found = compare(found)
    print(table(found))
    save(json_path, found)
    if wrong := check_tokens(found):
        raise SuperinferError("the arms did not do the same work: " + "; ".join(wrong))


def _fitted(plan: Plan, arm: OurArm) -> Plan:
    """The plan with lengths that the context of our arm's engine takes. Raises InvalidRequestError where none do."""
    from superinfer.bench.program_texts import scale_for

    context = arm.context
    scale = scale_for(plan.shapes, context, arm.weights(plan.shapes))
    if scale == 1.0:
        return plan
    fits = f"to fit into the model's context of {context} tokens"
    print(f"lengths are scaled as by --scale {scale:g}, {fits}", file=sys.stderr)
    return plan.scaled(scale)


@contextlib.contextmanager
def _arms(
    config: EngineConfig,
    url_ours: str,
    start: bool,
    url_engine: str,
    url_peer: str,
    peer_model: str,
    select_by: str,
) -> Iterator[list[Arm]]:
    """Those asked for, ours first. Raises InvalidRequestError for none, or ours twice."""
    from superinfer.bench.programs_run import OpenAIArm, OurArm
    from superinfer.bench.shapes import engine_of_shape

    if start and url_ours:
        raise InvalidRequestError("--start and --url-ours are both our arm; give one")
    if not (start or url_ours or url_engine or url_peer):
        raise InvalidRequestError("nothing to measure: give --url-ours, --url-engine or --start, --url-peer, or both")
    if url_engine.startswith("http"):
        raise InvalidRequestError(
            f"--url-engine {url_engine!r} is no engine's address; give ipc://PATH or tcp://HOST:PORT"
        )
    if not start:
        check_unset(config, url_ours or url_engine or url_peer)
    with contextlib.ExitStack() as stack:
        arms: list[Arm] = []
        backend: Any = None
        if start:
            import msgspec

            import superinfer as si

            settings, _ = stack.enter_context(engine_of_shape(config, None, tokenizer=True))
            backend = stack.enter_context(si.Runtime(**msgspec.structs.asdict(settings)))
        elif url_ours:
            import superinfer as si

            backend = stack.enter_context(si.RuntimeEndpoint(url_ours))
        if backend is not None:
            arms.append(OurArm(backend, url_ours or "started here"))
        if url_engine:
            import superinfer as si

            at_engine: Any = stack.enter_context(si.RuntimeEndpoint(url_engine))
            arms.append(OurArm(at_engine, url_engine, "engine"))
        if url_peer:
            arms.append(OpenAIArm(url_peer, peer_model, select_by))
        yield arms
