"""What an operator asks a server: whether it is well, its metrics, what it does now, and the page that shows that."""

from __future__ import annotations

import contextlib

import msgspec
from fastapi import FastAPI
from fastapi.responses import Response
from starlette.types import Scope

from superinfer.errors import EngineUnavailableError, SuperinferError
from superinfer.runtime.server.gate import Finished
from superinfer.runtime.server.live import add_page
from superinfer.runtime.server.metrics import Metrics
from superinfer.runtime.server.openapi import openapi
from superinfer.runtime.server.service import Service
from superinfer.version import version

HEALTH_TIMEOUT_S = 2.0


def add_operations(app: FastAPI, service: Service) -> None:
    """Adds /health, /ready, /version, /metrics, the OpenAPI document, and the page with its /v1/live."""

    @app.get("/health")
    async def health() -> Response:
        return await _health(service)

    @app.get("/ready")
    async def ready() -> Response:
        return await _health(service)

    @app.get("/version")
    async def running() -> Response:
        return Response(msgspec.json.encode({"version": version()}), media_type="application/json")

    @app.get("/metrics")
    async def metrics() -> Response:
        stats = None
        with contextlib.suppress(SuperinferError):
            stats = await service.text.client.stats(HEALTH_TIMEOUT_S)
        return Response(service.metrics.text(stats), media_type="text/plain; version=0.0.4; charset=utf-8")

    keys = bool(service.settings.api_keys)
    document = msgspec.json.encode(openapi(version=version(), with_keys=keys))

    @app.get("/openapi.json")
    async def described() -> Response:
        return Response(document, media_type="application/json")

    if service.settings.page:
        add_page(app, service.text, service.model)


async def _health(service: Service) -> Response:
    report = await service.text.client.health(HEALTH_TIMEOUT_S)
    if report.status != "ok":
        raise EngineUnavailableError("the engine is stopping")
    body = {
        "status": report.status,
        "model": service.model,
        "running": report.running,
        "waiting": report.waiting,
        "uptime_s": round(report.uptime_s, 3),
        "idle_s": round(report.idle_s, 3),
    }
    return Response(msgspec.json.encode(body), media_type="application/json")


def answered(app: FastAPI, metrics: Metrics) -> Finished:
    """Counts each answer under its route: what clients make up as paths must not become labels."""

    paths = {getattr(route, "endpoint", None): str(getattr(route, "path", "other")) for route in app.routes}

    def count(scope: Scope, status: int, seconds: float) -> None:
        metrics.answered(paths.get(scope.get("endpoint"), "other"), status)

    return count
