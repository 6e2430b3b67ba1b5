"""The engine's options, declared once and added to every command that may start an engine."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import msgspec
import typer

from superinfer.errors import InvalidRequestError
from superinfer.runtime.config import EMBEDDED, EngineConfig
from superinfer.runtime.scheduler.registry import POLICIES

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
        str,
        typer.Option(
            help="With rota, what becomes of a request whose promise cannot be kept: accept, degrade (it runs last) "
            "or refuse."
        ),
    ] = EngineConfig().admission,
    kv_tokens: Annotated[
        int | None, typer.Option(help="Size of the KV cache, in tokens.", show_default="what the device has room for")
    ] = None,
    dram_tokens: Annotated[
        int, typer.Option(help="Second tier of the KV cache, in CPU memory, in tokens; 0: none.")
    ] = EngineConfig().dram_tokens,
    link_gbps: Annotated[
        float | None, typer.Option(help="Limit of the link between the tiers, GB/s each way.", show_default="none")
    ] = None,
    page_size: Annotated[int, typer.Option(help="Tokens in a KV block.")] = EngineConfig().page_size,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest prompt and output together, in tokens.", show_default="by model")
    ] = None,
    max_batch_size: Annotated[int, typer.Option(help="Most sequences in one step.")] = EngineConfig().max_batch_size,
    max_batch_tokens: Annotated[int, typer.Option(help="Most tokens in one step.")] = EngineConfig().max_batch_tokens,
    max_queue: Annotated[
        int, typer.Option(help="Most unfinished sequences; more are refused.")
    ] = EngineConfig().max_queue,
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
        str, typer.Option(metavar="FILE", help="Write steps, copies and requests to FILE, for ui.perfetto.dev.")
    ] = "",
    load_format: Annotated[str, typer.Option(help="auto, or dummy: random weights.")] = "auto",
) -> EngineConfig:
    fields = dict(locals())
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


def with_options(
    name: str, make: Callable[..., Any], panel: str
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that replaces a command's parameter `name` by options, which are `make`'s parameters; it makes the
    parameter's value of them. In help they stand in a panel of their own."""
    options = inspect.signature(make).parameters

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command).parameters

        @functools.wraps(command)
        def wrapper(**given: Any) -> None:
            made = make(**{option: given.pop(option) for option in options})
            command(**{name: made}, **given)

        hints = get_type_hints(make, include_extras=True)
        for option in options:
            hints[option].__metadata__[0].rich_help_panel = panel
        hints |= get_type_hints(command, include_extras=True)
        hints = {each: hint for each, hint in hints.items() if each not in (name, "return")}
        merged = [p.replace(annotation=hints[n]) for n, p in (own | options).items() if n != name]
        merged.sort(key=lambda p: p.default is not inspect.Parameter.empty)
        wrapper.__signature__ = inspect.Signature(merged)  # type: ignore[attr-defined]
        wrapper.__annotations__ = hints
        return wrapper

    return decorate


with_engine_options = with_options("config", _engine_options, "Engine")


def _option(name: str, value: Any) -> str:
    """The option that gives a setting its value: `--policy`, or of a switch that is off `--no-plan-late`."""
    return f"--{'no-' if value is False else ''}{name.replace('_', '-')}"


def check_unset(config: EngineConfig, instead: str) -> None:
    """That nothing is asked of an engine which is not started. instead: what is used, as it was given.

    Raises InvalidRequestError naming the options that would do nothing.
    """
    default = EngineConfig()
    names = [name for name in config.__struct_fields__ if getattr(config, name) != getattr(default, name)]
    if names:
        given = ", ".join(_option(name, getattr(config, name)) for name in names)
        raise InvalidRequestError(
            f"{instead} runs already, and {given} would do nothing to it: leave out one or the other"
        )
