"""The HTTP server's options. What is not given comes from SUPERINFER_* variables, then from --config, then defaults."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from superinfer.runtime.server.settings import load_settings, parse_slo_class, read_keys

PANEL = "Server"


def _server_options(
    server_config: Annotated[
        Path | None, typer.Option("--config", help="TOML file with these settings.", show_default=False)
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="What clients call the model.", show_default="the model")
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="A key that requests may bring; may be repeated.", show_default="none")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="More keys, one a line.", show_default=False)] = None,
    slo_class: Annotated[
        list[str] | None,
        typer.Option(help="name=ttft_ms:500,tbt_ms:50: a service_tier with a promise; may be repeated."),
    ] = None,
    tool_parser: Annotated[
        str | None, typer.Option(help="hermes, llama3_json, mistral or pythonic.", show_default="by model")
    ] = None,
    reasoning_parser: Annotated[str | None, typer.Option(help="think or none.", show_default="by model")] = None,
    sampling_defaults: Annotated[
        str | None,
        typer.Option(
            help="Where requests say nothing: model (generation_config.json) or openai.", show_default="model"
        ),
    ] = None,
    max_body_bytes: Annotated[int | None, typer.Option(help="Longest request body.", show_default="32 MiB")] = None,
    max_total_body_bytes: Annotated[
        int | None, typer.Option(help="Of all request bodies at a time.", show_default="1 GiB")
    ] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Requests at a time.", show_default="4096")] = None,
    write_timeout_s: Annotated[
        float | None,
        typer.Option(help="Seconds until a client that reads or sends nothing is cut off.", show_default="60"),
    ] = None,
    grace_s: Annotated[
        float | None,
        typer.Option("--grace", help="Seconds running answers may go on after SIGTERM.", show_default="5"),
    ] = None,
    responses_bytes: Annotated[
        int | None, typer.Option(help="Memory for stored responses; 0 is none.", show_default="64 MiB")
    ] = None,
    cors_origins: Annotated[
        list[str] | None, typer.Option("--cors-origin", help="Browser origin to allow; may be repeated.")
    ] = None,
    tls_cert: Annotated[str | None, typer.Option(help="PEM certificate: serve HTTPS.", show_default=False)] = None,
    tls_key: Annotated[str | None, typer.Option(help="Its PEM key.", show_default=False)] = None,
    access_log: Annotated[
        bool | None, typer.Option("--access-log/--no-access-log", help="A JSON line on stderr for each request.")
    ] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(help="Send traces there by OTLP over HTTP.", show_default=False)
    ] = None,
    page: Annotated[bool | None, typer.Option("--page/--no-page", help="Serve the page at /.")] = None,
) -> Any:
    flags: dict[str, Any] = dict(locals())
    config, key_file = flags.pop("server_config"), flags.pop("api_key_file")
    keys, classes = flags.pop("api_key"), flags.pop("slo_class")
    flags = {name: value for name, value in flags.items() if value is not None}
    if keys or key_file is not None:
        flags["api_keys"] = [*(keys or []), *(read_keys(key_file) if key_file is not None else [])]
    if classes:
        flags["slo_classes"] = dict(parse_slo_class(text) for text in classes)
    return load_settings(flags, config=config)


def with_server_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace the command's `settings` parameter by the server's options, which make it."""
    options = inspect.signature(_server_options).parameters
    own = inspect.signature(command).parameters

    @functools.wraps(command)
    def wrapper(**given: Any) -> None:
        settings = _server_options(**{name: given.pop(name) for name in options})
        command(settings=settings, **given)

    own_hints = get_type_hints(command, include_extras=True)
    hints = own_hints | get_type_hints(_server_options, include_extras=True)
    hints = {name: hint for name, hint in hints.items() if name not in ("settings", "return")}
    for name in options:
        hints[name].__metadata__[0].rich_help_panel = PANEL
    merged = [p.replace(annotation=hints[n]) for n, p in (own | options).items() if n != "settings"]
    merged.sort(key=lambda p: p.default is not inspect.Parameter.empty)
    wrapper.__signature__ = inspect.Signature(merged)  # type: ignore[attr-defined]
    wrapper.__annotations__ = hints
    return wrapper
