"""Settings of the HTTP server: from flags, the environment and a TOML file, in this order of precedence."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from superinfer.errors import InvalidRequestError
from superinfer.runtime.slo import SLO, OnMiss

PREFIX = "SUPERINFER_"


class SloClass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A named promise, milliseconds: for requests of its `service_tier`, and those of its API keys.

    api_keys: keys whose requests belong to it unless they say otherwise.
    """

    ttft_ms: float | None = None
    tbt_ms: float | None = None
    deadline_ms: float | None = None
    weight: float = 1.0
    on_miss: OnMiss = "finish"
    api_keys: tuple[str, ...] = ()

    def slo(self) -> SLO | None:
        """None where it promises nothing and weighs what everything does. Raises ValueError."""
        ttft, tbt, deadline = (None if ms is None else ms / 1e3 for ms in (self.ttft_ms, self.tbt_ms, self.deadline_ms))
        slo = SLO(ttft=ttft, tbt=tbt, deadline=deadline, weight=self.weight, on_miss=self.on_miss)
        return slo if slo.promises_anything or slo.weight != 1.0 else None


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How one HTTP server behaves.

    model_name: what clients call the model; "": the engine's name for it.
    api_keys: a request must bring one of them; none: no key is asked for.
    slo_classes: by name; "default" is for requests that name no other.
    tool_parser, reasoning_parser: "auto" goes by the model.
    sampling_defaults: what a request leaves out is as the checkpoint's generation_config.json says ("model"), or as
        OpenAI has it ("openai").
    max_body_bytes: a longer request body is refused with 413.
    max_total_body_bytes: of the bodies of all requests being answered; further ones are refused with 429.
    max_concurrent: requests answered at a time; further ones are refused with 429.
    write_timeout_s: a client that reads nothing for so long is cut off, and one whose request does not come.
    grace_s: how long running answers may go on after SIGTERM.
    responses_bytes: memory for stored responses; the oldest go first. 0 stores none.
    cors_origins: browsers' pages from there may use the API; "*" is any.
    tls_cert, tls_key: PEM files; both or none.
    access_log: a JSON line on stderr for each request.
    otlp_endpoint: where traces go, by OTLP over HTTP; "": nowhere. Needs the extra `otel`.
    page: serve the page at `/`.
    """

    model_name: str = ""
    api_keys: tuple[str, ...] = ()
    slo_classes: dict[str, SloClass] = {}
    tool_parser: str = "auto"
    reasoning_parser: str = "auto"
    sampling_defaults: Literal["model", "openai"] = "model"
    max_body_bytes: int = 32 << 20
    max_total_body_bytes: int = 1 << 30
    max_concurrent: int = 4096
    write_timeout_s: float = 60.0
    grace_s: float = 5.0
    responses_bytes: int = 64 << 20
    cors_origins: tuple[str, ...] = ()
    tls_cert: str = ""
    tls_key: str = ""
    access_log: bool = False
    otlp_endpoint: str = ""
    page: bool = True

    def __post_init__(self) -> None:
        lowest = {"max_body_bytes": 1, "max_concurrent": 1, "responses_bytes": 0}
        lowest["max_total_body_bytes"] = self.max_body_bytes  # or a body within its limit could never come in
        for name, low in lowest.items():
            if getattr(self, name) < low:
                raise InvalidRequestError(f"{name}={getattr(self, name)} must be at least {low}")
        if not self.write_timeout_s > 0:
            raise InvalidRequestError(f"write_timeout_s={self.write_timeout_s} must be above 0")
        if not self.grace_s >= 0:
            raise InvalidRequestError(f"grace_s={self.grace_s} must be at least 0")
        if self.otlp_endpoint and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise InvalidRequestError(f"otlp_endpoint={self.otlp_endpoint!r} must be a URL: http://HOST:PORT/v1/traces")
        if not all(
            key.strip() for key in (*self.api_keys, *(k for c in self.slo_classes.values() for k in c.api_keys))
        ):
            raise InvalidRequestError(
                "an API key is empty: everybody who sends none would be let in; give a text, or no key at all"
            )
        if bool(self.tls_cert) != bool(self.tls_key):
            raise InvalidRequestError("tls_cert and tls_key belong together; give both or none")
        for name, found in self.slo_classes.items():
            if name == "auto" or not name:
                raise InvalidRequestError(f"slo class {name!r} cannot have that name; choose another one")
            try:
                found.slo()
            except ValueError as error:
                raise InvalidRequestError(f"slo class {name!r}: {error}") from None


def load_settings(
    flags: Mapping[str, Any], *, config: Path | None = None, environment: Mapping[str, str] = os.environ
) -> ServerSettings:
    """The settings. `flags` holds those that were given; they win over SUPERINFER_* variables, and these over `config`.

    Lists in variables are separated by commas; SUPERINFER_SLO_CLASSES is JSON. Raises InvalidRequestError.
    """
    merged: dict[str, Any] = {}
    if config is not None:
        merged |= _from_file(config)
    for field in msgspec.structs.fields(ServerSettings):
        value = environment.get(PREFIX + field.name.upper())
        if value is not None:
            merged[field.name] = _parsed(field.name, field.type, value)
    merged |= flags
    try:
        return msgspec.convert(merged, ServerSettings, strict=False)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"a server setting is wrong: {_say(merged, str(error))}") from None


def _say(values: Mapping[str, Any], message: str) -> str:
    """What msgspec says of a setting, with the value, and with the choices where there are some."""
    said, _, name = message.partition(" - at `$.")
    name = name.removesuffix("`")
    if name not in values:
        return message
    kinds = {field.name: field.type for field in msgspec.structs.fields(ServerSettings)}
    choices = get_args(kinds[name]) if get_origin(kinds[name]) is Literal else ()
    return f"{name}={values[name]!r}: {said}" + (f"; choose one of {', '.join(choices)}" if choices else "")


def _from_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise InvalidRequestError(f"config file {str(path)!r} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"config file {str(path)!r} is not TOML: {error}") from None


def _parsed(name: str, kind: Any, value: str) -> Any:
    if kind == tuple[str, ...]:
        return [item.strip() for item in value.split(",") if item.strip()]
    if name == "slo_classes":
        try:
            return msgspec.json.decode(value)
        except msgspec.DecodeError as error:
            raise InvalidRequestError(f"{PREFIX}SLO_CLASSES is not JSON: {error}") from None
    return value


def parse_slo_class(text: str) -> tuple[str, dict[str, Any]]:
    """Name and fields of `name=ttft_ms:500,tbt_ms:50`. Raises InvalidRequestError."""
    name, equals, rest = text.partition("=")
    fields: dict[str, Any] = {}
    for item in filter(None, rest.split(",")):
        key, colon, value = item.partition(":")
        if not colon:
            equals = ""
        fields[key.strip()] = value.strip()
    if not equals or not name:
        raise InvalidRequestError(f"slo class {text!r} is not of the form name=ttft_ms:500,tbt_ms:50")
    try:
        msgspec.convert(fields, SloClass, strict=False)
    except msgspec.ValidationError as error:
        known = ", ".join(field.name for field in msgspec.structs.fields(SloClass) if field.name != "api_keys")
        raise InvalidRequestError(f"slo class {text!r}: {error}; its fields are {known}") from None
    return name, fields


def read_keys(path: Path) -> list[str]:
    """API keys, one a line; empty lines and those that begin with # are left out. Raises InvalidRequestError."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except OSError as error:
        raise InvalidRequestError(f"API key file {str(path)!r} cannot be read: {error.strerror}") from None
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise InvalidRequestError(f"API key file {str(path)!r} holds no key; put one on each line")
    return keys
