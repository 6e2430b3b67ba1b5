"""Which promise a request gets: its own, its headers', its tier's, its key's, or the default one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import msgspec

from superinfer.runtime.server.errors import bad_request
from superinfer.runtime.server.schema import SloFields
from superinfer.runtime.server.settings import ServerSettings
from superinfer.runtime.slo import SLO

DEFAULT = "default"
# OpenAI's value, and what each header is called in the body. x-slo-ttft-ms and x-slo-tpot-ms are those of the Gateway
# API Inference Extension.
HEADERS = {
    "x-slo-ttft-ms": "ttft_ms",
    "x-slo-tpot-ms": "tbt_ms",
    "x-slo-tbt-ms": "tbt_ms",
    "x-slo-deadline-ms": "deadline_ms",
    "x-slo-weight": "weight",
}
_NUMBERS = ("ttft_ms", "tbt_ms", "deadline_ms", "weight")


class Promise(msgspec.Struct, frozen=True):
    """slo: None for none. slo_class: the name under which it is counted; tier: what the answer calls `service_tier`."""

    slo: SLO | None = None
    slo_class: str = ""
    tier: str = ""


class Promised(Protocol):
    """The fields of a request that say what it is promised."""

    @property
    def slo(self) -> SloFields | None: ...

    @property
    def service_tier(self) -> str | None: ...


class Promises:
    """The operator's classes, applied to requests."""

    def __init__(self, settings: ServerSettings) -> None:
        self._classes = {name: found.slo() for name, found in settings.slo_classes.items()}
        self._by_key = {key: name for name, found in settings.slo_classes.items() for key in found.api_keys}

    @property
    def names(self) -> list[str]:
        """Of the classes."""
        return sorted(self._classes)

    def of(self, request: Promised, headers: Mapping[str, str], key: str) -> Promise:
        """The fields of the body count before headers, and these before the class. Raises ApiError."""
        name = self._class_of(request, key)
        base = self._classes.get(name)
        own = slo_of(_with_headers(request.slo, headers))
        slo = own.within(base) if own is not None else base
        return Promise(slo, name if name in self._classes else "", name or DEFAULT)

    def _class_of(self, request: Promised, key: str) -> str:
        tier = request.service_tier
        if tier in (None, "auto"):
            name = self._by_key.get(key, "")
            return name or (DEFAULT if DEFAULT in self._classes else "")
        assert tier is not None
        if tier != DEFAULT and tier not in self._classes:
            there = ", ".join(["auto", "default", *(name for name in self.names if name != DEFAULT)])
            message = f"service_tier={tier!r:.80} is not offered by this server; use one of {there}"
            raise bad_request(message, param="service_tier", code="unsupported_parameter")
        return tier


def _with_headers(fields: SloFields | None, headers: Mapping[str, str]) -> SloFields | None:
    given: dict[str, float] = {}
    for header, name in HEADERS.items():
        text = headers.get(header)
        if text is None or name in given:
            continue
        try:
            given[name] = float(text)
        except ValueError:
            raise bad_request(
                f"header {header}: {text!r:.80} is not a number of milliseconds", param=header, code="invalid_slo"
            ) from None
    if not given:
        return fields
    if fields is None:
        fields = SloFields()
    return msgspec.structs.replace(fields, **{k: v for k, v in given.items() if getattr(fields, k) is None})


def slo_of(fields: SloFields | None) -> SLO | None:
    """Seconds from milliseconds. Raises ApiError for NaN, infinite, zero or negative values."""
    if fields is None:
        return None
    for name in _NUMBERS:
        value = getattr(fields, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            unit = "" if name == "weight" else " of milliseconds"
            raise bad_request(
                f"slo.{name}={value!r} must be a finite number{unit} greater than 0; leave it out to promise nothing",
                param=f"slo.{name}",
                code="invalid_slo",
            )
    return SLO(
        ttft=_seconds(fields.ttft_ms),
        tbt=_seconds(fields.tbt_ms),
        deadline=_seconds(fields.deadline_ms),
        weight=1.0 if fields.weight is None else fields.weight,
        on_miss=fields.on_miss or "finish",
    )


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
