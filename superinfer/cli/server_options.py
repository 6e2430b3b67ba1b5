"""The HTTP server's options. What is not given comes from SUPERINFER_* variables, then from --config, then defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from superinfer.cli.options import with_options
from superinfer.runtime.server.settings import load_settings, parse_slo_class, read_keys


def _server_options(
    server_config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="TOML file with these settings.", show_default=False),
    ] = None,
    model_name: Annotated[
        str | None, typer.Option(help="What clients call the model.", show_default="the model")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY", help="Requests must bring this key, or another; may be repeated.", show_default="none"
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="More keys, one a line.", show_default=False)
    ] = None,
    slo_class: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS",
            help="A service_tier with a promise: gold=ttft_ms:500 or with more fields, separated by commas (tbt_ms, "
            "deadline_ms, weight, on_miss); may be repeated.",
        ),
    ] = None,
    tool_parser: Annotated[
        str | None,
        typer.Option(
            help="How the model writes tool calls: hermes, llama3_json, mistral or pythonic.", show_default="by model"
        ),
    ] = None,
    reasoning_parser: Annotated[
        str | None, typer.Option(help="How it sets its reasoning apart: think or none.", show_default="by model")
    ] = None,
    sampling_defaults: Annotated[
        str | None,
        typer.Option(
            help="Whose sampling, where a request does not say: model (the checkpoint's own) or openai.",
            show_default="model",
        ),
    ] = None,
    max_body_bytes: Annotated[
        int | None, typer.Option(help="Longest request body; longer ones get 413.", show_default="32 MiB")
    ] = None,
    max_total_body_bytes: Annotated[
        int | None,
        typer.Option(help="Bodies of all requests at a time; what is beyond gets 429.", show_default="1 GiB"),
    ] = None,
    max_concurrent: Annotated[
        int | None, typer.Option(help="Requests at a time; what is beyond gets 429.", show_default="4096")
    ] = None,
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
        list[str] | None,
        typer.Option("--cors-origin", metavar="ORIGIN", help="Whose pages a browser lets call; may be repeated."),
    ] = None,
    tls_cert: Annotated[
        str | None, typer.Option(metavar="FILE", help="PEM certificate: serve HTTPS.", show_default=False)
    ] = None,
    tls_key: Annotated[str | None, typer.Option(metavar="FILE", help="Its PEM key.", show_default=False)] = None,
    access_log: Annotated[
        bool | None,
        typer.Option(
            "--access-log/--no-access-log", help="A JSON line on stderr for each request.", show_default="no-access-log"
        ),
    ] = None,
    otlp_endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Send OpenTelemetry traces there, by HTTP.", show_default=False)
    ] = None,
    page: Annotated[
        bool | None, typer.Option("--page/--no-page", help="Serve the page at /.", show_default="page")
    ] = None,
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


with_server_options = with_options("settings", _server_options, "Server")
