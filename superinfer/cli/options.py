"""The engine's options, declared once and added to every command that may start an engine."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from superinfer.runtime.config import EMBEDDED, EngineConfig
from superinfer.runtime.scheduler.registry import POLICIES

PANEL = "Engine"

EngineAddress = Annotated[
    str,
    typer.Option(
        "--engine", help="Use the engine that runs at this address, rather than start one.", metavar="ADDRESS",
        show_default=False,
    ),
]  # fmt: skip


def _engine_options(
    model: Annotated[str, typer.Option(help="'embedded', a checkpoint's folder, or a hub name.")] = EMBEDDED,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    policy: Annotated[str, typer.Option(help=f"Scheduling policy: {', '.join(POLICIES)}.")] = EngineConfig().policy,
    admission: Annotated[
        str, typer.Option(help="What cannot be kept is taken all the same (accept), taken last (degrade), or refused.")
    ] = EngineConfig().admission,
    kv_tokens: Annotated[int | None, typer.Option(help="KV pool, in tokens.", show_default="by device")] = None,
    dram_tokens: Annotated[
        int, typer.Option(help="Second KV tier in CPU memory, in tokens; 0 is off.")
    ] = EngineConfig().dram_tokens,
    link_gbps: Annotated[
        float | None, typer.Option(help="Limit of the link between the tiers, GB/s each way.", show_default="none")
    ] = None,
    page_size: Annotated[int, typer.Option(help="Tokens in a KV block.")] = EngineConfig().page_size,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest prompt and output together, in tokens.", show_default="by model")
    ] = None,
    max_batch_size: Annotated[int, typer.Option(help="Sequences in one step.")] = EngineConfig().max_batch_size,
    max_batch_tokens: Annotated[int, typer.Option(help="Tokens in one step.")] = EngineConfig().max_batch_tokens,
    max_queue: Annotated[int, typer.Option(help="Unfinished sequences held at most.")] = EngineConfig().max_queue,
    jump_forward: Annotated[
        bool, typer.Option(help="Take text that a grammar forces without sampling it.")
    ] = EngineConfig().jump_forward,
    tune_products: Annotated[
        bool, typer.Option(help="Measure which algorithm each matrix product is to take (CUDA).")
    ] = EngineConfig().tune_products,
    plan_late: Annotated[
        bool, typer.Option(help="On a GPU, plan each step just before the one before it ends.")
    ] = EngineConfig().plan_late,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine.", show_default="all cores")] = None,
    trace: Annotated[
        str, typer.Option(metavar="FILE", help="Write the engine's steps, copies and requests for ui.perfetto.dev.")
    ] = "",
    load_format: Annotated[str, typer.Option(help="auto, or dummy for random weights.")] = "auto",
) -> EngineConfig:
    import msgspec

    from superinfer.errors import InvalidRequestError

    fields = dict(locals())
    del fields["msgspec"], fields["InvalidRequestError"]
    try:
        return msgspec.convert(fields, EngineConfig)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(_say(fields, str(error))) from None


def _say(fields: dict[str, Any], message: str) -> str:
    said, _, name = message.partition(" - at `$.")
    name = name.rstrip("`")
    if name not in fields:
        return said
    allowed = EngineConfig.__annotations__[name]
    return f"--{name.replace('_', '-')} {fields[name]!r} is not one of {allowed.removeprefix('Literal')}"


def with_engine_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the command's `config` parameter by the engine options, which make it."""
    options = inspect.signature(_engine_options).parameters
    own = inspect.signature(command).parameters

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        config = _engine_options(**{name: given.pop(name) for name in options})
        command(config=config, **given)

    hints = get_type_hints(_engine_options, include_extras=True) | get_type_hints(command, include_extras=True)
    hints = {name: hint for name, hint in hints.items() if name not in ("config", "return")}
    for name in options:
        hints[name] = _in_panel(hints[name])
    merged = [p.replace(annotation=hints[n]) for n, p in (own | options).items() if n != "config"]
    merged.sort(key=lambda p: p.default is not inspect.Parameter.empty)
    wrapper.__signature__ = inspect.Signature(merged)  # type: ignore[attr-defined]
    wrapper.__annotations__ = hints
    return wrapper


def _in_panel(hint: Any) -> Any:
    hint.__metadata__[0].rich_help_panel = PANEL
    return hint
